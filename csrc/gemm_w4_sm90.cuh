// y = x w^T for many rows on Hopper with packed int4 weights: x fp16 or bf16 and w = q4 * scale, or x int8 and
// w = q4 * multiplier. q4 is int32 [O, K/8], as it is stored or in the order of x of 16 bits (operand_w4.cuh); scales
// (fp16) and multipliers (int8) are [O, K/S].
//
// What is computed is y^T: weights are the operand that wgmma takes from registers, so unpacked ones never meet shared
// memory. One warp has TMA bring tiles of x and of packed words; each of two multiplying warp groups makes the operand
// of the next 64 columns (128 of int8) from the words of its 64 channels while the tensor cores work on the previous
// ones. Results leave as gemm_w4_finish.cuh says.
#pragma once

#include <algorithm>

#include "cute/tensor.hpp"
#include "cutlass/arch/reg_reconfig.h"

#include "gemm_w4_finish.cuh"
#include "gemm_w4_rest.cuh"
#include "launch.cuh"
#include "operand_w4.cuh"
#include "wgmma_160.cuh"

namespace quamba::w4 {

using namespace cute;

constexpr int kThreads = 384, kMathWarps = 8;
constexpr int kMostGroups = 64;  // of columns, whose multipliers pass shared memory

template <class Element, int TileM>
struct Buffers {
  static constexpr int kXBytes = TileM * kTileK * static_cast<int>(sizeof(Element)), kWBytes = kTileO * kTileK / 2;
  static constexpr int kOut = 16 * kPitch * 4;  // of each group's end of a tile
  static constexpr int kScales = sizeof(Element) == 1 ? kTileO * kMostGroups : 0;  // bytes of a tile's, twice
  static constexpr int kFit = (227 * 1024 - 1024 - 2 * kOut - 2 * kScales - 256) / (kXBytes + kWBytes);
  static constexpr int kStages = kFit < 8 ? kFit : 8;
  static constexpr int kBytes = kStages * (kXBytes + kWBytes) + 2 * kOut + 2 * kScales + (3 * kStages + 4) * 8 + 1024;
  static constexpr int kCells = sizeof(Element);  // of a stage, in the place of x
};

// How a problem is cut: tokens of a tile, whole tiles next to each other, whole ones and all. Where 64 channels or more
// are left, the others have these by twice the tokens, half for each warp group. What is left then is the rest.
struct Cut {
  int tokens, tiles_o, whole, tiles;
  Rest rest;
};

// Where a block is: its tile and the step along K. Tiles go down the tokens of a band, then to the next channels, so
// that what runs together shares x and w in L2.
template <int TileM, bool Rests>
struct Walk {
  static constexpr int kBand = 2048 / TileM;
  int tile, step, row, column;
  int steps, tiles_m, tiles_o, whole, tiles;
  bool half;  // a tile of 64 channels: a step takes two stages

