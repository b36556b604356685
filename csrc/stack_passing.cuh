// How blocks of a stack pass on what they make, without barriers of the grid: every value tells which layer it is of, one of 16
// bits by the layer's number beside it, a float by the number's parity in its last bit. Parity suffices: whoever waits for a
// value has seen the one of the layer before in its place, and the next one is not written until all have seen this one.
#pragma once

#include "stack_rows.cuh"

namespace quamba::stack {

__device__ __forceinline__ void pass_on(float* to, float v, unsigned layer) {
  const unsigned bits = (__float_as_uint(v) & ~1u) | (layer & 1);
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(bits) : "memory");
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

__device__ __forceinline__ void receive(Quads& v, const float* from, int channels, unsigned layer) {
  Patience patience;
  unsigned other;  // a last bit that is set where a value is not of the layer
  do {
    other = 0;
    QUAMBA_EACH_QUAD(i, channels) {
      v[i][0] = v[i][1] = v[i][2] = v[i][3] = 0.f;
      if (quad_of(i) * 4 < channels) {
        unsigned a, b, c, d;
        asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(a), "=r"(b), "=r"(c), "=r"(d)
                     : "l"(from + quad_of(i) * 4)
                     : "memory");
        v[i][0] = __uint_as_float(a), v[i][1] = __uint_as_float(b);
        v[i][2] = __uint_as_float(c), v[i][3] = __uint_as_float(d);
        other |= a ^ layer | b ^ layer | c ^ layer | d ^ layer;
      }
    }
    patience.lose();
  } while (other & 1);
}

}  // namespace quamba::stack
