// How blocks of a stack pass on what they make, without barriers of the grid: every value comes with the number of its layer.
#pragma once

#include "stack_rows.cuh"

namespace quamba::stack {

// What other blocks pass on. Of 8 bytes that are written at once none is seen without the others.
__device__ __forceinline__ void pass_on(uint2* to, float v, unsigned layer) {
  const uint64_t both = __float_as_uint(v) | static_cast<uint64_t>(layer) << 32;
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(to), "l"(both) : "memory");
}

__device__ __forceinline__ void pass_on(unsigned* to, unsigned short v, unsigned layer) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(v | layer << 16) : "memory");
}

// A value that never comes is an error after some seconds: it would hang the device for good.
struct Patience {
  int polls = 0;
  __device__ __forceinline__ void lose() {
    if (++polls > 1 << 24) __trap();
  }
};

// Asking for all of u or of the residual again and again would keep L2 busy, so that one thread asks how many blocks have
// passed on theirs first. That orders nothing: the numbers in the values do.
__device__ __forceinline__ void count_in(unsigned* count) {
  if (threadIdx.x == 0) asm volatile("red.relaxed.gpu.global.add.u32 [%0], 1;" ::"l"(count) : "memory");
}

__device__ __forceinline__ void await(const unsigned* count, int wanted) {
  if (threadIdx.x == 0) {
    int blocks;
    Patience patience;
    do {
      asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(blocks) : "l"(count) : "memory");
      patience.lose();
    } while (blocks < wanted);
  }
  Team::sync();
}

// Words of in_proj's result, asked for together.
template <int COUNT>
__device__ __forceinline__ void receive(unsigned (&v)[COUNT], const unsigned* const (&from)[COUNT], unsigned layer) {
  Patience patience;
  bool waiting;
  do {
    waiting = false;
#pragma unroll
    for (int i = 0; i < COUNT; ++i)
      asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v[i]) : "l"(from[i]) : "memory");
#pragma unroll
    for (int i = 0; i < COUNT; ++i) waiting |= v[i] >> 16 != layer;
    patience.lose();
  } while (waiting);
}

__device__ __forceinline__ void receive(Quads& v, const uint2* from, int channels, unsigned layer) {
  Patience patience;
  bool waiting;
  do {
    waiting = false;
    QUAMBA_EACH_QUAD(i, channels) {
      v[i][0] = v[i][1] = v[i][2] = v[i][3] = 0.f;
      if (quad_of(i) * 4 < channels)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          uint64_t a, b;
          asm volatile("ld.relaxed.gpu.global.v2.u64 {%0, %1}, [%2];"
                       : "=l"(a), "=l"(b)
                       : "l"(from + quad_of(i) * 4 + h * 2)
                       : "memory");
          v[i][2 * h] = __uint_as_float(static_cast<unsigned>(a));
          v[i][2 * h + 1] = __uint_as_float(static_cast<unsigned>(b));
          waiting |= a >> 32 != layer || b >> 32 != layer;
        }
    }
    patience.lose();
  } while (waiting);
}

}  // namespace quamba::stack
