// The end of a tile of gemm_w4_sm90.cuh. 16-bit results without a residual and fp32 ones, with an fp32 residual or
// without, leave by TMA from the ring's own stages: the loading warp passes on stages as for further steps, with the
// residual in them, the warp groups put results in its place, and a warp of their own stores them and frees the stages
// while the groups multiply the next tile. Others cross shared memory 16 tokens at a time.
#pragma once

#include "cute/tensor.hpp"

#include "finish.cuh"
#include "operand_w4.cuh"

namespace quamba::w4 {

constexpr int kPitch = 68;  // floats between tokens in the buffer of what does not leave by TMA: stores meet all banks
constexpr int kCellRow = 128;  // bytes of a token in a cell, whose 16-byte pieces are exchanged by token

// Cells: TileM tokens by 128 bytes of channels, in the order of the channels of both groups. 0: the tile's results
// cross shared memory instead.
__host__ __device__ inline int cells_of(const Finish& p) {
  if (p.y_dtype == QUAMBA_F32) return !p.residual || p.residual_dtype == QUAMBA_F32 ? 4 : 0;
  return p.y_dtype != QUAMBA_I8 && !p.residual ? 2 : 0;
}

// Asks for a step's share of the tile's residual in L2; the whole of it would keep the step's loads waiting.
template <int TileM, class W>
__device__ __forceinline__ void ask_ahead(const Finish& p, const W& at) {
  int size = p.residual_dtype == QUAMBA_F32 ? 4 : 2, bytes = min(kTileO, p.O - at.column) * size;
  int until = min(TileM * (at.step + 1) / at.steps, p.M - at.row);
  for (int m = TileM * at.step / at.steps; m < until; ++m) {
    const char* from =
        static_cast<const char*>(p.residual) + (static_cast<long long>(at.row + m) * p.O + at.column) * size;
    prefetch_bulk(from, bytes);
  }
}

// Factors of the two channels of a lane, 16 w + g and 8 more.
struct Channels {
  float scale[2], bias[2];

  template <bool Scaled>
  __device__ __forceinline__ static Channels of(const Finish& p, int channel) {
    Channels c;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int n = min(channel + 8 * r, p.O - 1);
      c.scale[r] = Scaled ? __ldg(p.w_scale + n) : 1.f;
      c.bias[r] = p.bias ? load_one(p.bias, p.bias_dtype, n) : 0.f;
    }
    return c;
  }
};

// An accumulator as fp32, made here and not before a loop around it, where all of them would need registers twice.
__device__ __forceinline__ float here(float v) {
  asm volatile("" : "+f"(v));
  return v;
}
__device__ __forceinline__ float here(int v) {
  asm volatile("" : "+r"(v));
  return static_cast<float>(v);
}

template <bool Scaled>
__device__ __forceinline__ float finished(float v, float x_scale, const Channels& c, int r) {
  if (Scaled) v = __fmul_rn(__fmul_rn(v, x_scale), c.scale[r]);
  return __fadd_rn(v, c.bias[r]);
}

// A group's 64 channels as 16-bit values in its cell. x_scale: fp32 of the tile's tokens in shared memory.
template <int TileM, bool Scaled, class Acc>
__device__ __forceinline__ void fill_halves(Acc& acc, unsigned cell, const float* x_scale, const Channels& c,
                                            bool half) {
  const int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32, t = lane % 4;
  // stmatrix: lane i gives the address of row i % 8 of matrix i / 8; matrices are channels g, g + 8 by two times
  // eight tokens
  const int piece = 2 * warp + lane / 8 % 2, row = lane / 16 * 8 + lane % 8;
  const unsigned to = cell + row * kCellRow + ((piece ^ (row & 7)) << 4);
#pragma unroll
  for (int b = 0; b < TileM / 8; b += 2) {
    unsigned word[2][2];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      float2 scale = make_float2(1.f, 1.f);
      if (Scaled) scale = *reinterpret_cast<const float2*>(x_scale + 8 * (b + k) + 2 * t);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float low = here(acc(cute::make_coord(0, r, b + k), 0, 0));
        const float high = here(acc(cute::make_coord(1, r, b + k), 0, 0));
        word[k][r] =
            pack_pair(finished<Scaled>(low, scale.x, c, r), finished<Scaled>(high, scale.y, c, r), half);
      }
    }
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to + b * 8 * kCellRow),
                 "r"(word[0][0]), "r"(word[0][1]), "r"(word[1][0]), "r"(word[1][1])
                 : "memory");
  }
}

// A warp's 16 channels as fp32 in its cell of 32, added to what lies there if there is a residual.
template <int TileM, bool Scaled, class Acc>
__device__ __forceinline__ void fill_floats(Acc& acc, char* cell, const float* x_scale, const Channels& c,
                                            bool residual) {
  const int warp = threadIdx.x % 128 / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const int piece = warp % 2 * 4 + g / 4;
#pragma unroll
  for (int b = 0; b < TileM / 8; ++b) {
    float2 scale = make_float2(1.f, 1.f);
    if (Scaled) scale = *reinterpret_cast<const float2*>(x_scale + 8 * b + 2 * t);
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float* at = reinterpret_cast<float*>(cell + (8 * b + 2 * t + i) * kCellRow +
                                             (((piece + 2 * r) ^ (2 * t + i)) << 4)) + g % 4;
        float v = finished<Scaled>(here(acc(cute::make_coord(i, r, b), 0, 0)), i ? scale.y : scale.x, c, r);
        if (residual) v = __fadd_rn(v, *at);
        *at = v;
      }
  }
}

// A group's 64 channels by TileM tokens through its buffer to y, of any types.
template <int TileM, bool Scaled, class Acc>
__device__ __forceinline__ void finish_tokens(const Finish& p, Acc& acc, char* buffer, int group, int token,
                                              int channel) {
  const int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4;
  using Value = typename Acc::value_type;
  Value* values = reinterpret_cast<Value*>(buffer);
  Value* to = values + 2 * t * kPitch + 16 * warp + g;
  const Value* from = values + (warp / 2 * 8 + g) * kPitch + warp % 2 * 32 + 2 * t;
#pragma unroll 1
  for (int c = 0; c < TileM / 16 && token + 16 * c < p.M; ++c) {
    if (c) sync_threads(2 + group, 128);
#pragma unroll
    for (int q = 0; q < TileM / 16; ++q)
      if (q == c) {  // registers have no index; the code of finish_tile is too long to repeat
#pragma unroll
        for (int i = 0; i < 8; ++i)
          to[(i / 4 * 8 + i % 2) * kPitch + i / 2 % 2 * 8] =
            acc(cute::make_coord(i % 2, i / 2 % 2, 2 * q + i / 4), 0, 0);
      }
    sync_threads(2 + group, 128);
    const int row[1] = {token + 16 * c + warp / 2 * 8 + g};
    finish_tile<1, kGroup, Scaled>(p, row, channel + warp % 2 * 32, [&](int, int b) {
      return make_float2(static_cast<float>(from[8 * b]), static_cast<float>(from[8 * b + 1]));
    });
  }
  sync_threads(2 + group, 128);  // before the next tile's results
}

}  // namespace quamba::w4