  __device__ Walk(const Weights& w, const Cut& cut)
      : tile(blockIdx.x), step(0), steps((w.K + kTileK - 1) / kTileK), tiles_m((w.M + TileM - 1) / TileM),
        tiles_o(cut.tiles_o), whole(cut.whole), tiles(cut.tiles), half(false) {
    place();
  }
  __device__ bool valid() const { return tile < tiles; }
  __device__ bool last() const { return tile + static_cast<int>(gridDim.x) >= tiles; }
  __device__ void place() {
    if (Rests && tile >= whole) {
      half = true, row = (tile - whole) * 2 * TileM, column = tiles_o * kTileO;
      return;
    }
    int band = tile / (kBand * tiles_o), inside = tile - band * kBand * tiles_o;
    int high = max(min(kBand, tiles_m - band * kBand), 1), across = inside / high;
    row = (band * kBand + inside - across * high) * TileM, column = across * kTileO;
  }
  __device__ void next_tile() {
    tile += gridDim.x, step = 0;
    place();
  }
  __device__ void next() {
    if (++step == steps) next_tile();
  }
};

// TileM tokens by 128 channels a tile, tiles_o of them next to each other. Parts: scales of 64 columns, 1 where S is a
// multiple of 64 and 2 where of 32; 0 where int8 x has at most kMostGroups groups of a multiple of 128 columns. Rests:
// channels beyond the tiles are multiplied by gemm_w4_rest.cuh.
template <class Element, int TileM, int Parts, bool Rests>
__global__ void __launch_bounds__(kThreads, 1)
    multiply(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap w_map,
             const __grid_constant__ CUtensorMap y_map, const __grid_constant__ CUtensorMap residual_map,
             const __grid_constant__ Weights w, const __grid_constant__ Finish finish,
             const __grid_constant__ Cut cut) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using L = Buffers<Element, TileM>;
  using Op = Operand<Element>;
  constexpr int kStages = L::kStages;
  static_assert(kStages >= 3 && kTileK % Op::kBox == 0, "TMA brings whole boxes");
  extern __shared__ char raw[];
  char* smem = raw + (-shared_address(raw) & 1023);
  char *x_tiles = smem, *w_tiles = smem + kStages * L::kXBytes, *out = w_tiles + kStages * L::kWBytes;
  char* scales = out + 2 * L::kOut;
  unsigned full = shared_address(scales + 2 * L::kScales), empty = full + 8 * kStages, ready = empty + 8 * kStages;
  unsigned scales_full = ready + 8 * kStages, scales_empty = scales_full + 16;
  const int cells = cells_of(finish), cell_channels = cells == 4 ? 32 : 64;

  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
      init_barrier(full + 8 * s, 1);
      init_barrier(empty + 8 * s, kMathWarps);
      init_barrier(ready + 8 * s, kMathWarps);
    }
    for (int s = 0; s < 2; ++s) init_barrier(scales_full + 8 * s, 32), init_barrier(scales_empty + 8 * s, kMathWarps);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  wait_for_previous_kernel();

  int stage = 0;
  unsigned parity = 0;
  auto advance = [&] {
    if (++stage == kStages) stage = 0, parity ^= 1;
  };

  // registers move from the first group to the others, of the 3 * 168 that a block of 384 threads starts with
  constexpr int kLoading = Rests ? 56 : 40;
  if (threadIdx.x < 128) {
    cutlass::arch::warpgroup_reg_dealloc<kLoading>();
    auto cell_at = [&](int cell) {
      return shared_address(x_tiles) + stage * L::kXBytes + cell % L::kCells * TileM * kCellRow;
    };
    if (threadIdx.x == 0) {
      for (Walk<TileM, Rests> at(w, cut); at.valid(); at.next_tile()) {
        auto load = [&](int step, int row) {
          wait(empty + 8 * stage, parity ^ 1);
          unsigned barrier = full + 8 * stage;
          arrive_expecting(barrier, L::kXBytes + L::kWBytes);
          load_box(shared_address(w_tiles + stage * L::kWBytes), &w_map, barrier, step * (kTileK / 8), at.column);
#pragma unroll
          for (int b = 0; b < kTileK / Op::kBox; ++b)
            load_box(shared_address(x_tiles + stage * L::kXBytes + b * TileM * 128), &x_map, barrier,
                     step * kTileK + b * Op::kBox, row);
          advance();
        };
        for (; at.step < at.steps; ++at.step) {
          if (finish.residual && !cells) ask_ahead<TileM>(finish, at);
          load(at.step, at.row);
          if (Rests && at.half) load(at.step, at.row + TileM);
        }
        // the next kernel's blocks gather where no block of this one is: the later they come, the more evenly
        if (at.last()) launch_dependents();
        for (int cell = 0; cell < cells; cell += L::kCells, advance()) {
          wait(empty + 8 * stage, parity ^ 1);
          unsigned barrier = full + 8 * stage;
          if (!finish.residual) {
            arrive(barrier);
            continue;
          }
          arrive_expecting(barrier, L::kCells * TileM * kCellRow);
#pragma unroll
          for (int c = 0; c < L::kCells; ++c)
            load_box(cell_at(c), &residual_map, barrier, at.column + (cell + c) * cell_channels, at.row);
        }
      }
    } else if (threadIdx.x == 32 && cells) {
      unsigned turns = 0;  // of each stage, how often its results were awaited: the lowest bit
      for (Walk<TileM, Rests> at(w, cut); at.valid(); at.next_tile()) {
        stage = (stage + at.steps * (Rests && at.half ? 2 : 1)) % kStages;
        for (int cell = 0; cell < cells; cell += L::kCells) {
          wait(ready + 8 * stage, turns >> stage & 1);
          turns ^= 1u << stage;
#pragma unroll
          for (int c = 0; c < L::kCells; ++c) {
            const bool second = Rests && at.half && (cell + c) * cell_channels >= 64;
            const int column = at.column + (cell + c) * cell_channels - (second ? 64 : 0);
            if (column < w.O) store_box(&y_map, cell_at(c), column, at.row + (second ? TileM : 0));
          }
          wait_for_stores();
          arrive(empty + 8 * stage, kMathWarps);
          if (++stage == kStages) stage = 0;
        }
      }
    } else if (Parts == 0 && threadIdx.x / 32 == 2) {
      int tiles = 0;
      for (Walk<TileM, Rests> at(w, cut); at.valid(); at.next_tile(), ++tiles) {
        wait(scales_empty + tiles % 2 * 8, tiles / 2 % 2 ^ 1);
        const char* first = static_cast<const char*>(w.scale) + static_cast<long long>(at.column) * w.groups;
        const unsigned* from = reinterpret_cast<const unsigned*>(first);
        unsigned* to = reinterpret_cast<unsigned*>(scales + tiles % 2 * L::kScales);
        const int count = min(kTileO, w.O - at.column) * w.groups / 4;  // O is a multiple of 8
        for (int i = threadIdx.x - 64; i < count; i += 32) to[i] = __ldg(from + i);
        arrive(scales_full + tiles % 2 * 8);
      }
    } else if (Rests && threadIdx.x >= 96) {
      multiply_rest(cut.rest, w, finish);
    }
  } else {
    cutlass::arch::warpgroup_reg_alloc<252 - kLoading / 2>();
    using Atom = std::conditional_t<TileM == 160, Columns160<Element, false>,
                                    decltype(SM90::GMMA::rs_op_selector<Element, Element, typename Op::Accumulator,
                                                                        Shape<_64, Int<TileM>, Int<kChunk>>>())>;
    using XTile = decltype(tile_to_shape(SM90::GMMA::Layout_K_SW128_Atom<Element>{},
                                         Shape<Int<TileM>, Int<kTileK>, Int<kStages>>{}));
    int thread = threadIdx.x % 128, group = threadIdx.x / 128 - 1, lane = thread % 32;
    auto mma = make_tiled_mma(Atom{});
    auto mine = mma.get_slice(thread);
    Tensor sx = make_tensor(make_smem_ptr(reinterpret_cast<Element*>(x_tiles)), XTile{});
    Tensor fx = mine.make_fragment_B(mine.partition_B(sx));
    Tensor acc = partition_fragment_C(mma, Shape<_64, Int<TileM>>{});  // ((2, 2, TileM / 8), 1, 1)
    constexpr int kSlices = decltype(size<2>(fx))::value / 2;          // of one wgmma in a chunk
    constexpr int kChunks = Parts ? 1 : 2;  // of 64 columns that are unpacked together
    Tensor a0 = make_tensor<Element>(partition_shape_A(mma, Shape<_64, Int<kChunks * kChunk>>{}));
    Tensor a1 = make_fragment_like(a0);
    constexpr int kRegisters = kChunks * Op::kRegisters;
    static_assert(decltype(size(a0))::value * sizeof(Element) == 4 * kRegisters, "as fill makes them");

    const bool signals = lane == 0;
    int channel = group * 64 + thread / 32 * 16 + lane / 4;
    unsigned select = Op::selector(lane % 4);
    // a row is 64 bytes, its four 16-byte pieces exchanged by row: the 64-byte swizzle of TMA
    constexpr bool kWhole = Parts == 1;  // a lane has whole words
    unsigned words = shared_address(w_tiles) + channel * 64 +
                     (kWhole ? lane % 4 * 4 : Op::kScaled ? lane % 4 / 2 * 4 : 0),
             turn = (channel / 2 & 3) << 4;
    unsigned bias[2] = {w.constant, Op::second_bias(w.constant)};
    asm("" : "+r"(bias[1]));  // or it is made anew at each use

    unsigned place[4];  // of the words that a lane takes of every 32 columns
#pragma unroll
    for (int i = 0; i < 4; ++i) place[i] = words + (i * 16 ^ turn);
    auto unpack = [&](auto& a, int chunk, const Scales<Element, Parts>& scales) {
      typename Op::Factor factor[Parts][2];
#pragma unroll
      for (int p = 0; p < Parts; ++p)
#pragma unroll
        for (int h = 0; h < 2; ++h) factor[p][h] = Op::factor(scales.raw[chunk * Parts + p][h]);
      unsigned* to = reinterpret_cast<unsigned*>(raw_pointer_cast(a.data()));
      const unsigned from = words + stage * L::kWBytes;
      if constexpr (Op::kScaled) {  // of every 16 columns the (t / 2)th word, of which a lane takes half
        unsigned word[Op::kRegisters];
#pragma unroll
        for (int i = 0; i < Op::kRegisters; ++i)
          word[i] = load_word(from + i % 2 * 512 + ((chunk * 32 + i / 4 * 16) ^ turn) + i % 4 / 2 * 8);
#pragma unroll
        for (int i = 0; i < Op::kRegisters; ++i)
          to[i] = Op::four(word[i], select, factor[i * Parts / Op::kRegisters][i % 2]);
      } else if constexpr (kWhole) {
        for_each(make_int_sequence<2>{}, [&](auto i) {  // of every 32 columns the tth word
          const unsigned at = from + ((chunk * 32 + decltype(i)::value * 16) ^ turn);
          const unsigned word[2] = {load_word(at), load_word(at + 512)};
          for_each(make_int_sequence<8>{}, [&](auto j) {
            constexpr int r = decltype(j)::value;
            to[decltype(i)::value * 8 + r] = Op::template whole<r / 2>(word[r % 2], factor[0][r % 2], bias);
          });
        });
      } else {
        unsigned word[2][8];
#pragma unroll
        for (int h = 0; h < 2; ++h)
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            uint4 v = load_shared(from + h * 512 + ((chunk * 32 + i * 16) ^ turn));
            word[h][4 * i] = v.x, word[h][4 * i + 1] = v.y, word[h][4 * i + 2] = v.z, word[h][4 * i + 3] = v.w;
          }
        Op::template fill<Parts>(to, word, factor, select);
      }
    };
    // The groups take turns, so that one unpacks while the tensor cores work for the other.
    auto product = [&](auto& a, int chunk, int from) {
#pragma unroll
      for (int i = 0; i < kRegisters; ++i)  // made before the turn, not in it
        asm volatile("" : "+r"(reinterpret_cast<unsigned*>(raw_pointer_cast(a.data()))[i]));
      sync_threads(4 + group, 256);
      warpgroup_arrive();
#pragma unroll
      for (int k = 0; k < kChunks * kSlices; ++k) {
        gemm(mma, a(_, _, k), fx(_, _, chunk * kSlices + k, from), acc);
        mma.accumulate_ = SM90::GMMA::ScaleOut::One;
      }
      warpgroup_commit_batch();
      signal_threads(5 - group, 256);
    };

    if (group == 1) signal_threads(4, 256);  // the first turn is the other's
    int tiles = 0;
    Walk<TileM, Rests> ahead(w, cut);
    Scales<Element, Parts ? Parts : 1> next;
    if constexpr (Parts != 0) next.load(w, ahead, channel);
    for (Walk<TileM, Rests> at(w, cut); at.valid(); at.next_tile(), ++tiles) {
      mma.accumulate_ = SM90::GMMA::ScaleOut::Zero;
      int previous = stage;
      // what the end of the tile needs is asked for long before
      const bool half = Rests && at.half;
      const int first = at.column + (half ? 0 : group * 64), own_channel = first + thread / 32 * 16 + lane / 4;
      const int own_row = at.row + (half ? group * TileM : 0);
      Channels channels;
      if (Op::kScaled) channels = Channels::of<true>(finish, own_channel);
      constexpr int kScales = Op::kScaled ? (TileM + 127) / 128 : 0;  // of tokens
      float x_scale[kScales + 1];
#pragma unroll
      for (int i = 0; i < kScales; ++i)
        x_scale[i] = __ldcg(finish.x_scale + min(own_row + thread + 128 * i, w.M - 1) * finish.x_step);
      if constexpr (Parts == 0) {
        wait(scales_full + tiles % 2 * 8, tiles / 2 % 2);
        const unsigned multipliers =
            shared_address(scales) + tiles % 2 * L::kScales + (channel - (half ? group * 64 : 0)) * w.groups;
        const int back = half ? group * 64 * 64 : 0;  // bytes: both groups have the same channels
        auto take = [&](auto& a, int step, int from, unsigned phase) {
          const unsigned group_at = multipliers + __umulhi(step * kTileK, w.inverse);
          const typename Op::Factor factor[2] = {Op::factor(load_byte(group_at)),
                                                 Op::factor(load_byte(group_at + 8 * w.groups))};
          wait(full + 8 * from, phase);
          unsigned word[kRegisters];
#pragma unroll
          for (int i = 0; i < kRegisters; ++i)
            word[i] = load_word(place[i / 4] + from * L::kWBytes + i % 2 * 512 + i % 4 / 2 * 8 - back);
#pragma unroll
          for (int i = 0; i < kRegisters; ++i)
            reinterpret_cast<unsigned*>(raw_pointer_cast(a.data()))[i] = Op::four(word[i], select, factor[i % 2]);
          product(a, 0, from);
          warpgroup_wait<1>();
          if (step && signals) arrive(empty + 8 * previous);
          previous = from;
        };
        if (half) {
          // stages in turns with the other group: its own are let go as soon as they are there
          int from = stage;
          unsigned phase = parity;
          auto turn = [&] {
            if (++from == kStages) from = 0, phase ^= 1;
          };
          auto pass = [&] {
            wait(full + 8 * from, phase);
            if (signals) arrive(empty + 8 * from);
            turn();
          };
#pragma unroll 1
          for (int step = 0; step < at.steps; ++step) {
            if (group == 1) pass();
            take(a0, step, from, phase);
            warpgroup_wait<0>();
            turn();
            if (group == 0) pass();
          }
          const int passed = stage + 2 * at.steps;
          parity ^= passed / kStages & 1, stage = passed % kStages;
        } else {
#pragma unroll 1
          for (int step = 0;;) {
            take(a0, step, stage, parity);
            advance();
            if (++step == at.steps) break;
            take(a1, step, stage, parity);
            advance();
            if (++step == at.steps) break;
          }
        }
        if (signals) arrive(scales_empty + tiles % 2 * 8);
      } else {
        for (int step = 0; step < at.steps; ++step) {
          Scales<Element, Parts> now = next;
          ahead.next();
          next.load(w, ahead, channel);
          wait(full + 8 * stage, parity);
          unpack(a0, 0, now);
          product(a0, 0, stage);
          warpgroup_wait<1>();
          if (step && signals) arrive(empty + 8 * previous);
          unpack(a1, 1, now);
          product(a1, 1, stage);
          warpgroup_wait<1>();
          previous = stage;
          advance();
        }
      }
      warpgroup_wait<0>();
      if (signals) arrive(empty + 8 * previous);
      if (!Rests && !cells) {
        finish_tokens<TileM, Op::kScaled>(finish, acc, out + group * L::kOut, group, at.row, first);
        continue;
      }
      float* x_scales = reinterpret_cast<float*>(out + group * L::kOut) + tiles % 2 * TileM;
      if (Op::kScaled) {
#pragma unroll
        for (int i = 0; i < kScales; ++i)
          if (thread + 128 * i < TileM) x_scales[thread + 128 * i] = x_scale[i];
        sync_threads(2 + group, 128);
      }
      if (!Op::kScaled) channels = Channels::of<false>(finish, own_channel);
      const int own = cells == 4 ? 2 * group + thread / 64 : group;
#pragma unroll 1
      for (int cell = 0; cell < cells; cell += L::kCells, advance()) {  // as often for all warps: stage stays uniform
        wait(full + 8 * stage, parity);
        if (own / L::kCells * L::kCells == cell) {
          char* to = x_tiles + stage * L::kXBytes + own % L::kCells * TileM * kCellRow;
          if (cells == 4)
            fill_floats<TileM, Op::kScaled>(acc, to, x_scales, channels, finish.residual);
          else
            fill_halves<TileM, Op::kScaled>(acc, shared_address(to), x_scales, channels, finish.y_dtype == QUAMBA_F16);
          fence_stores();
        }
        __syncwarp();
        if (signals) arrive(ready + 8 * stage);
      }
    }
    if (group == 0) sync_threads(4, 256);  // the turn that the other's last one gave
  }
