// y = x w^T for 9 to 256 tokens on Hopper, where the bytes of the weights decide: packed int4 weights of all types
// of x (operand_w4.cuh), or int8 weights and x.
//
// A block takes 128 channels by 16, 32 or 64 tokens and a share of the columns; the blocks of a cluster share a tile
// along K. Two blocks fit a multiprocessor, of one kernel or of two that follow each other: weights are constants of
// the model, so the next kernel has its first tiles of them on the way before the previous one is done.
//
// What is computed is y^T: weights are the operand A of wgmma, from registers once unpacked, or from shared memory. At
// the end the blocks of a cluster scatter their sums: a cell of 32 channels by 8 tokens belongs to one of them, which
// adds what all have sent in the order of their ranks and finishes it, so results do not depend on timing.
#pragma once

#include "cute/tensor.hpp"

#include "finish.cuh"
#include "launch.cuh"
#include "linear_few_plan.h"
#include "mma.cuh"
#include "operand_w4.cuh"

namespace quamba::few {

using namespace cute;
using w4::Operand;
using w4::Weights;

constexpr int kThreads = 288, kMathWarps = 8;
constexpr int kCellBytes = 1024;  // 32 channels by 8 tokens
constexpr int kSharedBytes = 113 * 1024;  // two blocks of it, and what the system takes of each, fill a multiprocessor

// Cells that a block receives at most, from itself too: its share, rounded up, of each of the splits.
constexpr int most_mail(int cells) {
  int most = 0;
  for (int splits = 1; splits <= kMaxSplits; ++splits) most = std::max(most, (cells + splits - 1) / splits * splits);
  return most;
}

template <class Element, bool Packed, int TileM>
struct Layout {
  static constexpr int kWBytes = kTileO * kTileK / (Packed ? 2 : 1);
  static constexpr int kXBytes = TileM * kTileK * static_cast<int>(sizeof(Element));
  static constexpr int kCells = TileM / 8 * (kTileO / 32);
  static constexpr int kMailBytes = most_mail(kCells) * kCellBytes, kBarrierBytes = 256;
  static constexpr int kFit = (kSharedBytes - 1024 - kMailBytes - kBarrierBytes) / (kWBytes + kXBytes);
  static constexpr int kStages = kFit < 10 ? kFit : 10;
  static constexpr int kBytes = kStages * (kWBytes + kXBytes) + kMailBytes + kBarrierBytes + 1024;
  static_assert(kStages >= 3, "two stages are read while one is written");
};

// A block's channels, tokens and share of the steps along K.
struct Place {
  int step, column, row, last;
};

__device__ __forceinline__ void prefetch_box(const CUtensorMap* map, int x, int y) {
  asm volatile("cp.async.bulk.prefetch.tensor.2d.L2.global [%0, {%1, %2}];" ::"l"(map), "r"(x), "r"(y) : "memory");
}

// 16 bytes to the same place in a block of the cluster of at least two, counted by its barrier.
__device__ __forceinline__ void send_quad(unsigned to, unsigned barrier, int rank, const unsigned (&v)[4]) {
  unsigned there, counter;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(to), "r"(rank));
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(counter) : "r"(barrier), "r"(rank));
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(there),
               "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3]), "r"(counter)
               : "memory");
}

__device__ __forceinline__ unsigned bits(float v) { return __float_as_uint(v); }
__device__ __forceinline__ unsigned bits(int v) { return static_cast<unsigned>(v); }

template <class T>
__device__ __forceinline__ T value_of(unsigned bits) {
  if constexpr (std::is_same_v<T, float>) return __uint_as_float(bits);
  return static_cast<T>(bits);
}

// Where lane 4 g + t's 16 bytes lie within half a cell: g and t are exchanged so that a quarter warp that writes, and
// half a warp that reads 8 bytes of one token each, meet all banks.
__device__ __forceinline__ int slot(int g, int t) { return g / 2 * 128 + ((g ^ g / 2) & 1) * 64 + (t ^ g / 2) * 16; }

