// A linear over few tokens (M = 1..256), which is bound by reading its weights once.
//
// Weights are the A operand of mma.sync (16 output channels), tokens the B operand (8 a tile). A sum may take its
// terms in any order, so the order along K is chosen to suit the loads: in one step lane t of the four that share a row
// owns 16 consecutive bytes of that row (16 int8 or 32 int4 weights) and reads them with one instruction from the
// stored layout; the 64 bytes of the four lanes are 64 or 128 weights. x is laid out in shared memory so that each
// lane finds the same stretch of K in 16-byte pieces.
//
// Weights wait in a ring: one chunk of `D` steps in registers, or RING chunks in shared memory, where each thread reads
// back what it copied itself. The ring is filled before the kernel waits for its predecessor (weights are constants of
// the model, x is not), and is refilled across tiles, so that loads are always in flight. Warps that share rows add their sums through shared memory, in a fixed order; so do the blocks of
// a cluster that share K.
//
// int4 weights take their group's scale in one of two ways. Where every step lies within a group, the step's own sum is
// scaled (exact). Otherwise (FOLD) the weight itself is: as int8 code q * m for w4a8 (exact), or rounded once to the
// type of x for w4a16.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

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

// Reads the weights of step `step`, the d-th from where `rows` stands, if it is below `last`. A lane beyond the end of
// K, at `lane_last`, reads nothing and keeps what it had, which meets zeros of x.
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

// Through L2: L1 may hold what a buffer of activations had before.
__device__ __forceinline__ float load_float(const void* p, int64_t i, int dtype) {
  if (dtype == QUAMBA_F32) return __ldcg(static_cast<const float*>(p) + i);
  if (dtype == QUAMBA_F16) return __half2float(__ldcg(static_cast<const __half*>(p) + i));
  return __bfloat162float(__ldcg(static_cast<const __nv_bfloat16*>(p) + i));
}

__device__ __forceinline__ void store_float(void* p, int64_t i, int dtype, float v) {
  if (dtype == QUAMBA_F32)
    static_cast<float*>(p)[i] = v;
  else if (dtype == QUAMBA_F16)
    static_cast<__half*>(p)[i] = __float2half_rn(v);
  else
    static_cast<__nv_bfloat16*>(p)[i] = __float2bfloat16_rn(v);
}

// What the epilogue needs of one row of weights: constants, so they may be read before the dependency wait.
struct Channel {
  float scale, bias, out;
};

template <Kind KIND>
__device__ __forceinline__ Channel channel_at(const QuambaLinear& q, int row) {
  Channel c{1.0f, -0.0f, 1.0f};  // adding -0 changes nothing, not even a sign
  if (row >= q.O) return c;
  if (kInteger<KIND>) c.scale = static_cast<const float*>(q.w_scale)[row];
  if (q.bias) c.bias = load_float(q.bias, row, q.bias_dtype);
  if (q.out_scale) c.out = q.out_scale[q.out_scale_count > 1 ? row : 0];
  return c;
}

// y = acc * x_scale * w_scale + bias + residual, each rounded by itself, then int8 or a cast.
template <Kind KIND>
__device__ __forceinline__ void finish(const QuambaLinear& q, const Channel& c, float v, float x_scale, float residual,
                                       int64_t at) {
  if (kInteger<KIND>) v = __fmul_rn(__fmul_rn(v, x_scale), c.scale);
  v = __fadd_rn(__fadd_rn(v, c.bias), residual);
  if (q.out_scale) {
    v = fminf(fmaxf(rintf(__fdiv_rn(v, c.out)), -127.0f), 127.0f);
    static_cast<int8_t*>(q.y)[at] = static_cast<int8_t>(v);
  } else {
    store_float(q.y, at, q.y_dtype, v);
  }
}

// Partial sums, always added in the same order.
template <typename Acc>
__device__ __forceinline__ Acc sum(const uint32_t* from, int count, int by) {
  const Acc* p = reinterpret_cast<const Acc*>(from);
  Acc total = p[0];
#pragma unroll 4
  for (int i = 1; i < count; ++i) total += p[i * by];
  return total;
}