#endif
}

template <class Element, int TileM, int Parts, bool Rests>
int launch(const QuambaLinear& a, const Cut& cut, int sms, cudaStream_t stream) {
  using Op = Operand<Element>;
  static const Encode encode = encoder();
  if (!encode) return cudaErrorNotSupported;
  CUtensorMap x_map, w_map;
  if (!describe(encode, &x_map, Op::kType, a.x, a.K, a.M, a.K * static_cast<long long>(sizeof(Element)), Op::kBox,
                TileM, CU_TENSOR_MAP_SWIZZLE_128B) ||
      !describe(encode, &w_map, CU_TENSOR_MAP_DATA_TYPE_INT32, a.w, a.K / 8, a.O, a.K / 2, kTileK / 8, kTileO,
                CU_TENSOR_MAP_SWIZZLE_64B))
    return cudaErrorInvalidValue;
  const Finish finish = make_finish(a, Op::kScaled ? static_cast<const float*>(a.w_scale) : nullptr);
  CUtensorMap y_map = x_map, residual_map = x_map;
  if (cells_of(finish)) {
    const bool floats = finish.y_dtype == QUAMBA_F32;
    const auto type = floats ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32 : CU_TENSOR_MAP_DATA_TYPE_UINT16;
    const long long pitch = (floats ? 4LL : 2LL) * a.O;
    const int box = floats ? 32 : 64;
    if (!describe(encode, &y_map, type, a.y, a.O, a.M, pitch, box, TileM, CU_TENSOR_MAP_SWIZZLE_128B) ||
        (a.residual &&
         !describe(encode, &residual_map, type, a.residual, a.O, a.M, pitch, box, TileM, CU_TENSOR_MAP_SWIZZLE_128B)))
      return cudaErrorInvalidValue;
  }
  Weights w{Op::kScaled ? a.w_multiplier : a.w_scale, a.M, a.O, a.K, a.K / a.S,
            static_cast<unsigned>(((1ull << 32) + a.S - 1) / a.S), Op::kBias};
  auto kernel = multiply<Element, TileM, Parts, Rests>;
  constexpr int kBytes = Buffers<Element, TileM>::kBytes;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(std::min(cut.tiles, sms)));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kBytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  error = cudaLaunchKernelEx(&config, kernel, x_map, w_map, y_map, residual_map, w, finish, cut);
  return error != cudaSuccess ? error : cudaGetLastError();
}

