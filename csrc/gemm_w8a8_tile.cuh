// y = (x w^T) * x_scale * w_scale + bias + residual for many rows on Hopper: int8 wgmma fed by TMA.
//
// x int8 [M, K], w int8 [O, K], both with K contiguous, which is the only order that 8-bit wgmma takes. The mainloops,
// the warp specialisation and the tile schedulers are CUTLASS's; the epilogue is finish.cuh, which knows the types of
// bias, residual and y at run time, so that a tile is one kernel and not one for each combination.
#pragma once

// Defining CUTLASS_ENABLE_GDC_FOR_SM90 before lets a kernel be set up while the one before it still runs; CUTLASS's
// stream-K does not compile with it.

#include <cstdlib>
#include <type_traits>

#include "cute/tensor.hpp"
#include "cutlass/cutlass.h"
#include "cutlass/device_kernel.h"
#include "cutlass/epilogue/collective/detail.hpp"
#include "cutlass/epilogue/dispatch_policy.hpp"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/gemm/kernel/gemm_universal.hpp"

#include "finish.cuh"
#include "gemm_w8a8_choice.h"
#include "tma.cuh"
#include "wgmma_160.cuh"

namespace quamba::w8a8 {

using namespace cute;
namespace gemm = cutlass::gemm;

// What the epilogue needs: the residual is described for TMA where it comes through shared memory.
struct Finishing : quamba::Finish {
  CUtensorMap residual_map;
  uint32_t tma_transaction_bytes;  // of 32 columns of it; 0: it is read from where it is
};

// An fp32 residual in shared memory, 32 columns of a tile at a time, as TMA brings them: rows of 128 bytes whose
// 16-byte pieces are exchanged by bits of the address.
template <int Rows, class Pipeline>
struct SharedResidual {
  static constexpr bool kAdds = true, kEvery = true;
  static constexpr int kAhead = 0;
  Pipeline& pipeline;
  typename Pipeline::PipelineState& state;
  unsigned chunks;  // the ring, from this lane's columns on
  int bytes, top;   // of a piece of the ring; of the tile

  __device__ __forceinline__ void operator()(int step, int row, int, float2 (&r)[kGroup]) const {
    if (step % Rows == 0) pipeline.consumer_wait(state);
    unsigned from = chunks + state.index() * bytes + (row - top) * 128;
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      unsigned at = from + 32 * j;
      asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
                   : "=f"(r[j].x), "=f"(r[j].y)
                   : "r"(at ^ (at >> 7 & 7) << 4)
                   : "memory");
    }
    if (step % Rows == Rows - 1) {
      cutlass::arch::fence_view_async_shared();  // what comes next is written by TMA
      pipeline.consumer_release(state);
      ++state;
    }
  }
};

// A CUTLASS collective epilogue that hands the accumulators to finish.cuh. Each of the two warp groups that multiply
// has the parameters of its tile's columns in shared memory. With a Ring, a warp brings an fp32 residual of an fp32
// result there too, so that nothing waits for memory after the last main loop.
template <int TileM, int TileN, int Ring>
class Epilogue {
 public:
  using DispatchPolicy = cutlass::epilogue::NoSmemWarpSpecialized;
  using GmemTiledCopyC = void;
  using GmemTiledCopyD = void;
  using ElementC = void;
  using ElementD = float;  // stands for whatever y is
  using StrideC = Stride<int64_t, _1, int64_t>;
  using StrideD = StrideC;
  using Columns = quamba::SharedColumns<TileN>;
  static constexpr int kColumns = kBlock * kGroup, kChunk = TileM * kColumns * 4, kChunks = TileN / kColumns;
  struct TensorStorage {
    alignas(128) char residual[Ring ? Ring * kChunk : 16];
    alignas(16) typename Columns::Storage columns[2];
  };
  using LoadPipeline = cutlass::PipelineTransactionAsync<Ring>;
  using LoadPipelineState = cutlass::PipelineState<Ring>;
  using PipelineStorage = typename LoadPipeline::SharedStorage;
  using StorePipeline = cutlass::PipelineTmaStore<0>;
  using StorePipelineState = cutlass::PipelineState<0>;
  static constexpr uint32_t TmaTransactionBytes = kChunk;
  static constexpr bool RequiresTransactionBytes = true;
  using TensorMapStorage = TensorStorage;
  using Arguments = Finishing;
  using Params = Finishing;

  template <class Shape>
  static Params to_underlying_arguments(const Shape&, const Arguments& args, void*) {
    return args;
  }
  template <class Shape>
  static size_t get_workspace_size(const Shape&, const Arguments&) {
    return 0;
  }
  template <class Shape>
  static cutlass::Status initialize_workspace(const Shape&, const Arguments&, void*, cudaStream_t,
                                              cutlass::CudaHostAdapter* = nullptr) {
    return cutlass::Status::kSuccess;
  }
  template <class Shape>
  static bool can_implement(const Shape&, const Arguments&) {
    return true;
  }
  template <class Tile>
  CUTLASS_HOST_DEVICE static constexpr int get_load_pipe_increment(Tile) {
    return kChunks;
  }
  template <class Tile>
  CUTLASS_HOST_DEVICE static constexpr int get_store_pipe_increment(Tile) {
    return 1;
  }
  CUTLASS_DEVICE static void prefetch_tma_descriptors(const Params&) {}