__device__ __forceinline__ uint32_t bits_of(int v) { return static_cast<uint32_t>(v); }
__device__ __forceinline__ uint32_t bits_of(float v) { return __float_as_uint(v); }

template <Kind KIND, int R, int NT, int RING>
struct Config {
  static constexpr int kDepth = NT == 8 ? 2 : 4;
  // warps of a block, and blocks of that size on a multiprocessor, which leave 128, 168 or 255 registers
  static constexpr bool kSlim = NT == 1 || (NT == 2 && KIND == Kind::kW8A8);
  static constexpr int kWarps = R == 2 && kSlim ? 6 : kMaxWarps, kBlocks = kSlim ? 2 : 1;
  // Without branches between steps the compiler starts the loads of one beside the arithmetic of the next; with many
  // tokens it would run out of registers.
  static constexpr bool kStraight = NT <= 2 && !(KIND == Kind::kW4BF16 && R == 2);
};

template <Kind KIND, bool FOLD, int R, int NT, int RING>
__global__ void __launch_bounds__(32 * Config<KIND, R, NT, RING>::kWarps, Config<KIND, R, NT, RING>::kBlocks)
    linear_skinny(const __grid_constant__ Params p) {
  using Acc = std::conditional_t<kInteger<KIND>, int, float>;
  static_assert(R == 1 || R == 2, "the rows of a block are a power of two and divide its threads");
  constexpr int D = Config<KIND, R, NT, RING>::kDepth;
  constexpr int kPieces = kXPieces<KIND>;
  extern __shared__ __align__(16) char shared[];
  const Plan& plan = p.plan;
  const QuambaLinear& q = p.q;
  launch_dependents();

  const int lane = threadIdx.x % 32, warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
  const int wm = warp & (plan.wm - 1), wk = warp >> p.wm_shift, split = blockIdx.x;
  const int m0 = blockIdx.y * (8 * NT), tokens = min(q.M - m0, 8 * NT);
  int tile = blockIdx.z;
  const int first = split * plan.split_steps + wk * plan.warp_steps;
  const int last = min(min(first + plan.warp_steps, (split + 1) * plan.split_steps), plan.steps);
  const int lane_last = (p.row_bytes - lane % 4 * 16 + kStepBytes - 1) >> 6;  // steps of 64 bytes
  const int rows = 1 << p.rows_shift, warp_row = 16 * R * wm;

  Rows<R> next = rows_at<KIND, R>(p, tile * rows + warp_row, first, lane);
  Step<R> ring[D];
  // where the next chunk of weights to be copied stands
  Rows<R> feed = next;
  int feed_tile = tile, feed_step = first;
  char* const waiting = shared + kHeaderBytes + threadIdx.x * 16;
  const int piece_bytes = blockDim.x * 16;
  const auto copy_weights = [&](int chunk, int d) {
    const bool inside = feed_tile < plan.tiles && feed_step + d < min(last, lane_last);
#pragma unroll
    for (int r = 0; r < R; ++r)
#pragma unroll
      for (int h = 0; h < 2; ++h)
        copy_weights_async(waiting + (((chunk * D + d) * R + r) * 2 + h) * piece_bytes,
                           feed.w[r][h] + d * kStepBytes, inside);
  };
  const auto end_copies = [&] {
    copy_async_commit();
    feed_step += D;
#pragma unroll
    for (int r = 0; r < R; ++r) feed.w[r][0] += D * kStepBytes, feed.w[r][1] += D * kStepBytes;
    if (feed_step >= first + plan.chunks * D) {
      feed_tile += plan.groups, feed_step = first;
      feed = rows_at<KIND, R>(p, feed_tile * rows + warp_row, first, lane);
    }
  };
  if constexpr (RING > 0) {
#pragma unroll 1
    for (int c = 0; c < RING; ++c) {
#pragma unroll
      for (int d = 0; d < D; ++d) copy_weights(c, d);
      end_copies();
    }
  } else {
#pragma unroll
    for (int d = 0; d < D; ++d) load_step<R>(ring[d], next, d, first + d < min(last, lane_last));
  }
#pragma unroll
  for (int d = 0; d < D; ++d) load_scales<KIND, FOLD, R>(ring[d], p, next, first + d, first + d < last, lane);

  // in the epilogue a thread keeps to one row, and takes every `stride`-th token
  const int row = threadIdx.x & (rows - 1), token0 = threadIdx.x >> p.rows_shift, stride = 2 * plan.wk / R;
  Channel channel = channel_at<KIND>(q, tile * rows + row);
  auto* const mailbox = reinterpret_cast<uint64_t*>(shared);
  if (plan.splits > 1) {
    if (threadIdx.x == 0) mailbox_init(mailbox);
    cluster_arrive();
  }

  wait_for_previous_kernel();
  float* const x_scales = reinterpret_cast<float*>(shared + kMailboxBytes);
  if (kInteger<KIND>)
    for (int i = threadIdx.x; i < tokens; i += blockDim.x)
      x_scales[i] = __ldcg(q.x_scale + (q.x_scale_count > 1 ? m0 + i : 0));
  const int plane = NT > 1 ? 32 * NT : plan.x_slots * 4, step_pieces = kPieces * plane;
  char* const stages = shared + kHeaderBytes + piece_bytes * (2 * R * D * RING);
  const auto copy_chunk = [&](int slot, int c) {
    copy_x<KIND, D>(stages + slot * plan.stage_bytes + wk * D * step_pieces * 16, p, m0, tokens, first + c * D, wm, lane);
  };
  int ahead = 0, ahead_left = plan.chunks * ((plan.tiles - tile + plan.groups - 1) / plan.groups);
  const auto copy_ahead = [&](int stage) {
    if (ahead_left-- > 0) copy_chunk(stage, ahead);
    copy_async_commit();
    if (++ahead == plan.chunks) ahead = 0;
  };
  if constexpr (RING > 0) {
    load_x<KIND, D>(stages, p, m0, tokens, first, wk, wm, lane);
    __syncthreads();
  } else if (plan.resident) {
    for (int c = 0; c < plan.chunks; ++c) copy_chunk(c, c);
    copy_async_wait();
    __syncthreads();
  } else {
    for (int c = 0; c < kStages - 1; ++c) copy_ahead(c);
  }

  // columns of absent tokens are dropped, so any data does for them
  const int slot = NT > 1 ? lane : min(lane / 4, tokens - 1) * 4 + lane % 4;
  uint32_t* const sums = reinterpret_cast<uint32_t*>(stages + (plan.resident ? plan.chunks : kStages) * plan.stage_bytes);
  const int column = rows + 4, slice = tokens * column;  // padded: the lanes of a fragment meet in no bank
  int turn = 0, parity = 0, waiting_chunk = 0;

  while (true) {
    const int following = tile + plan.groups;
    const bool more = following < plan.tiles;
    Acc acc[R][NT][4] = {};
    for (int c = 0; c < plan.chunks; ++c) {
      const bool final = c + 1 == plan.chunks;
      const int begin = first + c * D;
      int refill = begin + D, refill_last = last;
      if (final) {
        next = rows_at<KIND, R>(p, following * rows + warp_row, first, lane);
        refill = first;
        if (!more) refill_last = 0;
      } else {
#pragma unroll
        for (int r = 0; r < R; ++r) next.w[r][0] += D * kStepBytes, next.w[r][1] += D * kStepBytes;
      }
      int stage = c;
      if (RING == 0 && !plan.resident) {
        copy_async_wait_but<kStages - 2>();
        __syncthreads();  // chunk c has come, and nobody reads the one before it
        stage = turn;
        copy_ahead((turn + kStages - 1) % kStages);
        turn = (turn + 1) % kStages;
      }
      if constexpr (RING > 0) copy_async_wait_but<RING - 1>();
      const uint4* x = reinterpret_cast<const uint4*>(stages + stage * plan.stage_bytes) + wk * D * step_pieces;
      const auto step = [&](int d, bool present) {
        if constexpr (RING > 0) {
#pragma unroll
          for (int r = 0; r < R; ++r)
#pragma unroll
            for (int h = 0; h < 2; ++h)
              ring[d].w[r][h] = *reinterpret_cast<const uint4*>(
                  waiting + (((waiting_chunk * D + d) * R + r) * 2 + h) * piece_bytes);
        }
        if (present) multiply<KIND, FOLD, R, NT>(acc, ring[d], x + d * step_pieces, slot, plane);
        if constexpr (RING > 0)
          copy_weights(waiting_chunk, d);
        else
          load_step<R>(ring[d], next, d, refill + d < min(refill_last, lane_last));
        load_scales<KIND, FOLD, R>(ring[d], p, next, refill + d, refill + d < refill_last, lane);
      };
      if (Config<KIND, R, NT, RING>::kStraight && begin + D <= last) {
#pragma unroll
        for (int d = 0; d < D; ++d) step(d, true);
      } else {
#pragma unroll
        for (int d = 0; d < D; ++d) step(d, begin + d < last);
      }
      if constexpr (RING > 0) {
        end_copies();
        waiting_chunk = (waiting_chunk + 1) % RING;
      }
    }

#pragma unroll
    for (int r = 0; r < R; ++r)
#pragma unroll
      for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const int token = n * 8 + lane % 4 * 2 + c % 2;
          const int at = wk * slice + token * column + warp_row + 16 * r + lane / 4 + c / 2 * 8;
          if (token < tokens) reinterpret_cast<Acc*>(sums)[at] = acc[r][n][c];
        }
    __syncthreads();
    // with splits, token n is finished by block n % splits, which gets the sums of all as [split][n / splits]
    const uint32_t* from = sums + row;
    int count = plan.wk, by = slice, leap = 1, offset = 0;
    if (plan.splits > 1) {
      uint32_t* const gathered = sums + plan.wk * slice;
      const int share = (tokens + plan.splits - 1) / plan.splits;
      cluster_wait();
      for (int token = token0; token < tokens; token += stride)
        send(gathered + (split * share + token / plan.splits) * column + row, mailbox, token % plan.splits,
             bits_of(sum<Acc>(from + token * column, count, by)));
      if (split < tokens) {
        const int own = (tokens - split + plan.splits - 1) / plan.splits;
        if (threadIdx.x == 0) mailbox_expect(mailbox, own * plan.splits * rows * 4);
        mailbox_wait(mailbox, parity);
        parity ^= 1;
      }
      from = gathered + row, count = plan.splits, by = share * column, leap = plan.splits, offset = split;
    }
    const int channel_row = tile * rows + row;
    constexpr int kBatch = 4;  // residuals are asked for together
    for (int i0 = token0; i0 * leap + offset < tokens && channel_row < q.O; i0 += kBatch * stride) {
      float residual[kBatch];
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        const int token = (i0 + u * stride) * leap + offset;
        residual[u] = q.residual && token < tokens
                          ? load_float(q.residual, static_cast<int64_t>(m0 + token) * q.O + channel_row, q.residual_dtype)
                          : -0.0f;
      }
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        const int i = i0 + u * stride, token = i * leap + offset;
        if (token >= tokens) break;
        finish<KIND>(q, channel, static_cast<float>(sum<Acc>(from + i * column, count, by)),
                     kInteger<KIND> ? x_scales[token] : 1.0f, residual[u],
                     static_cast<int64_t>(m0 + token) * q.O + channel_row);
      }
    }
    if (!more) break;
    tile = following;
    channel = channel_at<KIND>(q, tile * rows + row);
    __syncthreads();  // the sums have been read
    if (plan.splits > 1) cluster_arrive();
  }
}

}  // namespace quamba::skinny