inline Cut cut_of(const QuambaLinear& a, int tokens, bool rests) {
  const int tiles_m = (a.M + tokens - 1) / tokens, tiles_o = (a.O + (rests ? 0 : kTileO - 1)) / kTileO;
  const int whole = tiles_m * tiles_o, halves = rests && a.O % kTileO >= 64 ? (tiles_m + 1) / 2 : 0;
  return {tokens, tiles_o, whole, whole + halves, rests ? rest_of(a, a.O / 64 * 64) : Rest{}};
}

// The cut that is done first: waves times what a tile takes, which has a part that does not shrink with its tokens.
inline Cut choose(const QuambaLinear& a, int sms, int fixed, bool may_rest) {
  constexpr int kTokens[5] = {256, 192, 160, 128, 64};
  const int forced = tuned("QUAMBA_TILE", -1);
  Cut best{};
  double least = 1e30;
  for (bool rests : {false, true})
    for (int i = 0; i < 5; ++i) {
      if ((forced >= 0 && i != forced % 5) || (rests && (!may_rest || i % 3))) continue;
      const Cut cut = cut_of(a, kTokens[i], rests);
      const double waves = (cut.tiles + sms - 1) / sms, pieces = (cut.rest.pieces + sms - 1) / sms;
      if (pieces * kRestTokens > waves * kTokens[i]) continue;
      if (const double cost = waves * (kTokens[i] + fixed); cost < least) least = cost, best = cut;
    }
  return best;
}

