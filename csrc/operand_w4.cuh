// Packed int4 weights as the operand that wgmma takes from registers, for x fp16, bf16 or int8.
//
// A lane's piece of the operand is natural in K. Lane 4 g + t of a warp holds channels g and g + 8, and of every eight
// columns 2 t and 2 t + 1 (16 bit), which is byte t of a word; of every sixteen 4 t to 4 t + 3 (int8), which is half t
// of two words. So four lanes read the same words, and a byte permutation that depends on t picks from them.
//
// A lane has whole words, which take fewer instructions, where int8 x is put in the order of the codes instead: of every
// 32 columns 8 t to 8 t + 7; and for x of 16 bits where S is a multiple of 64, since such weights are put in its order
// once (quamba_kernels.cuda.int4_order): word t of the four of 32 columns holds, of each eight columns from 8 q on, the
// codes of 2 t and 2 t + 1 as nibbles q and q + 4.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cutlass/numeric_types.h"
#include "tma.cuh"

namespace quamba::w4 {

using cutlass::bfloat16_t;
using cutlass::half_t;

constexpr int kTileO = 128, kTileK = 128, kChunk = 64;  // channels, columns; columns that are unpacked at a time

struct Weights {
  const void* scale;  // fp16 or, for int8 x, int8 multipliers
  int M, O, K, groups;
  unsigned inverse;  // 2^32 / S rounded up: k / S is the upper half of k * inverse, for K S below 2^32
  unsigned constant;  // Operand::kBias: known to the compiler, it would take an instruction at each use

  __device__ __forceinline__ int group(int column) const {
    return min(static_cast<int>(__umulhi(column, inverse)), groups - 1);
  }
};

// Where in its word a scale lies, by its place among all; those of channels g and g + 8 lie alike.
template <class Raw>
__device__ __forceinline__ unsigned shift_in_word(unsigned at) {
  return at * static_cast<unsigned>(sizeof(Raw)) % 4 * 8;
}

// How each type of x has its weights made. Raw: a scale as stored. Factor: it, ready for use. kBox: columns of x that
// are 128 bytes. kFixed: what a GEMM's tile takes besides its tokens, in tokens, fitted to measured times. whole<I>: a
// register from a lane's whole word, the Ith of its codes. fill<Parts>: the registers of 64 columns from eight words of
// each of two channels as they are stored, Parts scales each.
template <class Element>
struct Operand;

template <class Derived, class Stored>
struct HalfOperand {
  using Raw = Stored;
  using Accumulator = float;
  static constexpr int kBox = 64, kRegisters = 16, kFixed = 52;
  static constexpr bool kScaled = false;

  __device__ static unsigned selector(int t) { return 0x4040 + 0x0101 * t; }