template <class Element, bool Packed, int TileM>
__global__ void __launch_bounds__(kThreads, 2)
    linear_few(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap w_map,
               const __grid_constant__ Weights w, const __grid_constant__ Finish finish) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using L = Layout<Element, Packed, TileM>;
  using Op = Operand<Element>;
  using Sum = typename Op::Accumulator;
  constexpr int kStages = L::kStages;
  extern __shared__ char raw[];
  char* smem = raw + (-shared_address(raw) & 1023);
  char *x_tiles = smem, *w_tiles = smem + kStages * L::kXBytes;
  const unsigned mail = shared_address(w_tiles + kStages * L::kWBytes), mailbox = mail + L::kMailBytes;
  const unsigned full = mailbox + 8, empty = full + 8 * kStages;
  launch_dependents();

  const int splits = gridDim.x, rank = blockIdx.x, lane = threadIdx.x % 32;
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), steps = (w.K + kTileK - 1) / kTileK;
  Place at{rank * steps / splits, static_cast<int>(blockIdx.z) * kTileO, static_cast<int>(blockIdx.y) * TileM,
           (rank + 1) * steps / splits};
  // cells of tokens that exist, and those of this block
  const int cells = min((w.M - at.row + 7) / 8, TileM / 8) * 4, own = (cells - rank + splits - 1) / splits;

  auto load_w = [&](int stage, int step) {
    arrive_expecting(full + 8 * stage, L::kXBytes + L::kWBytes);
    load_box(shared_address(w_tiles + stage * L::kWBytes), &w_map, full + 8 * stage, step * (Packed ? 16 : 128),
             at.column);
  };
  auto load_x = [&](int stage, int step) {
#pragma unroll
    for (int b = 0; b < kTileK / Op::kBox; ++b)
      load_box(shared_address(x_tiles + stage * L::kXBytes + b * TileM * 128), &x_map, full + 8 * stage,
               step * kTileK + b * Op::kBox, at.row);
  };

  if (warp == kMathWarps && lane == 0) {
    init_barrier(mailbox, splits > 1 ? 1 : 32 * kMathWarps);
    for (int s = 0; s < kStages; ++s) {
      init_barrier(full + 8 * s, 1);
      init_barrier(empty + 8 * s, kMathWarps);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    if (splits > 1) arrive_expecting(mailbox, own * splits * kCellBytes);
    for (int s = 0; s < kStages && at.step + s < at.last; ++s) load_w(s, at.step + s);
    for (int step = at.step + kStages; step < at.last; ++step)
      prefetch_box(&w_map, step * (Packed ? 16 : 128), at.column);
  }
  __syncthreads();
  cluster_arrive();

  int stage = 0;
  unsigned parity = 0;
  auto advance = [&] {
    if (++stage == kStages) stage = 0, parity ^= 1;
  };

  if (warp == kMathWarps) {
    if (lane == 0) {
      wait_for_previous_kernel();
      for (int s = 0; s < kStages && at.step + s < at.last; ++s) load_x(s, at.step + s);
      for (int step = at.step + kStages; step < at.last; ++step) {
        wait(empty + 8 * stage, parity);
        load_w(stage, step);
        load_x(stage, step);
        advance();
      }
    }
    __syncwarp();
    cluster_wait();
    return;
  }

  const int thread = threadIdx.x % 128, group = warp / 4;
  if (threadIdx.x < 128) {  // what the epilogue reads of the model
    int n = min(at.column + thread, w.O - 1);
    if (Op::kScaled && thread % 8 == 0) prefetch_l2(finish.w_scale + n);
    if (finish.bias && thread % 8 == 0)
      prefetch_l2(static_cast<const char*>(finish.bias) + n * (finish.bias_dtype == QUAMBA_F32 ? 4 : 2));
  }

  using XTile = decltype(tile_to_shape(SM90::GMMA::Layout_K_SW128_Atom<Element>{},
                                       Shape<Int<TileM>, Int<kTileK>, Int<kStages>>{}));
  Tensor sx = make_tensor(make_smem_ptr(reinterpret_cast<Element*>(x_tiles)), XTile{});
  auto scatter = [&](const auto& acc) {  // ((2, 2, TileM / 8), 1, 1): tokens 2 t, 2 t + 1; channels g, g + 8
    const unsigned to = mail + warp % 2 * 512 + slot(lane / 4, lane % 4);
    cluster_wait();
#pragma unroll
    for (int b = 0; b < TileM / 8; ++b) {
      const int cell = 4 * b + warp / 2, turn = cell / splits;
      if (cell >= cells) break;
      const unsigned v[4] = {bits(acc(make_coord(0, 0, b), 0, 0)), bits(acc(make_coord(0, 1, b), 0, 0)),
                             bits(acc(make_coord(1, 0, b), 0, 0)), bits(acc(make_coord(1, 1, b), 0, 0))};
      if (splits > 1)
        send_quad(to + (turn * splits + rank) * kCellBytes, mailbox, cell - turn * splits, v);
      else
        asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to + cell * kCellBytes), "r"(v[0]), "r"(v[1]),
                     "r"(v[2]), "r"(v[3])
                     : "memory");
    }
    if (splits == 1) arrive(mailbox);
  };

  if constexpr (Packed) {
    if (threadIdx.x >= 128) {  // the scales of this share of K
      constexpr int kWidth = sizeof(typename Op::Raw);
      auto row = static_cast<const char*>(w.scale) +
                 static_cast<long long>(min(at.column + thread, w.O - 1)) * w.groups * kWidth;
      auto group_of = [&](int column) { return min(static_cast<int>(__umulhi(column, w.inverse)), w.groups - 1); };
      const int end = group_of(at.last * kTileK - 1) * kWidth;
      for (int i = group_of(at.step * kTileK) * kWidth; i < end; i += 32) prefetch_l2(row + i);
      prefetch_l2(row + end);
    }
    using Atom = decltype(SM90::GMMA::rs_op_selector<Element, Element, Sum, Shape<_64, Int<TileM>, Int<w4::kChunk>>>());
    auto mma = make_tiled_mma(Atom{});
    auto mine = mma.get_slice(thread);
    Tensor fx = mine.make_fragment_B(mine.partition_B(sx));
    Tensor acc = partition_fragment_C(mma, Shape<_64, Int<TileM>>{});
    constexpr int kSlices = decltype(size<2>(fx))::value / 2;  // of one wgmma in a chunk
    Tensor a0 = make_tensor<Element>(partition_shape_A(mma, Shape<_64, Int<w4::kChunk>>{}));
    Tensor a1 = make_fragment_like(a0);
    static_assert(decltype(size(a0))::value * sizeof(Element) == 4 * Op::kRegisters, "as fill makes them");

    const int channel = group * 64 + thread / 32 * 16 + lane / 4;
    const unsigned select = Op::selector(lane % 4);
    // a row is 64 bytes, its four 16-byte pieces exchanged by row: the 64-byte swizzle of TMA
    const unsigned words = shared_address(w_tiles) + channel * 64, turn = (channel / 2 & 3) << 4;
    auto unpack = [&](auto& a, int chunk, const w4::Scales<Element, 1>& scales) {
      unsigned word[2][8];
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          uint4 v = load_shared(words + stage * L::kWBytes + h * 512 + ((chunk * 32 + i * 16) ^ turn));
          word[h][4 * i] = v.x, word[h][4 * i + 1] = v.y, word[h][4 * i + 2] = v.z, word[h][4 * i + 3] = v.w;
        }
      const typename Op::Factor factor[1][2] = {{Op::factor(scales.raw[chunk][0]), Op::factor(scales.raw[chunk][1])}};
      Op::template fill<1>(reinterpret_cast<unsigned*>(raw_pointer_cast(a.data())), word, factor, select);
    };
    auto product = [&](auto& a, int chunk) {
      warpgroup_arrive();
#pragma unroll
      for (int k = 0; k < kSlices; ++k) {
        gemm(mma, a(_, _, k), fx(_, _, chunk * kSlices + k, stage), acc);
        mma.accumulate_ = SM90::GMMA::ScaleOut::One;
      }
      warpgroup_commit_batch();
    };

    w4::Scales<Element, 1> next;
    next.load(w, at, channel);
    mma.accumulate_ = SM90::GMMA::ScaleOut::Zero;
    for (int previous = -1; at.step < at.last;) {
      const w4::Scales<Element, 1> now = next;
      ++at.step;
      next.load(w, at, channel);
      wait(full + 8 * stage, parity);
      unpack(a0, 0, now);
      product(a0, 0);
      warpgroup_wait<1>();
      if (previous >= 0 && lane == 0) arrive(empty + 8 * previous);
      unpack(a1, 1, now);
      product(a1, 1);
      warpgroup_wait<1>();
      previous = stage;
      advance();
    }
    warpgroup_wait<0>();
    warpgroup_fence_operand(acc);  // or sums are copied before they are complete
    scatter(acc);
  } else {
    using Atom = decltype(SM90::GMMA::ss_op_selector<Element, Element, Sum, Shape<_128, Int<TileM>, Int<kTileK>>>());
    using WTile = decltype(tile_to_shape(SM90::GMMA::Layout_K_SW128_Atom<Element>{},
                                         Shape<Int<kTileO>, Int<kTileK>, Int<kStages>>{}));
    auto mma = make_tiled_mma(Atom{}, cute::Layout<Shape<_2, _1, _1>>{});
    auto mine = mma.get_slice(threadIdx.x);
    Tensor sw = make_tensor(make_smem_ptr(reinterpret_cast<Element*>(w_tiles)), WTile{});
    Tensor fw = mine.make_fragment_A(mine.partition_A(sw));
    Tensor fx = mine.make_fragment_B(mine.partition_B(sx));
    Tensor acc = partition_fragment_C(mma, Shape<_128, Int<TileM>>{});
    mma.accumulate_ = SM90::GMMA::ScaleOut::Zero;
    for (int previous = -1; at.step < at.last; ++at.step) {
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
    scatter(acc);
  }

  wait_for_previous_kernel();
  const int q = lane % 4, token = lane / 4;
#pragma unroll 1
  for (int j = warp; j < own; j += kMathWarps) {
    const int cell = j * splits + rank, row[1] = {at.row + cell / 4 * 8 + token};
    const unsigned from = mail + j * splits * kCellBytes + token % 2 * 8;
    Sum sum[4][2];  // of blocks of eight channels: channels 2 q, 2 q + 1
    finish_tile<1, kGroup, Op::kScaled>(finish, row, at.column + cell % 4 * 32, [&](int, int b) {
      if (b == 0) {  // what else the epilogue needs is on its way
        wait(mailbox, 0);
#pragma unroll
        for (int i = 0; i < 8; ++i) sum[i / 2][i % 2] = 0;
#pragma unroll 2
        for (int s = 0; s < splits; ++s)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            unsigned low, high;
            asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
                         : "=r"(low), "=r"(high)
                         : "r"(from + s * kCellBytes + i / 2 * 512 + slot(2 * q + i % 2, token / 2)));
            sum[i / 2 * 2][i % 2] += value_of<Sum>(low);
            sum[i / 2 * 2 + 1][i % 2] += value_of<Sum>(high);
          }
      }
      return make_float2(static_cast<float>(sum[b][0]), static_cast<float>(sum[b][1]));
    });
  }
  wait(mailbox, 0);  // cells beyond O are sent too, and must find this block
