// How a block of linear_few ends: the cells that are its own are summed up and finished as finish.cuh defines it.
//
// In a model a launch finds none of its code in the caches, and to fetch it takes longer than to execute it. So this is
// a short loop, in which types are told apart again and again: a warp takes half a cell at a time, 16 channels by 8
// tokens, of which a lane has four neighbouring channels of one token, loaded and stored at once.
#pragma once

#include <type_traits>

#include "finish.cuh"
#include "quads.cuh"
#include "tma.cuh"

namespace quamba::few {

constexpr int kCellBytes = 1024;  // 32 channels by 8 tokens

// Where lane 4 g + t's 16 bytes lie within half a cell, of tokens 2 t and 2 t + 1 and channels g and g + 8: so that a
// quarter of a warp that writes, and a warp that reads a word of each of its channels g and g + 4, meet all banks.
__device__ __forceinline__ int slot(int g, int t) { return g / 2 * 128 + ((g ^ g / 4) & 1) * 64 + t * 16; }

template <class T>
__device__ __forceinline__ T value_of(unsigned bits) {
  if constexpr (std::is_same_v<T, float>) return __uint_as_float(bits);
  return static_cast<T>(bits);
}

// Of the cells of TileM tokens from `row` and 128 / kFold channels from `column` on the block has `own`, every
// `splits`th from `rank` on; parts of each lie at `mail`, kFold from each block, by rank. arrived() returns when all of
// them are there.
template <class Sum, bool Scaled, int TileM, int kFold, class Arrived>
__device__ __forceinline__ void finish_cells(const Finish& p, unsigned mail, int own, int splits, int rank, int row,
                                             int column, Arrived arrived) {
  constexpr int kAtOnce = 4, kWide = 4 / kFold;  // cells of the eight warps: their channels stay the same
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, token = lane / 4, quad = lane % 4, odd = quad % 2;
  const int parts = splits * kFold;
  int j = warp / 2;
  if (j >= own) return;
  const int cell = j * splits + rank, n = column + cell % kWide * 32 + warp % 2 * 16 + quad * 4;
  const bool exists = n < p.O;
  int at = row + cell / kWide * 8 + token;
  unsigned from = mail + j * parts * kCellBytes + warp % 2 * 512 + slot(odd * 4, token / 2) +
                  (quad / 2 * 2 + token % 2) * 4;
  const int next = 64 - 128 * odd;  // from an even channel to the next, by slot

  auto add = [](float x, float y) { return __fadd_rn(x, y); };
  auto times = [](float x, float y) { return __fmul_rn(x, y); };
  float4 w = make_float4(1.f, 1.f, 1.f, 1.f), bias = make_float4(0.f, 0.f, 0.f, 0.f), scale = w, inverse = w;
  constexpr int kHeld = (TileM + 31) / 32;  // scales of x that a lane keeps, each for a token of one of four turns
  float xs[kHeld];
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int turn = 4 * i + lane / 8, of = row + (cell / kWide + turn * kFold * splits) * 8 + lane % 8;
    xs[i] = Scaled && j + kAtOnce * turn < own && of < p.M ? __ldcg(p.x_scale + of * p.x_step) : 1.f;
  }
  uint4 residual = make_uint4(0, 0, 0, 0);
  auto ask = [&] {
    if (p.residual && exists && at < p.M)
      residual = load_raw(p.residual, p.residual_dtype, static_cast<long long>(at) * p.O + n, 4, true);
  };
  ask();
  if (exists) {
    if (Scaled) w = __ldg(reinterpret_cast<const float4*>(p.w_scale + n));
    if (p.bias) bias = load_quad(p.bias, p.bias_dtype, n, 4, true);
    if (p.out_scale) {
      const float* const s = p.out_scale + n * p.out_step;
      scale = make_float4(__ldg(s), __ldg(s + p.out_step), __ldg(s + 2 * p.out_step), __ldg(s + 3 * p.out_step));
      inverse = make_float4(__frcp_rn(scale.x), __frcp_rn(scale.y), __frcp_rn(scale.z), __frcp_rn(scale.w));
    }
  }
  arrived();
#pragma unroll 1
  for (int turn = 0; j < own; j += kAtOnce, ++turn) {
    float x = xs[0];
#pragma unroll
    for (int i = 1; i < kHeld; ++i) x = turn < 4 * i ? x : xs[i];
    if (Scaled) x = __shfl_sync(~0u, x, turn % 4 * 8 + token);
    Sum sum[4] = {};
#pragma unroll 2
    for (int s = 0; s < parts; ++s)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        sum[i] += value_of<Sum>(load_word(from + s * kCellBytes + i / 2 * 128 + i % 2 * next));
    from += kAtOnce * parts * kCellBytes;
    const bool stores = exists && at < p.M;
    const long long to = static_cast<long long>(at) * p.O + n;
    float4 v = make_float4(static_cast<float>(sum[0]), static_cast<float>(sum[1]), static_cast<float>(sum[2]),
                           static_cast<float>(sum[3]));
    if (Scaled) v = each(times, each(times, v, make_float4(x, x, x, x)), w);
    v = each(add, v, bias);
    if (p.residual) v = each(add, v, to_floats(residual, p.residual_dtype));
    at += kFold * splits * 8;
    if (j + kAtOnce < own) ask();
    if (!stores) continue;
    // y is larger than what is read, which is read again: it leaves L2 first
    if (p.y_dtype == QUAMBA_F32) {
      __stcs(reinterpret_cast<float4*>(static_cast<float*>(p.y) + to), v);
    } else if (p.y_dtype == QUAMBA_I8) {
      const unsigned low = __byte_perm(to_code(v.x, scale.x, inverse.x), to_code(v.y, scale.y, inverse.y), 0x0040);
      const unsigned high = __byte_perm(to_code(v.z, scale.z, inverse.z), to_code(v.w, scale.w, inverse.w), 0x0040);
      __stcs(reinterpret_cast<unsigned*>(static_cast<signed char*>(p.y) + to), __byte_perm(low, high, 0x5410));
    } else {
      const bool half = p.y_dtype == QUAMBA_F16;
      __stcs(reinterpret_cast<uint2*>(static_cast<unsigned short*>(p.y) + to),
             make_uint2(pack_pair(v.x, v.y, half), pack_pair(v.z, v.w, half)));
    }
  }
}

}  // namespace quamba::few
