// y = x w^T for few tokens on Hopper, where the bytes of the weights decide: packed int4 weights of all types
// of x (operand_w4.cuh), or int8 weights and x.
//
// A block takes 128 channels by 8, 16, 32, 64 or 128 tokens, or 64 channels by 8 or 16, and a share of the columns; the
// blocks of a cluster share a tile along K. Two or three blocks fit a multiprocessor, of one kernel or of two that
// follow each other: weights are constants of the model, so the next kernel has its first tiles of them on the way
// before the previous one is done.
//
// What is computed is y^T: weights are the operand A of wgmma, from registers once unpacked, or from shared memory. At
// the end the blocks of a cluster scatter their sums: a cell of 32 channels by 8 tokens belongs to one of them, which
// adds what all have sent in the order of their ranks and finishes it, so results do not depend on timing.
#pragma once

#include <type_traits>

#include "cute/tensor.hpp"

#include "column_order.cuh"
#include "linear_few_finish.cuh"
#include "linear_few_grouped.cuh"
#include "linear_few_layout.cuh"
#include "mma.cuh"
#include "operand_w4.cuh"

namespace quamba::few {

using namespace cute;
using w4::Operand;
using w4::Weights;

constexpr int kThreads = 288, kMathWarps = 8;

// A word of the scales, which arrives at the barrier together with what else this thread has copied.
__device__ __forceinline__ void copy_word(unsigned to, const void* p) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(p) : "memory");
}

__device__ __forceinline__ void arrive_copied(unsigned barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

// 16 bytes to a place in a block of the cluster, counted by its barrier, both as mapped.
__device__ __forceinline__ void send_quad(unsigned to, unsigned barrier, const unsigned (&v)[4]) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(to),
      "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3]), "r"(barrier)
      : "memory");
}

__device__ __forceinline__ void store_word(unsigned to, int v) {
  asm volatile("st.shared.s32 [%0], %1;" ::"r"(to), "r"(v) : "memory");
}

__device__ __forceinline__ unsigned mapped(unsigned address, int rank) {
  unsigned there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  return there;
}

__device__ __forceinline__ unsigned bits(float v) { return __float_as_uint(v); }
__device__ __forceinline__ unsigned bits(int v) { return static_cast<unsigned>(v); }

// Where the word that holds the scale of a channel and a column lies.
template <class Raw>
struct ScaleOf {
  const char* scale;
  int row;  // of the first scale of the channel, in elements

  __device__ ScaleOf(const Weights& w, int channel)
      : scale(static_cast<const char*>(w.scale)), row(min(channel, w.O - 1) * w.groups) {}
  __device__ __forceinline__ const void* word(const Weights& w, int column) const {
    return scale + ((row + w.group(column)) * static_cast<long long>(sizeof(Raw)) & ~3ll);
  }
};