#endif
}

template <class Element, bool Packed, int TileM>
int launch(const QuambaLinear& a, const Plan& plan, cudaStream_t stream) {
  using Op = Operand<Element>;
  using L = Layout<Element, Packed, TileM>;
  static const Encode encode = encoder();
  if (!encode) return cudaErrorNotSupported;
  CUtensorMap x_map, w_map;
  const int columns = Packed ? a.K / 8 : a.K, box = Packed ? kTileK / 8 : kTileK;
  if (!describe(encode, &x_map, Op::kType, a.x, a.K, a.M, a.K * static_cast<long long>(sizeof(Element)), Op::kBox,
                TileM, CU_TENSOR_MAP_SWIZZLE_128B) ||
      !describe(encode, &w_map, Packed ? CU_TENSOR_MAP_DATA_TYPE_INT32 : CU_TENSOR_MAP_DATA_TYPE_UINT8, a.w, columns,
                a.O, Packed ? a.K / 2 : a.K, box, kTileO, Packed ? CU_TENSOR_MAP_SWIZZLE_64B : CU_TENSOR_MAP_SWIZZLE_128B))
    return cudaErrorInvalidValue;
  const Weights w{Op::kScaled ? a.w_multiplier : a.w_scale, a.M, a.O, a.K, Packed ? a.K / a.S : 1,
                  Packed ? static_cast<unsigned>(((1ull << 32) + a.S - 1) / a.S) : 0u};
  auto kernel = linear_few<Element, Packed, TileM>;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, L::kBytes);
  if (error == cudaSuccess)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = plan.splits;
  attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(plan.splits, (a.M + TileM - 1) / TileM, (a.O + kTileO - 1) / kTileO);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = L::kBytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = 2;
  error = cudaLaunchKernelEx(&config, kernel, x_map, w_map, w,
                             make_finish(a, Op::kScaled ? static_cast<const float*>(a.w_scale) : nullptr));
  return error != cudaSuccess ? error : cudaGetLastError();
}

template <class Element, bool Packed>
int run(const QuambaLinear& a, cudaStream_t stream) {
  if (a.K <= 0 || a.K % 32 || !quamba::can_finish(a)) return QUAMBA_UNSUPPORTED;
  if (Packed && (a.S <= 0 || a.S % w4::kChunk || a.K % a.S || static_cast<long long>(a.K) * a.S >> 32))
    return QUAMBA_UNSUPPORTED;
  int sms = 0;
  cudaError_t error = device_attribute(cudaDevAttrMultiProcessorCount, sms);
  if (error != cudaSuccess) return error;
  Plan plan = choose(a, 2 * sms);
  plan.splits = tuned("QUAMBA_SPLITS", plan.splits);
  plan.tokens = tuned("QUAMBA_TOKENS", plan.tokens);
  switch (plan.tokens) {
    case 16: return launch<Element, Packed, 16>(a, plan, stream);
    case 32: return launch<Element, Packed, 32>(a, plan, stream);
    default: return launch<Element, Packed, 64>(a, plan, stream);
  }
}

}  // namespace quamba::few