template <class Element>
int run(const QuambaLinear& a, cudaStream_t stream) {
  if (a.K <= 0 || a.K % 32 || a.S <= 0 || a.S % 32 || a.K % a.S ||
      static_cast<long long>(a.K) * a.S >> 32 || !quamba::can_finish(a))
    return QUAMBA_UNSUPPORTED;
  int device = 0, sms = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  constexpr int kParts = Operand<Element>::kScaled ? 0 : 1;
  const bool whole = kParts ? a.S % kChunk == 0
                            : a.S % kTileK == 0 && a.K / a.S <= kMostGroups &&
                                  reinterpret_cast<unsigned long long>(a.w_multiplier) % 4 == 0;
  if (!whole) return launch<Element, 128, 2, false>(a, cut_of(a, 128, false), sms, stream);
  const Cut cut = choose(a, sms, Operand<Element>::kFixed, kParts == 0 && leaves_rest(a));
  if constexpr (kParts == 0)
    if (cut.tiles_o != (a.O + kTileO - 1) / kTileO)
      return cut.tokens == 256 ? launch<Element, 256, 0, true>(a, cut, sms, stream)
                               : launch<Element, 128, 0, true>(a, cut, sms, stream);
  switch (cut.tokens) {
    case 256: return launch<Element, 256, kParts, false>(a, cut, sms, stream);
    case 192: return launch<Element, 192, kParts, false>(a, cut, sms, stream);
    case 160: return launch<Element, 160, kParts, false>(a, cut, sms, stream);
    case 128: return launch<Element, 128, kParts, false>(a, cut, sms, stream);
    default: return launch<Element, 64, kParts, false>(a, cut, sms, stream);
  }
}

}  // namespace quamba::w4