  CUTLASS_DEVICE Epilogue(const Params& params, TensorStorage&) : params(params) {}

  CUTLASS_DEVICE bool is_producer_load_needed() const { return Ring && params.tma_transaction_bytes; }

  template <class Problem, class Tile, class Coord, class Mma>
  CUTLASS_DEVICE LoadPipelineState load(LoadPipeline pipeline, LoadPipelineState state, Problem, Tile, Coord coord, Mma,
                                        int lane, TensorStorage& storage, int = -1) {
    if constexpr (Ring > 0) {
      int row = get<0>(coord) * TileM, first = get<1>(coord) * TileN;
      for (int c = 0; c < kChunks; ++c, ++state) {
        pipeline.producer_acquire(state);
        if (lane == 0) {
          pipeline.producer_expect_transaction(state);
          quamba::load_box_once(quamba::shared_address(storage.residual + state.index() * kChunk),
                                &params.residual_map,
                                quamba::shared_address(pipeline.producer_get_barrier(state)), first + c * kColumns,
                                row);
        }
        pipeline.producer_commit(state);
      }
    }
    return state;
  }
  CUTLASS_DEVICE LoadPipelineState load_tail(LoadPipeline, LoadPipelineState state) { return state; }

  template <class Problem, class Tile, class Coord, class Engine, class Layout, class Mma>
  CUTLASS_DEVICE auto store(LoadPipeline pipeline, LoadPipelineState state, StorePipeline, StorePipelineState stored,
                            Problem, Tile tile, Coord coord, Tensor<Engine, Layout> acc, Mma, int thread,
                            TensorStorage& storage, int = -1) {
    // acc is ((2, 2, N / 8), blocks of 64 rows a warp group, 1): (neighbours, rows g and g + 8, blocks of 8 columns)
    constexpr int kGroups = size(Mma{}) / 128, kHigh = decltype(size<1>(acc))::value;
    constexpr int kBlocks = decltype(size<0, 2>(acc))::value;
    static_assert(decltype(size<2>(acc))::value == 1, "one instruction spans the columns of a tile");
    int row[2 * kHigh], above = get<0>(coord) * size<0>(tile);
    int top = above + thread / 128 * 64 + thread % 128 / 32 * 16 + thread % 32 / 4;
    CUTLASS_PRAGMA_UNROLL
    for (int r = 0; r < 2 * kHigh; ++r) row[r] = top + r / 2 * (64 * kGroups) + r % 2 * 8;
    int group = threadIdx.x / 128 - 1, first = get<1>(coord) * size<1>(tile);  // the first warp group loads
    Columns columns{params, first, storage.columns[group],
                    static_cast<int>(cutlass::arch::NamedBarrier::ReservedNamedBarrierCount) + group};
    auto value = [&](int r, int b) {
      return make_float2(static_cast<float>(acc(make_coord(0, r % 2, b), r / 2, 0)),
                         static_cast<float>(acc(make_coord(1, r % 2, b), r / 2, 0)));
    };
    if constexpr (Ring > 0) {
      if (is_producer_load_needed()) {
        SharedResidual<2 * kHigh, LoadPipeline> residual{
            pipeline, state, quamba::shared_address(storage.residual) + thread % 4 * 8, kChunk, above};
        quamba::finish_typed<QUAMBA_F32, 2 * kHigh, kBlocks>(params, row, first, columns, residual, value);
        return cute::make_tuple(state, stored);
      }
    }
    quamba::finish_columns<2 * kHigh, kBlocks>(params, row, first, columns, value);
    return cute::make_tuple(state, stored);
  }
  CUTLASS_DEVICE auto store_tail(LoadPipeline, LoadPipelineState state, StorePipeline, StorePipelineState stored) {
    return cute::make_tuple(state, stored);
  }

 private:
  const Params& params;
};

#ifdef CUTLASS_ENABLE_GDC_FOR_SM90
#if defined(__CUDA_ARCH__) && !defined(CUTLASS_GDC_ENABLED)
#error "this CUTLASS does not make its kernels wait for the one before; take nvidia-cutlass 4.2 or newer"
#endif
constexpr bool kEarly = true;
#else
constexpr bool kEarly = false;
#endif

// A main loop whose instructions span the columns of its tile: as it was built, but for 160 of them.
template <int TileN, class Mainloop>
struct Spanning {
  using type = Mainloop;
};
template <class Policy, class Tile, class A, class StrideA, class B, class StrideB, class Mma, class... Copies>
struct Spanning<160, gemm::collective::CollectiveMma<Policy, Tile, A, StrideA, B, StrideB, Mma, Copies...>> {
  static_assert(size(Mma{}) == 128, "a warp group has the whole tile");
  using type = gemm::collective::CollectiveMma<Policy, Tile, A, StrideA, B, StrideB,
                                               decltype(make_tiled_mma(Columns160<int8_t, true>{})), Copies...>;
};

