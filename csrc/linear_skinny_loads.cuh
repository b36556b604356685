// How weights, group scales and x of the few-token linears reach registers and shared memory. A lane's place in a step,
// and what order along K that means, are said in linear_skinny.cuh.
#pragma once

#include <cstdint>

#include "linear.h"
#include "linear_skinny_plan.h"
#include "mma.cuh"

namespace quamba::skinny {

enum class Kind { kW8A8, kW4A8, kW4F16, kW4BF16 };

template <Kind KIND>
constexpr bool kInteger = KIND == Kind::kW8A8 || KIND == Kind::kW4A8;
// 16-byte pieces of x that a lane needs in a step
template <Kind KIND>
constexpr int kXPieces = KIND == Kind::kW8A8 ? 1 : KIND == Kind::kW4A8 ? 2 : 4;

constexpr int kMagicBits = 22, kMaxK = 32768;  // with 1,024 blocks of 32 weights the division by S / 32 is exact

struct Params {
  QuambaLinear q;
  Plan plan;
  int row_bytes, scale_columns;  // of w; of w_scale or w_multiplier
  unsigned group_magic;          // ceil(2^kMagicBits / (S / 32)): group = k / 32 * magic >> kMagicBits
  int wm_shift, rows_shift;      // log2 of warps along the rows and of rows a block
};

template <int R>
struct Step {
  uint4 w[R][2];       // of row lane/4 and row lane/4 + 8 of each strip
  uint32_t scale[R][2];
};

template <int R>
struct Rows {
  const char* w[R][2];   // the lane's bytes in the next step to be read
  uint32_t scale[R][2];  // first element of the row's group scales
};

template <Kind KIND, int R>
__device__ __forceinline__ Rows<R> rows_at(const Params& p, int row0, int step, int lane) {
  Rows<R> rows;
#pragma unroll
  for (int r = 0; r < R; ++r)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      // rows past the end read the last ones; their sums are dropped
      const int row = min(row0 + 16 * r + 8 * h, p.q.O - 8) + lane / 4;
      rows.w[r][h] = static_cast<const char*>(p.q.w) + static_cast<int64_t>(row) * p.row_bytes +
                     (step * kStepBytes + lane % 4 * 16);
      rows.scale[r][h] = KIND == Kind::kW8A8 ? 0 : static_cast<uint32_t>(row) * p.scale_columns;
    }
  return rows;
}

// Reads the weights of the d-th step from where `rows` stands. A lane that is not inside (its row or its share of the
// steps has ended) reads nothing and keeps what it had, which meets zeros of x or no product.
template <int R>
__device__ __forceinline__ void load_step(Step<R>& s, const Rows<R>& rows, int d, bool inside) {
#pragma unroll
  for (int r = 0; r < R; ++r)
#pragma unroll
    for (int h = 0; h < 2; ++h) load_weights(s.w[r][h], rows.w[r][h] + d * kStepBytes, inside);
}

// Reads the group scales of a step.
template <Kind KIND, bool FOLD, int R>
__device__ __forceinline__ void load_scales(Step<R>& s, const Params& p, const Rows<R>& rows, int step, bool inside,
                                            int lane) {
  if constexpr (KIND != Kind::kW8A8) {
    const unsigned block = FOLD ? min(step * 4 + lane % 4, p.q.K / 32 - 1) : step * 4;  // of 32 weights
    // not __umulhi: ptxas 13.0 took two of its sums with different addends for one (tokens > 32, the fourth row)
    const unsigned group = block * p.group_magic >> kMagicBits;
#pragma unroll
    for (int r = 0; r < R; ++r)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const uint32_t at = rows.scale[r][h] + group;
        if constexpr (KIND == Kind::kW4A8)
          load_constant(s.scale[r][h], static_cast<const uint8_t*>(p.q.w_multiplier) + at, inside);
        else
          load_constant(s.scale[r][h], static_cast<const uint16_t*>(p.q.w_scale) + at, inside);
      }
  }
}

// Copies D steps of x, from `step` on, into shared memory, for all warps with this share of K: this warp takes every
// wm-th token. The layout is [D][piece][slot], where the slot of token n and lane t is n * 4 + t, shuffled within eight
// by the piece, so that neither the copies (whole rows of x) nor the reads (a tile of tokens) meet in a bank.
template <Kind KIND, int D>
__device__ __forceinline__ void copy_x(char* to, const Params& p, int m0, int tokens, int step, int wm, int lane) {
  constexpr int kPieces = kXPieces<KIND>, kRow = 4 * kPieces * D, kLanes = kRow < 32 ? kRow : 32;
  const int x_row_bytes = p.q.K * (kInteger<KIND> ? 1 : 2);
  const char* x = static_cast<const char*>(p.q.x) + static_cast<int64_t>(m0) * x_row_bytes;
#pragma unroll 2
  for (int token = wm * (32 / kLanes) + lane / kLanes; token < tokens; token += p.plan.wm * (32 / kLanes)) {
#pragma unroll
    for (int j = 0; j < kRow / kLanes; ++j) {
      const int at = j * kLanes + lane % kLanes;
      const int d = at / (4 * kPieces), t = at / kPieces % 4, piece = at % kPieces;
      const int from = (step * 4 * kPieces + at) * 16;
      const int slot = (token * 4 + t) ^ (piece * (8 / kPieces) % 8);
      const bool inside = from < x_row_bytes;
      copy_async(to + ((d * kPieces + piece) * p.plan.x_slots * 4 + slot) * 16,
                 x + (inside ? static_cast<int64_t>(token) * x_row_bytes + from : 0), inside);
    }
  }
}

// The same for all chunks at once, through registers: the ring's copies are on their way and must not be waited for.
template <Kind KIND, int D>
__device__ __forceinline__ void load_x(char* stages, const Params& p, int m0, int tokens, int step, int wk, int wm,
                                       int lane) {
  constexpr int kPieces = kXPieces<KIND>, kRow = 4 * kPieces * D, kBatch = 8;
  const int x_row_bytes = p.q.K * (kInteger<KIND> ? 1 : 2), token_pieces = p.plan.chunks * kRow;
  const char* x = static_cast<const char*>(p.q.x) + static_cast<int64_t>(m0) * x_row_bytes;
  const int count = tokens * token_pieces, stride = p.plan.wm * 32;
  for (int i0 = wm * 32 + lane; i0 < count; i0 += kBatch * stride) {
    uint4 v[kBatch];
    char* to[kBatch];
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      const int i = min(i0 + u * stride, count - 1);
      const int token = i / token_pieces, at = i - token * token_pieces, c = at / kRow, in_chunk = at % kRow;
      const int d = in_chunk / (4 * kPieces), t = in_chunk / kPieces % 4, piece = in_chunk % kPieces;
      const int from = (step * 4 * kPieces + at) * 16, slot = (token * 4 + t) ^ (piece * (8 / kPieces) % 8);
      to[u] = stages + c * p.plan.stage_bytes + (((wk * D + d) * kPieces + piece) * p.plan.x_slots * 4 + slot) * 16;
      v[u] = from < x_row_bytes ? load_through_l2(x + static_cast<int64_t>(token) * x_row_bytes + from) : uint4{};
    }
#pragma unroll
    for (int u = 0; u < kBatch; ++u)
      if (i0 + u * stride < count) *reinterpret_cast<uint4*>(to[u]) = v[u];
  }
}

}  // namespace quamba::skinny