  template <int Parts, int Words, class Factor>
  __device__ __forceinline__ static void fill(unsigned* a, const unsigned (&word)[2][Words],
                                              const Factor (&factor)[Parts][2], unsigned select) {
#pragma unroll
    for (int i = 0; i < 2 * Words; ++i)  // of every 16 columns: channel g, g + 8, then the same eight columns on
      a[i] = Derived::pair(word[i % 2][i / 4 * 2 + i % 4 / 2], select, factor[i * Parts / (2 * Words)][i % 2]);
  }
};

template <>
struct Operand<half_t> : HalfOperand<Operand<half_t>, unsigned short> {
  using Whole = half_t;
  using Factor = __half2;
  static constexpr CUtensorMapDataType kType = CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  __device__ __forceinline__ static Factor factor(Raw raw) { return __half2half2(__ushort_as_half(raw)); }
  static constexpr unsigned kBias = 0x64006400u;  // 1024 twice
  // Nibbles I and I + 4 of a word, less 8: made of 1024 + n or 64 + n by the exponents in bias[I % 2].
  __device__ static unsigned second_bias(unsigned constant) { return constant - 0x10001000u; }
  template <int I>
  __device__ __forceinline__ static unsigned codes(unsigned word, const unsigned (&bias)[2]) {
    unsigned biased = ((word >> I / 2 * 8) & (I % 2 ? 0x00f000f0u : 0x000f000fu)) | bias[I % 2];
    __half2 code = __hadd2(reinterpret_cast<__half2&>(biased), __float2half2_rn(I % 2 ? -72.f : -1032.f));
    return reinterpret_cast<unsigned&>(code);
  }
  template <int I>
  __device__ __forceinline__ static unsigned whole(unsigned word, const Factor& scale, const unsigned (&bias)[2]) {
    const unsigned code = codes<I>(word, bias);
    const __half2 scaled = __hmul2(reinterpret_cast<const __half2&>(code), scale);
    return reinterpret_cast<const unsigned&>(scaled);
  }
  // 1024 + n in the low half, 1024 + 16 n in the high, made n - 8 exactly by one fma, then one rounding
  __device__ __forceinline__ static unsigned pair(unsigned word, unsigned select, Factor scale) {
    const unsigned kFactor = 0x2c003c00u, kOffset = 0xd480e408u;  // (1/16, 1), (-72, -1032)
    unsigned biased = __byte_perm(word, 0x64646464u, select) & 0xfff0ff0fu;
    __half2 code = __hfma2(reinterpret_cast<__half2&>(biased), reinterpret_cast<const __half2&>(kFactor),
                           reinterpret_cast<const __half2&>(kOffset));
    code = __hmul2(code, scale);
    return reinterpret_cast<unsigned&>(code);
  }
};

template <>
struct Operand<bfloat16_t> : HalfOperand<Operand<bfloat16_t>, unsigned short> {
  using Whole = bfloat16_t;
  // An fp16 scale is the sum of two bf16, and the product with the small one is exact, so the fma rounds only once.
  struct Factor {
    __nv_bfloat162 high, low;
  };
  static constexpr CUtensorMapDataType kType = CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  __device__ __forceinline__ static Factor factor(Raw raw) {
    float scale = __half2float(__ushort_as_half(raw));
    __nv_bfloat16 high = __float2bfloat16_rn(scale);
    return {__bfloat162bfloat162(high), __float2bfloat162_rn(scale - __bfloat162float(high))};
  }
  __device__ static unsigned selector(int t) { return 0x0400 + 0x0101 * t; }  // byte t of a word and of it >> 4
  static constexpr unsigned kBias = 0x43004300u;  // 128 twice
  __device__ static unsigned second_bias(unsigned constant) { return constant; }
  template <int I>  // nibbles I and I + 4 of a word, less 8
  __device__ __forceinline__ static unsigned codes(unsigned word, const unsigned (&bias)[2]) {
    __nv_bfloat162 code = less_8(word >> 4 * I, bias[0]);
    return reinterpret_cast<unsigned&>(code);
  }
  template <int I>
  __device__ __forceinline__ static unsigned whole(unsigned word, const Factor& scale, const unsigned (&bias)[2]) {
    return scaled(less_8(word >> 4 * I, bias[0]), scale);
  }
  __device__ __forceinline__ static unsigned pair(unsigned word, unsigned select, Factor scale) {
    return scaled(less_8(__byte_perm(word, word >> 4, select), kBias), scale);
  }
  __device__ __forceinline__ static unsigned scaled(__nv_bfloat162 code, const Factor& scale) {
    code = __hfma2(code, scale.high, __hmul2(code, scale.low));
    return reinterpret_cast<unsigned&>(code);
  }
  // The lowest four bits of each half, less 8.
  __device__ __forceinline__ static __nv_bfloat162 less_8(unsigned codes, unsigned constant) {
    const unsigned kOffset = 0xc308c308u, kOne = 0x3f803f80u;  // -136, 1
    unsigned biased = (codes & 0x000f000fu) | constant;  // 128 + n
    return __hfma2(reinterpret_cast<__nv_bfloat162&>(biased), reinterpret_cast<const __nv_bfloat162&>(kOne),
                   reinterpret_cast<const __nv_bfloat162&>(kOffset));
  }
};

template <>
struct Operand<int8_t> {
  using Raw = unsigned char;
  using Accumulator = int;
  struct Factor {
    unsigned multiplier, offset;
  };
  static constexpr int kBox = 128, kRegisters = 8, kFixed = 150;
  static constexpr bool kScaled = true;
  static constexpr CUtensorMapDataType kType = CU_TENSOR_MAP_DATA_TYPE_UINT8;
  // n m + 128 - 8 m stays within a byte for codes in [-7, 7] and m <= 17, so four products are one multiplication
  __device__ __forceinline__ static Factor factor(Raw m) { return {m, 0x80808080u - m * 0x08080808u}; }

  // Four codes of a word of eight, the first or, at odd t, the last ones, by a selector of nibbles.
  __device__ static unsigned selector(int t) { return t % 2 ? 0x7362u : 0x5140u; }
  __device__ __forceinline__ static unsigned four(unsigned word, unsigned nibbles, const Factor& f) {
    const unsigned codes = __byte_perm(word, word >> 4, nibbles) & 0x0f0f0f0fu;
    return (codes * f.multiplier + f.offset) ^ 0x80808080u;
  }

  // Every other code of a word, from the Ith on, as unsigned bytes, kOver more than they are.
  using Whole = uint8_t;
  static constexpr int kOver = 128;
  static constexpr unsigned kBias = 0;
  __device__ static unsigned second_bias(unsigned) { return 0; }
  template <int I>
  __device__ __forceinline__ static unsigned whole(unsigned word, const Factor& f, const unsigned (&)[2]) {
    return (word >> 4 * I & 0x0f0f0f0fu) * f.multiplier + f.offset;
  }
};

// The scales of one step for channels g and g + 8; beyond the ends those of the last ones, whose products are 0 or
// are not stored.
template <class Element, int Parts>
struct Scales {
  static constexpr int kColumns = kChunk / Parts;
  typename Operand<Element>::Raw raw[2 * Parts][2];

  template <class W>
  __device__ __forceinline__ void load(const Weights& w, const W& at, int channel) {
    auto* scale = static_cast<const typename Operand<Element>::Raw*>(w.scale);
    int first = min(at.column + channel, w.O - 1) * w.groups, second = min(at.column + channel + 8, w.O - 1) * w.groups;
#pragma unroll
    for (int p = 0; p < 2 * Parts; ++p) {
      int group = min(static_cast<int>(__umulhi(at.step * kTileK + p * kColumns, w.inverse)), w.groups - 1);
      raw[p][0] = __ldg(scale + first + group);
      raw[p][1] = __ldg(scale + second + group);
    }
  }
};

}  // namespace quamba::w4
