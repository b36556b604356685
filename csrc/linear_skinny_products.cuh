// One step of the few-token linears: int4 weights become int8 or 16-bit operands, then mma.sync.
//
// int4 weights take their group's scale in one of two ways. Where every step lies within a group, the step's own sum is
// scaled (exact). Otherwise (FOLD) the weight itself is: as int8 code q * m for w4a8 (exact), or rounded once to the
// type of x for w4a16.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "linear_skinny_loads.cuh"

namespace quamba::skinny {

// Four int4 codes of the low nibbles, stored with +8, as int8: 16 q, or q * m.
template <bool FOLD>
__device__ __forceinline__ uint32_t int8_of(uint32_t low_nibbles, uint32_t high_nibbles, uint32_t m) {
  // u m + 128 - 8 m stays within a byte for q in [-7, 7] and m <= 17, so four products are one multiplication
  if constexpr (FOLD) return ((low_nibbles & 0x0f0f0f0f) * m + (0x80808080u - m * 0x08080808u)) ^ 0x80808080u;
  return (high_nibbles & 0xf0f0f0f0) ^ 0x80808080u;
}

template <bool FOLD, int R, int NT>
__device__ __forceinline__ void multiply_w4a8(int (&acc)[R][NT][4], const Step<R>& s, const uint4* x, int slot,
                                              int plane) {
  int part[R][NT][4] = {};
#pragma unroll
  for (int piece = 0; piece < 2; ++piece) {
    uint32_t a[R][2][4];  // two words of eight weights: even and odd nibbles of both rows
#pragma unroll
    for (int r = 0; r < R; ++r)
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const uint32_t w = piece ? (j ? s.w[r][h].w : s.w[r][h].z) : (j ? s.w[r][h].y : s.w[r][h].x);
          a[r][j][h] = int8_of<FOLD>(w, w << 4, s.scale[r][h]);
          a[r][j][2 + h] = int8_of<FOLD>(w >> 4, w, s.scale[r][h]);
        }
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      const uint4 b = x[piece * plane + n * 32 + (slot ^ (piece * 4))];
      const uint32_t even[2] = {__byte_perm(b.x, b.y, 0x6420), __byte_perm(b.z, b.w, 0x6420)};
      const uint32_t odd[2] = {__byte_perm(b.x, b.y, 0x7531), __byte_perm(b.z, b.w, 0x7531)};
#pragma unroll
      for (int r = 0; r < R; ++r)
#pragma unroll
        for (int j = 0; j < 2; ++j)
          mma_s8(FOLD ? acc[r][n] : part[r][n], a[r][j][0], a[r][j][1], a[r][j][2], a[r][j][3], even[j], odd[j]);
    }
  }
  if constexpr (!FOLD) {
#pragma unroll
    for (int r = 0; r < R; ++r)
#pragma unroll
      for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int c = 0; c < 4; ++c) acc[r][n][c] += (part[r][n][c] >> 4) * static_cast<int>(s.scale[r][c / 2]);
  }
}

// Eight int4 codes as four pairs (0,4), (1,5), (2,6), (3,7) of fp16 or bf16 q, or q * scale.
template <bool BF16, bool FOLD>
__device__ __forceinline__ void expand(uint32_t (&pair)[4], uint32_t w, uint32_t scale, uint32_t scale_rest) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (BF16) {
      // 0x4300 is 128, whose last bit is 1: 128 + u - 136
      pair[i] = fma_bf16x2((w >> (4 * i) & 0x000f000f) | 0x43004300, 0x3f803f80, 0xc308c308);
      // the scale is fp16: what bf16 leaves of it is added first
      if (FOLD) pair[i] = fma_bf16x2(pair[i], scale, fma_bf16x2(pair[i], scale_rest, 0x80008000));
    } else {
      // 0x6400 is 1024, whose last bit is 1: 1024 + u - 1032, or (1024 + 16 u) / 16 - 72
      const uint32_t v = i < 2 ? w : w >> 8;
      pair[i] = i % 2 ? fma_f16x2((v & 0x00f000f0) | 0x64006400, 0x2c002c00, 0xd480d480)
                      : sub_f16x2((v & 0x000f000f) | 0x64006400, 0x64086408);
      if (FOLD) pair[i] = fma_f16x2(pair[i], scale, 0x80008000);
    }
  }
}

