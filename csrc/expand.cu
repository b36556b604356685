// Packed int4 weights written out: two-level codes to int8, group-scaled codes to fp16 or bf16.
//
// Bound by memory, and what is written is read next, so stores stay in L2. A word holds the codes of eight neighbours
// in K, low nibble first, stored with +8; groups are multiples of eight columns, so a word has one scale.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "launch.cuh"

namespace {

using namespace quamba;

constexpr int kThreads = 256, kRows = 4;  // a thread writes the same columns of so many rows

struct Expand {
  const void *packed, *scale;
  uint4* y;
  unsigned rows, items;          // items: what a thread writes at once, of a row
  unsigned group_words, groups;  // words (of 8 codes) of a group, groups of a row
};

// Eight int8 codes (n - 8) * m, n the nibbles of a word. 256 + (n - 8) m is positive and below 2^16, so two fit a word.
__device__ __forceinline__ uint2 scale_codes(unsigned word, unsigned m) {
  const unsigned offset = 0x01000100u - m * 0x00080008u;
  unsigned pairs[4];  // nibbles i and i + 4
#pragma unroll
  for (int i = 0; i < 4; ++i) pairs[i] = (word >> (4 * i) & 0x000f000fu) * m + offset;
  const unsigned low = __byte_perm(pairs[0], pairs[1], 0x6240), high = __byte_perm(pairs[2], pairs[3], 0x6240);
  return make_uint2(__byte_perm(low, high, 0x5410), __byte_perm(low, high, 0x7632));
}

// Both kernels read the weights, which are constants, while the kernel before still runs, and write when it has ended.
__global__ void __launch_bounds__(kThreads) expand_int8(const __grid_constant__ Expand p) {
  const unsigned item = blockIdx.x * blockDim.x + threadIdx.x, first = blockIdx.y * kRows;
  launch_dependents();
  if (item >= p.items) return;
  const auto* packed = static_cast<const uint2*>(p.packed) + item;
  const auto* multiplier = static_cast<const unsigned char*>(p.scale);
  const unsigned low_group = 2 * item / p.group_words, high_group = (2 * item + 1) / p.group_words;
  uint2 words[kRows];
  unsigned low_scale[kRows], high_scale[kRows];
#pragma unroll
  for (int u = 0; u < kRows; ++u)
    if (const unsigned row = first + u; row < p.rows) {
      words[u] = __ldg(packed + static_cast<size_t>(row) * p.items);
      low_scale[u] = __ldg(multiplier + row * p.groups + low_group);
      high_scale[u] = __ldg(multiplier + row * p.groups + high_group);
    }
  wait_for_previous_kernel();
#pragma unroll
  for (int u = 0; u < kRows; ++u)
    if (const unsigned row = first + u; row < p.rows) {
      const uint2 low = scale_codes(words[u].x, low_scale[u]), high = scale_codes(words[u].y, high_scale[u]);
      p.y[static_cast<size_t>(row) * p.items + item] = make_uint4(low.x, low.y, high.x, high.y);
    }
}

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
  const unsigned item = blockIdx.x * blockDim.x + threadIdx.x, first = blockIdx.y * kRows;
  launch_dependents();
  if (item >= p.items) return;
  const auto* packed = static_cast<const unsigned*>(p.packed) + item;
  const auto* scale = static_cast<const __half*>(p.scale) + item / p.group_words;
  unsigned words[kRows];
  __half scales[kRows];
#pragma unroll
  for (int u = 0; u < kRows; ++u)
    if (const unsigned row = first + u; row < p.rows) {
      words[u] = __ldg(packed + static_cast<size_t>(row) * p.items);
      scales[u] = __ldg(scale + row * p.groups);
    }
  wait_for_previous_kernel();
#pragma unroll
  for (int u = 0; u < kRows; ++u)
    if (const unsigned row = first + u; row < p.rows) {
      const float s = __half2float(scales[u]);
      unsigned pairs[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int low = static_cast<int>(words[u] >> (8 * j) & 15) - 8;
        const int high = static_cast<int>(words[u] >> (8 * j + 4) & 15) - 8;
        pairs[j] = round_pair<Pair>(low * s, high * s);
      }
      p.y[static_cast<size_t>(row) * p.items + item] = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    }
}

// Codes a thread takes at once are ``step``.
int run(void (*kernel)(Expand), const QuambaLinear& a, const void* scale, int step, void* stream) {
  if (a.O <= 0 || a.K <= 0 || a.S <= 0 || a.S % 8 || a.K % a.S || a.K % step || a.O > kRows * 65535)
    return QUAMBA_UNSUPPORTED;
  const unsigned items = a.K / step, across = (items - 1) / kThreads + 1, threads = (items - 1) / across + 1;
  const Expand p{a.w, scale, static_cast<uint4*>(a.y), static_cast<unsigned>(a.O), items,
                 static_cast<unsigned>(a.S / 8), static_cast<unsigned>(a.K / a.S)};
  return launch(kernel, p, dim3(across, (a.O - 1) / kRows + 1), (threads + 31) / 32 * 32, stream);
}

}  // namespace

extern "C" int quamba_expand_w4a8(const QuambaLinear* a, void* stream) {
  return a->y_dtype == QUAMBA_I8 ? run(expand_int8, *a, a->w_multiplier, 16, stream) : QUAMBA_UNSUPPORTED;
}

extern "C" int quamba_expand_w4a16(const QuambaLinear* a, void* stream) {
  if (a->y_dtype != QUAMBA_F16 && a->y_dtype != QUAMBA_BF16) return QUAMBA_UNSUPPORTED;
  return run(a->y_dtype == QUAMBA_F16 ? expand_float<__half2> : expand_float<__nv_bfloat162>, *a, a->w_scale, 8, stream);
}