template <class Element, bool Packed, int TileM, Form kForm>
__global__ void __launch_bounds__(kThreads, Layout<Element, Packed, TileM, kForm>::kBlocks)
    linear_few(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap w_map,
               const __grid_constant__ Weights w, const __grid_constant__ Finish finish,
               const __grid_constant__ Cut cut) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using L = Layout<Element, Packed, TileM, kForm>;
  using Op = Operand<Element>;
  using Sum = typename Op::Accumulator;
  extern __shared__ char raw[];
  const int stages = cut.stages;
  char* smem = raw + (-shared_address(raw) & 1023);
  char *x_tiles = smem, *w_tiles = smem + stages * L::kXBytes;
  const unsigned rest = shared_address(w_tiles + stages * L::kWBytes);
  const bool overlaid = L::kOverlaid || L::kMayOverlay && cut.overlaid;
  const unsigned mail = overlaid ? shared_address(smem) : rest, scales = overlaid ? rest : mail + cut.mail;
  const unsigned mailbox = scales + stages * cut.scales, full = mailbox + 8, empty = full + 8 * stages;
  const unsigned x_full = L::kOrdered ? empty + 8 * stages : full, ordered = x_full + 8 * stages;
  const unsigned summed = ordered + 8 * stages, sums = summed + 8;  // of each token's x over the columns of the block
  launch_dependents();

  const int splits = gridDim.x, rank = blockIdx.x, lane = threadIdx.x % 32;
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), steps = (w.K + L::kColumns - 1) / L::kColumns;
  const int first_step = cut.split(rank * steps), last_step = cut.split((rank + 1) * steps);
  const int column = blockIdx.z * L::kChannels, row = blockIdx.y * TileM;
  // cells of tokens that exist, and those of this block
  constexpr int kWide = L::kChannels / 32;
  const int cells = min((w.M - row + 7) / 8, TileM / 8) * kWide, own = cut.split(cells - rank + splits - 1);

  auto load_w = [&](int stage, int step) {
    arrive_expecting(full + 8 * stage, L::kWBytes + (L::kOrdered ? 0 : L::kXBytes));
#pragma unroll
    for (int f = 0; f < L::kFold; ++f)
      load_box(shared_address(w_tiles + stage * L::kWBytes + f * (L::kWBytes / L::kFold)), &w_map, full + 8 * stage,
               (step * L::kFold + f) * (Packed ? kTileK / 8 : kTileK), column);
  };
  auto load_x = [&](int stage, int step) {
    if (L::kOrdered) arrive_expecting(x_full + 8 * stage, L::kXBytes);
#pragma unroll
    for (int b = 0; b < L::kColumns / Op::kBox; ++b)
      load_box(shared_address(x_tiles + stage * L::kXBytes + b * TileM * 128), &x_map, x_full + 8 * stage,
               step * L::kColumns + b * Op::kBox, row);
  };

  if (warp == kMathWarps && lane == 0) {
    init_barrier(mailbox, splits > 1 ? 1 : 32 * kMathWarps);
    if (L::kOrdered) init_barrier(summed, 8);
#pragma unroll L::kAhead
    for (int s = 0; s < stages; ++s) {
      init_barrier(full + 8 * s, Packed ? 1 + 32 : 1);
      init_barrier(empty + 8 * s, kMathWarps);
      if (L::kOrdered) {
        init_barrier(x_full + 8 * s, 1);
        init_barrier(ordered + 8 * s, 1);
      }
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    if (splits > 1) arrive_expecting(mailbox, own * splits * L::kFold * kCellBytes);
#pragma unroll L::kAhead
    for (int s = 0; s < stages && first_step + s < last_step; ++s) load_w(s, first_step + s);
  }
  __syncthreads();
  cluster_arrive();

  int stage = 0;
  unsigned parity = 0;
  auto advance = [&] {
    if (++stage == stages) stage = 0, parity ^= 1;
  };

  using Raw = typename Op::Raw;
  auto scale_of = [&](int j) { return ScaleOf<Raw>(w, column + j % kWide * 32 + lane); };
  auto copy_scales = [&](const ScaleOf<Raw> (&of)[4], int stage, int step) {
    if constexpr (Packed) {
      const unsigned to = scales + stage * cut.scales + lane * 4;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        // without folds the same for all, which the compiler only finds where it is written so
        const int from = L::kFold == 1 ? step * kTileK : step * L::kColumns + j / kWide * kTileK;
        copy_word(to + j * 128, of[j].word(w, from));
        if (cut.halves) copy_word(to + kTileO * 4 + j * 128, of[j].word(w, from + w4::kChunk));
      }
      arrive_copied(full + 8 * stage);
    }
  };
  const int filled = min(first_step + stages, last_step);

  if (warp == kMathWarps) {
    if (lane == 0) {
      wait_for_previous_kernel();
#pragma unroll L::kAhead
      for (int step = first_step; step < filled; ++step) load_x(step - first_step, step);
    }
    __syncwarp();
    const ScaleOf<Raw> of[4] = {scale_of(0), scale_of(1), scale_of(2), scale_of(3)};
    auto load = [&](int step) {
      wait(empty + 8 * stage, parity);
      if (lane == 0) {
        load_w(stage, step);
        load_x(stage, step);
      }
      copy_scales(of, stage, step);
      advance();
    };
    if constexpr (L::kOrdered) {
      int at = 0, sum[TileM / 8] = {};
      unsigned phase = 0;
      auto add = [&](int i, const auto& v) {
#pragma unroll
        for (const uint4& quad : v)
          for (unsigned word : {quad.x, quad.y, quad.z, quad.w})
            sum[i] = __dp4a(static_cast<int>(word), 0x01010101, sum[i]);
      };
      for (int step = first_step; step < last_step; ++step) {
        wait(x_full + 8 * at, phase);
        const unsigned tile = shared_address(x_tiles + at * L::kXBytes);
        if (TileM == 8 || w.M - row <= 8)  // the others are zeros
          order_columns<8>(tile, add);
        else
          order_columns<TileM>(tile, add);
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        __syncwarp();
        if (lane == 0) arrive(ordered + 8 * at);
        if (++at == stages) at = 0, phase ^= 1;
        const int next = step - 1 + stages;  // into the stage that was multiplied while this one was put in order
        if (step > first_step && next < last_step) load(next);
      }
#pragma unroll
      for (int i = 0; i < TileM / 8; ++i) {
        sum[i] += __shfl_xor_sync(~0u, sum[i], 1);
        sum[i] += __shfl_xor_sync(~0u, sum[i], 2);
        if (lane % 4 == 0) store_word(sums + (8 * i + lane / 4) * 4, sum[i]);
      }
      if (lane % 4 == 0) arrive(summed);
    } else {
      for (int step = first_step + stages; step < last_step; ++step) load(step);
    }
    __syncwarp();
    cluster_wait();
    if (overlaid) {
      cluster_arrive();
      cluster_wait();
    }
    return;
  }

  if constexpr (Packed) {  // of the first stages, a warp each: the loading warp would be late for x
    const ScaleOf<Raw> of[4] = {scale_of(0), scale_of(1), scale_of(2), scale_of(3)};
#pragma unroll 1
    for (int s = warp; s < filled - first_step; s += kMathWarps) copy_scales(of, s, first_step + s);
  }
  const int thread = threadIdx.x % 128, group = warp / 4;
  if (threadIdx.x < 128) {  // what the epilogue reads of the model
    int n = min(column + thread, w.O - 1);
    if (Op::kScaled && thread % 8 == 0) prefetch_l2(finish.w_scale + n);
    if (finish.bias && thread % 8 == 0)
      prefetch_l2(static_cast<const char*>(finish.bias) + n * (finish.bias_dtype == QUAMBA_F32 ? 4 : 2));
  } else if (finish.residual) {  // what a cell adds was read a while ago
    const int bytes = finish.residual_dtype == QUAMBA_F32 ? 4 : 2;
#pragma unroll 1
    for (int i = thread; i < 8 * own; i += 128) {
      const int cell = i / 8 * splits + rank, at_row = row + cell / kWide * 8 + i % 8, at = column + cell % kWide * 32;
      if (at_row < w.M && at < w.O)
        prefetch_l2(static_cast<const char*>(finish.residual) + (static_cast<long long>(at_row) * w.O + at) * bytes);
    }
  }

  using XTile = decltype(tile_to_shape(SM90::GMMA::Layout_K_SW128_Atom<Element>{},
                                       Shape<Int<TileM>, Int<kTileK>, Int<L::kMaxStages * L::kFold>>{}));
  Tensor sx = make_tensor(make_smem_ptr(reinterpret_cast<Element*>(x_tiles)), XTile{});
  // value(b, i): of tokens 8 b + 2 t and the next channel g, then g + 8
  auto scatter = [&](auto value) {
    const unsigned to = mail + warp % 2 * 512 + slot(lane / 4, lane % 4);
    cluster_wait();
    if (overlaid) {
      cluster_arrive();
      cluster_wait();
    }
    const int part = L::kFold > 1 ? group : 0, first = warp / 2 - part * kWide;
    int turn = cut.split(first), to_rank = first - turn * splits;
    const int turns = cut.split(kWide), more = kWide - turns * splits;
#pragma unroll
    for (int b = 0; b < TileM / 8; ++b) {
      if (kWide * b + first >= cells) break;
      const unsigned v[4] = {bits(value(b, 0)), bits(value(b, 1)), bits(value(b, 2)), bits(value(b, 3))};
      if (splits > 1) {
        const unsigned there = mapped(to, to_rank);
        send_quad(there + ((turn * splits + rank) * L::kFold + part) * kCellBytes, there + (mailbox - to), v);
      } else {
        store_shared(to + (turn * L::kFold + part) * kCellBytes, make_uint4(v[0], v[1], v[2], v[3]));
      }
      to_rank += more, turn += turns;
      if (to_rank >= splits) to_rank -= splits, ++turn;
    }
    if (splits == 1) arrive(mailbox);
  };

  if constexpr (L::kGrouped) {
    const Grouped<Element, L::kFold> grouped(w, shared_address(x_tiles), shared_address(w_tiles), scales, cut.scales,
                                             column);
    float total[4] = {};
    for (int step = first_step; step < last_step; ++step) {
      wait(full + 8 * stage, parity);
      grouped.add_step(total, stage, step);
      __syncwarp();
      if (lane == 0) arrive(empty + 8 * stage);
      advance();
    }
    scatter([&](int b, int i) { return total[i]; });
  } else if constexpr (Packed) {
    using Code = std::conditional_t<L::kWhole, typename Op::Whole, Element>;
    using Atom = decltype(SM90::GMMA::rs_op_selector<Code, Element, Sum, Shape<_64, Int<TileM>, Int<w4::kChunk>>>());
    auto mma = make_tiled_mma(Atom{});
    auto mine = mma.get_slice(thread);
    Tensor fx = mine.make_fragment_B(mine.partition_B(sx));
    Tensor acc = partition_fragment_C(mma, Shape<_64, Int<TileM>>{});
    Tensor total = make_fragment_like(acc);  // of the groups that are done, scaled
    if constexpr (L::kSummed) clear(total), clear(acc);
    constexpr int kPiece = L::kPiece, kPieces = kTileK / kPiece;
    constexpr int kSlices = decltype(size<2>(fx))::value / kPieces;  // of one wgmma in a piece
    Tensor a0 = make_tensor<Code>(partition_shape_A(mma, Shape<_64, Int<kPiece>>{}));
    Tensor a1 = make_fragment_like(a0);
    constexpr int kRegisters = decltype(size(a0))::value * sizeof(Element) / 4;
    static_assert(kRegisters == Op::kRegisters * kPiece / w4::kChunk, "as they are made");

    // place: of the channel's row in a stage, behind those of the columns before
    const int part = L::kFold > 1 ? group : 0, place = group * 64 + thread / 32 * 16 + lane / 4, t = lane % 4;
    [[maybe_unused]] const unsigned select = Op::selector(t);
    // a row is 64 bytes, its four 16-byte pieces exchanged by row: the 64-byte swizzle of TMA
    const unsigned words = shared_address(w_tiles) + place * 64 + ((place / 2 & 3) << 4) +
                           (L::kWhole ? t * 4 : t / 2 * 4);
    const int second = cut.halves;  // whether the latter half of a step has words of its own
    unsigned bias[2] = {w.constant, Op::second_bias(w.constant)};
    asm("" : "+r"(bias[1]));  // or it is made anew at each use
    using Factor = typename Op::Factor;
    const unsigned first_scale = static_cast<unsigned>(column + place - part * L::kChannels) * w.groups;
    Factor factor[1][2];
    auto raw_scales = [&](int step, int chunk, auto take) {
      const unsigned from = scales + stage * cut.scales + (chunk & second) * kTileO * 4 + place * 4;
      const int group = w.group((step * L::kFold + part) * kTileK + chunk * w4::kChunk);
      const unsigned shift = w4::shift_in_word<Raw>(first_scale + group);
#pragma unroll
      for (int h = 0; h < 2; ++h) take(h, static_cast<Raw>(load_word(from + h * 32) >> shift));
    };
    auto load_factors = [&](int step, int chunk) {
      raw_scales(step, chunk, [&](int h, Raw raw) { factor[0][h] = Op::factor(raw); });
    };
    auto product = [&](auto& a, int piece) {
      warpgroup_arrive();
#pragma unroll
      for (int k = 0; k < kSlices; ++k) {
        gemm(mma, a(_, _, k), fx(_, _, piece * kSlices + k, stage * L::kFold + part), acc);
        mma.accumulate_ = SM90::GMMA::ScaleOut::One;
      }
      warpgroup_commit_batch();
    };
    float scale[2] = {};  // of the group whose codes are multiplied
    auto end_group = [&] {
      warpgroup_wait<0>();
      warpgroup_fence_operand(acc);
#pragma unroll
      for (int i = 0; i < decltype(size(acc))::value; ++i) total(i) += scale[i / 2 % 2] * acc(i);
      mma.accumulate_ = SM90::GMMA::ScaleOut::Zero;
    };
    mma.accumulate_ = SM90::GMMA::ScaleOut::Zero;
    int previous = -1;
    auto release = [&] {
      if (previous >= 0 && lane == 0) arrive(empty + 8 * previous);
    };

    for (int step = first_step; step < last_step; ++step) {
      wait(full + 8 * stage, parity);
      if constexpr (L::kOrdered) wait(ordered + 8 * stage, parity);
      if constexpr (!L::kSummed) load_factors(step, 0);
      unsigned held[kPieces][kRegisters];
      auto fetch = [&](int piece) {  // a lane reads the words of its own codes
        const unsigned from = words + stage * L::kWBytes;
        if constexpr (L::kWhole) {  // the tth of every 32 columns
#pragma unroll
          for (int i = 0; i < kPiece / 16; ++i)
            held[piece][i] = load_word((from ^ (piece * kPiece / 2 + i / 2 * 16)) + i % 2 * 512);
        } else {  // the (t / 2)th of every 16
#pragma unroll
          for (int i = 0; i < kRegisters; ++i)
            held[piece][i] = load_word((from ^ (piece * kPiece / 2 + i / 4 * 16)) + i % 2 * 512 + i / 2 % 2 * 8);
        }
      };
      auto unpack = [&](auto& a, int piece) {
        unsigned* const to = reinterpret_cast<unsigned*>(raw_pointer_cast(a.data()));
        if (!L::kSummed && piece * kPiece == w4::kChunk && second) load_factors(step, 1);
        if constexpr (L::kWhole) {
          constexpr int kOf = kRegisters * 32 / kPiece;  // registers of 32 columns, which are made of two words
          for_each(make_int_sequence<kRegisters>{}, [&](auto i) {
            constexpr int at = decltype(i)::value;
            const unsigned word = held[piece][at / kOf * 2 + at % 2];
            if constexpr (L::kSummed)
              to[at] = Op::template codes<at % kOf / 2>(word, bias);
            else
              to[at] = Op::template whole<at % kOf / 2>(word, factor[0][at % 2], bias);
          });
        } else {
#pragma unroll
          for (int i = 0; i < kRegisters; ++i) to[i] = Op::four(held[piece][i], select, factor[0][i % 2]);
        }
      };
      if (kPieces == 2) fetch(0), fetch(1);
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) {
        auto& a = piece % 2 && !L::kAlone ? a1 : a0;
        if (kPieces > 2) fetch(piece);
        unpack(a, piece);
        if (L::kSummed && (piece == 0 || piece * kPiece == w4::kChunk && second)) {
          end_group();
          raw_scales(step, piece * kPiece / w4::kChunk,
                     [&](int h, Raw raw) { scale[h] = __half2float(__ushort_as_half(raw)); });
        }
        product(a, piece);
        warpgroup_wait<L::kAlone ? 0 : 1>();
        if (piece == 0) release();
      }
      previous = stage;
      advance();
    }
    if constexpr (L::kSummed) {
      end_group();
      scatter([&](int b, int i) { return total(make_coord(i % 2, i / 2, b), 0, 0); });
    } else {
      warpgroup_wait<0>();
      warpgroup_fence_operand(acc);  // or sums are copied before they are complete
      if constexpr (L::kOrdered) {
        wait(summed, 0);
#pragma unroll
        for (int b = 0; b < TileM / 8; ++b) {
          const uint2 over = load_pair(sums + (8 * b + 2 * t) * 4);
#pragma unroll
          for (int i = 0; i < 4; ++i)
            acc(make_coord(i % 2, i / 2, b), 0, 0) -= Op::kOver * static_cast<int>(i % 2 ? over.y : over.x);
        }
      }
      scatter([&](int b, int i) { return acc(make_coord(i % 2, i / 2, b), 0, 0); });
    }
  } else {
    using Atom = decltype(SM90::GMMA::ss_op_selector<Element, Element, Sum, Shape<_128, Int<TileM>, Int<kTileK>>>());
    using WTile = decltype(tile_to_shape(SM90::GMMA::Layout_K_SW128_Atom<Element>{},
                                         Shape<Int<kTileO>, Int<kTileK>, Int<L::kMaxStages>>{}));
    auto mma = make_tiled_mma(Atom{}, cute::Layout<Shape<_2, _1, _1>>{});
    auto mine = mma.get_slice(threadIdx.x);
    Tensor sw = make_tensor(make_smem_ptr(reinterpret_cast<Element*>(w_tiles)), WTile{});
    Tensor fw = mine.make_fragment_A(mine.partition_A(sw));
    Tensor fx = mine.make_fragment_B(mine.partition_B(sx));
    Tensor acc = partition_fragment_C(mma, Shape<_128, Int<TileM>>{});
    mma.accumulate_ = SM90::GMMA::ScaleOut::Zero;
    int previous = -1;
    for (int step = first_step; step < last_step; ++step) {
      wait(full + 8 * stage, parity);
      warpgroup_arrive();
#pragma unroll
      for (int k = 0; k < decltype(size<2>(fx))::value; ++k) {
        gemm(mma, fw(_, _, k, stage), fx(_, _, k, stage), acc);
        mma.accumulate_ = SM90::GMMA::ScaleOut::One;
      }
      warpgroup_commit_batch();
      warpgroup_wait<1>();
      if (previous >= 0 && lane == 0) arrive(empty + 8 * previous);
      previous = stage;
      advance();
    }
    warpgroup_wait<0>();
    warpgroup_fence_operand(acc);  // or sums are copied before they are complete
    scatter([&](int b, int i) { return acc(make_coord(i % 2, i / 2, b), 0, 0); });
  }

  wait_for_previous_kernel();
  finish_cells<Sum, Op::kScaled, TileM, L::kFold>(finish, mail, own, splits, rank, row, column,
                                                  [&] { wait(mailbox, 0); });
  wait(mailbox, 0);  // cells beyond O are sent too, and must find this block
#endif
}

}  // namespace quamba::few
