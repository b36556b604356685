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
// the model, x is not), and is refilled across tiles, so that loads are always in flight. Warps that share rows add
// their sums through shared memory, in a fixed order; so do the blocks of a cluster that share K.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "linear_skinny_epilogue.cuh"
#include "linear_skinny_loads.cuh"
#include "linear_skinny_products.cuh"

namespace quamba::skinny {

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
    copy_x<KIND, D>(stages + slot * plan.stage_bytes + wk * D * step_pieces * 16, p, m0, tokens, first + c * D, wm,
                    lane);
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
  uint32_t* const sums =
      reinterpret_cast<uint32_t*>(stages + (plan.resident ? plan.chunks : kStages) * plan.stage_bytes);
  const int column = rows + 4, slice = tokens * column;  // padded: the lanes of a fragment meet in no bank
  int turn = 0, parity = 0, waiting_chunk = 0;

  while (true) {
    const int following = tile + plan.groups;
    const bool more = following < plan.tiles;
    // with splits, token n is finished by block n % splits
    const int leap = plan.splits, offset = plan.splits > 1 ? split : 0, channel_row = tile * rows + row;
    const auto residual_of = [&](int i) {
      const int token = i * leap + offset;
      return q.residual && token < tokens && channel_row < q.O
                 ? load_float(q.residual, static_cast<int64_t>(m0 + token) * q.O + channel_row, q.residual_dtype)
                 : -0.0f;
    };
    float early = -0.0f;  // of few tokens, what the thread's first result is added to is asked for before the products
    if constexpr (NT == 1) early = residual_of(token0);
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
    // with splits, the block that finishes a token gets the sums of all as [split][n / splits]
    const uint32_t* from = sums + row;
    int count = plan.wk, by = slice;
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
      from = gathered + row, count = plan.splits, by = share * column;
    }
    constexpr int kBatch = 4;  // residuals are asked for together
    for (int i0 = token0; i0 * leap + offset < tokens && channel_row < q.O; i0 += kBatch * stride) {
      float residual[kBatch];
#pragma unroll
      for (int u = 0; u < kBatch; ++u)
        residual[u] = NT == 1 && u == 0 && i0 == token0 ? early : residual_of(i0 + u * stride);
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