__device__ __forceinline__ float float_of_half(uint32_t bits) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
}

__device__ __forceinline__ uint32_t twice(uint32_t half) { return half | half << 16; }

template <bool BF16, bool FOLD, int R, int NT>
__device__ __forceinline__ void multiply_w4a16(float (&acc)[R][NT][4], const Step<R>& s, const uint4* x, int slot,
                                               int plane) {
  float part[R][NT][4] = {};
  uint32_t scale[R][2] = {}, rest[R][2] = {};
  if constexpr (FOLD) {
#pragma unroll
    for (int r = 0; r < R; ++r)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        scale[r][h] = twice(s.scale[r][h]);
        if constexpr (BF16) {
          const float value = float_of_half(s.scale[r][h]);
          const __nv_bfloat16 near = __float2bfloat16_rn(value);
          scale[r][h] = twice(__bfloat16_as_ushort(near));
          rest[r][h] = twice(__bfloat16_as_ushort(__float2bfloat16_rn(value - __bfloat162float(near))));
        }
      }
  }
#pragma unroll
  for (int piece = 0; piece < 4; ++piece) {
    uint32_t a[R][2][4];
#pragma unroll
    for (int r = 0; r < R; ++r)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const uint4& v = s.w[r][h];
        expand<BF16, FOLD>(a[r][h], piece < 2 ? (piece ? v.y : v.x) : (piece == 3 ? v.w : v.z), scale[r][h],
                           rest[r][h]);
      }
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      const uint4 b = x[piece * plane + n * 32 + (slot ^ (piece * 2))];
      const uint32_t pair[4] = {__byte_perm(b.x, b.z, 0x5410), __byte_perm(b.x, b.z, 0x7632),
                                __byte_perm(b.y, b.w, 0x5410), __byte_perm(b.y, b.w, 0x7632)};
#pragma unroll
      for (int r = 0; r < R; ++r)
#pragma unroll
        for (int j = 0; j < 4; j += 2) {
          float(&to)[4] = FOLD ? acc[r][n] : part[r][n];
          if constexpr (BF16)
            mma_bf16(to, a[r][0][j], a[r][1][j], a[r][0][j + 1], a[r][1][j + 1], pair[j], pair[j + 1]);
          else
            mma_f16(to, a[r][0][j], a[r][1][j], a[r][0][j + 1], a[r][1][j + 1], pair[j], pair[j + 1]);
        }
    }
  }
  if constexpr (!FOLD) {
#pragma unroll
    for (int r = 0; r < R; ++r)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float value = float_of_half(s.scale[r][h]);
#pragma unroll
        for (int n = 0; n < NT; ++n)
#pragma unroll
          for (int c = 0; c < 2; ++c) acc[r][n][2 * h + c] = fmaf(part[r][n][2 * h + c], value, acc[r][n][2 * h + c]);
      }
  }
}

template <int R, int NT>
__device__ __forceinline__ void multiply_w8a8(int (&acc)[R][NT][4], const Step<R>& s, const uint4* x, int slot) {
#pragma unroll
  for (int n = 0; n < NT; ++n) {
    const uint4 b = x[n * 32 + slot];
#pragma unroll
    for (int r = 0; r < R; ++r) {
      mma_s8(acc[r][n], s.w[r][0].x, s.w[r][1].x, s.w[r][0].y, s.w[r][1].y, b.x, b.y);
      mma_s8(acc[r][n], s.w[r][0].z, s.w[r][1].z, s.w[r][0].w, s.w[r][1].w, b.z, b.w);
    }
  }
}

template <Kind KIND, bool FOLD, int R, int NT, typename Acc>
__device__ __forceinline__ void multiply(Acc (&acc)[R][NT][4], const Step<R>& s, const uint4* x, int slot, int plane) {
  if constexpr (KIND == Kind::kW8A8)
    multiply_w8a8<R, NT>(acc, s, x, slot);
  else if constexpr (KIND == Kind::kW4A8)
    multiply_w4a8<FOLD, R, NT>(acc, s, x, slot, plane);
  else
    multiply_w4a16<KIND == Kind::kW4BF16, FOLD, R, NT>(acc, s, x, slot, plane);
}

}  // namespace quamba::skinny