template <int TileM, int TileN, int ClusterM, class Schedule, class Scheduler, int Ring>
struct Config {
  using Tile = Shape<Int<TileM>, Int<TileN>, _128>;
  using Cluster = Shape<Int<ClusterM>, _1, _1>;
  using Finisher = Epilogue<TileM, TileN, Ring>;
  using Built = typename gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, int8_t, cutlass::layout::RowMajor, 16, int8_t,
      cutlass::layout::ColumnMajor, 16, int32_t, Tile, Cluster,
      gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename Finisher::TensorStorage))>,
      Schedule>::CollectiveOp;
  using Mainloop = typename Spanning<TileN, Built>::type;
  using Kernel = gemm::kernel::GemmUniversal<Shape<int, int, int, int>, Mainloop, Finisher, Scheduler>;
  static constexpr bool kStreamK = std::is_same_v<Scheduler, gemm::StreamKScheduler>;

  static typename Kernel::Arguments arguments(const QuambaLinear& a, int sms) {
    typename Kernel::Arguments args;
    args.mode = gemm::GemmUniversalMode::kGemm;
    args.problem_shape = {a.M, a.O, a.K, 1};
    args.mainloop.ptr_A = static_cast<const int8_t*>(a.x);
    args.mainloop.ptr_B = static_cast<const int8_t*>(a.w);
    args.mainloop.dA = {a.K, _1{}, _0{}};
    args.mainloop.dB = {a.K, _1{}, _0{}};
    static_cast<quamba::Finish&>(args.epilogue) = quamba::make_finish(a, static_cast<const float*>(a.w_scale));
    args.hw_info.sm_count = sms;
#ifdef QUAMBA_TUNE
    if (const char* swizzle = std::getenv("QUAMBA_SWIZZLE")) args.scheduler.max_swizzle_size = std::atoi(swizzle);
    if (const char* raster = std::getenv("QUAMBA_RASTER")) {
      using Order = decltype(args.scheduler.raster_order);
      args.scheduler.raster_order = *raster == 'm' ? Order::AlongM : *raster == 'n' ? Order::AlongN : Order::Heuristic;
    }
#endif
    return args;
  }

  static long long workspace(const QuambaLinear& a, int sms) {
    return kStreamK ? static_cast<long long>(Kernel::get_workspace_size(arguments(a, sms))) : 0;
  }

  static int launch(const QuambaLinear& a, int sms, cudaStream_t stream) {
    auto args = arguments(a, sms);
    if constexpr (kStreamK) {
      if (a.workspace_bytes < workspace(a, sms)) return QUAMBA_UNSUPPORTED;
      if (Kernel::initialize_workspace(args, a.workspace, stream) != cutlass::Status::kSuccess)
        return cudaErrorUnknown;
    }
    if (Ring && a.residual && a.residual_dtype == QUAMBA_F32 && args.epilogue.y_dtype == QUAMBA_F32) {
      static const quamba::Encode encode = quamba::encoder();
      if (!encode) return cudaErrorNotSupported;
      if (!quamba::describe(encode, &args.epilogue.residual_map, CU_TENSOR_MAP_DATA_TYPE_FLOAT32, a.residual, a.O, a.M,
                            a.O * 4ll, Finisher::kColumns, TileM, CU_TENSOR_MAP_SWIZZLE_128B))
        return cudaErrorInvalidValue;
      args.epilogue.tma_transaction_bytes = Finisher::kChunk;
    }
    auto params = Kernel::to_underlying_arguments(args, a.workspace);
    auto kernel = cutlass::device_kernel<Kernel>;
    cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Kernel::SharedStorageSize);
    if (error != cudaSuccess) return error;
    cudaLaunchAttribute attributes[2];
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim = {ClusterM, 1, 1};
    attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[1].val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = Kernel::get_grid_shape(params);
    config.blockDim = Kernel::get_block_shape();
    config.dynamicSmemBytes = Kernel::SharedStorageSize;
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = kEarly ? 2 : 1;
    error = cudaLaunchKernelEx(&config, kernel, params);
    return error != cudaSuccess ? error : cudaGetLastError();
  }
};

using Cooperative = gemm::KernelTmaWarpSpecializedCooperative;
using Pingpong = gemm::KernelTmaWarpSpecializedPingpong;
using Persistent = gemm::PersistentScheduler;
using StreamK = gemm::StreamKScheduler;

template <int TileM, int TileN, int ClusterM, class Schedule, class Scheduler, int Ring = 0>
constexpr Choice choice(float rate, float extra) {
  using C = Config<TileM, TileN, ClusterM, Schedule, Scheduler, Ring>;
  constexpr char kind = C::kStreamK ? 's' : std::is_same_v<Schedule, Pingpong> ? 'p' : 'c';
  return {TileM, TileN, ClusterM, kind, rate, extra, C::launch, C::workspace};
}

constexpr Choice narrow(Choice c) {
  c.kind = 'n';
  return c;
}

template <int N>
constexpr Choices choices(const Choice (&all)[N]) {
  return {all, all + N};
}

}  // namespace quamba::w8a8
