// Packed int4 weights written out: two-level codes to int8, group-scaled codes to fp16 or bf16.
//
// Bound by memory, and what is written is read next, so stores stay in L2. A word holds the codes of eight neighbours
// in K, low nibble first, stored with +8; groups are multiples of eight columns, so a word has one scale.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "expansion.cuh"
#include "launch.cuh"
#include "linear.h"

namespace {

using namespace quamba;

constexpr int kThreads = 256, kUnroll = 4;

struct Shape {
  unsigned words;        // words a row: K / 8
  unsigned group_words;  // words a group: S / 8
  unsigned groups;       // groups a row: K / S
};

// Position in the [O, K/S] tensor of scales of the group that word i lies in.
__device__ __forceinline__ unsigned group_of(const Shape& s, unsigned i) {
  unsigned row = i / s.words;
  return row * s.groups + (i - row * s.words) / s.group_words;
}

// Both kernels read the weights, which are constants, while the kernel before still runs, and write when it has ended.
__global__ void __launch_bounds__(kThreads) expand_int8(const __grid_constant__ Expansion e) {
  launch_dependents();
  expand<kUnroll>(e, blockIdx.x, threadIdx.x, kThreads, [] { wait_for_previous_kernel(); });
}

struct Expand {
  const void *packed, *scale;
  uint4* y;
  Shape shape;
  unsigned count;
};

template <class T>
__device__ __forceinline__ unsigned round_pair(float low, float high) {
  if constexpr (std::is_same_v<T, __half2>) {
    T pair = __floats2half2_rn(low, high);
    return reinterpret_cast<unsigned&>(pair);
  } else {
    T pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<unsigned&>(pair);
  }
}

template <class Pair>
__global__ void __launch_bounds__(kThreads) expand_float(const __grid_constant__ Expand p) {
  const auto* packed = static_cast<const unsigned*>(p.packed);
  const auto* scale = static_cast<const __half*>(p.scale);
  const unsigned count = p.count;
  launch_dependents();
  unsigned first = blockIdx.x * (kThreads * kUnroll) + threadIdx.x, words[kUnroll];
  __half scales[kUnroll];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u)
    if (unsigned i = first + u * kThreads; i < count) {
      words[u] = __ldg(packed + i);
      scales[u] = __ldg(scale + group_of(p.shape, i));
    }
  wait_for_previous_kernel();
#pragma unroll
  for (int u = 0; u < kUnroll; ++u)
    if (unsigned i = first + u * kThreads; i < count) {
      float s = __half2float(scales[u]);
      unsigned pairs[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        int low = static_cast<int>(words[u] >> (8 * j) & 15) - 8;
        int high = static_cast<int>(words[u] >> (8 * j + 4) & 15) - 8;
        pairs[j] = round_pair<Pair>(low * s, high * s);
      }
      p.y[i] = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    }
}

// Codes a thread takes at once are ``step``; what the kernels cannot serve gives zero blocks.
unsigned blocks(const QuambaLinear& a, int step) {
  if (a.O <= 0 || a.K <= 0 || a.S <= 0 || a.S % 8 || a.K % a.S || a.K % step) return 0;
  long long items = static_cast<long long>(a.O) * a.K / step;
  return items <= 0x7fffffffLL ? static_cast<unsigned>((items + kThreads * kUnroll - 1) / (kThreads * kUnroll)) : 0;
}

Shape shape_of(const QuambaLinear& a) {
  return {static_cast<unsigned>(a.K / 8), static_cast<unsigned>(a.S / 8), static_cast<unsigned>(a.K / a.S)};
}

}  // namespace

int quamba::expand_alone(const QuambaExpansion& what, void* stream) {
  const Expansion e = expansion_of(what);
  return launch(expand_int8, e, dim3(e.blocks(kThreads, kUnroll)), kThreads, stream);
}

extern "C" int quamba_expand_w4a8(const QuambaLinear* a, void* stream) {
  const QuambaExpansion what{a->w, a->w_multiplier, a->y, a->O, a->K, a->S};
  return expands(what) && a->y_dtype == QUAMBA_I8 ? expand_alone(what, stream) : QUAMBA_UNSUPPORTED;
}

extern "C" int quamba_expand_w4a16(const QuambaLinear* a, void* stream) {
  unsigned grid = blocks(*a, 8);
  const bool half = a->y_dtype == QUAMBA_F16;
  if (!grid || (!half && a->y_dtype != QUAMBA_BF16)) return QUAMBA_UNSUPPORTED;
  const Expand p{a->w, a->w_scale, static_cast<uint4*>(a->y), shape_of(*a),
                 static_cast<unsigned>(static_cast<long long>(a->O) * a->K / 8)};
  return launch(half ? expand_float<__half2> : expand_float<__nv_bfloat162>, p, dim3(grid), kThreads, stream);
}
