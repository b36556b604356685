// y = (x w^T) * x_scale * w_scale + bias + residual for many rows on Hopper: int8 wgmma fed by TMA.
//
// x int8 [M, K], w int8 [O, K], both with K contiguous, which is the only order that 8-bit wgmma takes. The mainloops,
// the warp specialisation and the tile schedulers are CUTLASS's; the epilogue is finish.cuh, which knows the types of
// bias, residual and y at run time, so that a tile is one kernel and not one for each combination.
#pragma once

// Defining CUTLASS_ENABLE_GDC_FOR_SM90 before lets a kernel be set up while the one before it still runs; CUTLASS's
// stream-K does not compile with it.
#define CUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED  // instructions of 160 columns

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

namespace quamba::w8a8 {

using namespace cute;
namespace gemm = cutlass::gemm;

// A CUTLASS collective epilogue that hands the accumulators to finish_columns. Each of the two warp groups that
// multiply has the parameters of its tile's columns in shared memory.
template <int TileN>
class Epilogue {
 public:
  using DispatchPolicy = cutlass::epilogue::NoSmemWarpSpecialized;
  using ElementC = void;
  using ElementD = float;  // stands for whatever y is
  using StrideC = Stride<int64_t, _1, int64_t>;
  using StrideD = StrideC;
  using Columns = quamba::SharedColumns<TileN>;
  struct SharedStorage {
    alignas(16) typename Columns::Storage columns[2];
  };
  using Arguments = quamba::Finish;
  using Params = quamba::Finish;

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

  CUTLASS_HOST_DEVICE Epilogue(const Params& params) : params(params) {}

  template <class Problem, class Tile, class Coord, class Engine, class Layout, class Mma, class Residue>
  CUTLASS_DEVICE void operator()(Problem, Tile tile, Coord coord, const Tensor<Engine, Layout>& acc, Mma, Residue,
                                 int thread, char* smem) {
    // acc is ((2, 2, N / 8), blocks of 64 rows a warp group, 1): (neighbours, rows g and g + 8, blocks of 8 columns)
    constexpr int kGroups = size(Mma{}) / 128, kHigh = decltype(size<1>(acc))::value;
    constexpr int kBlocks = decltype(size<0, 2>(acc))::value;
    static_assert(decltype(size<2>(acc))::value == 1, "one instruction spans the columns of a tile");
    int row[2 * kHigh];
    int top = get<0>(coord) * size<0>(tile) + thread / 128 * 64 + thread % 128 / 32 * 16 + thread % 32 / 4;
    CUTLASS_PRAGMA_UNROLL
    for (int r = 0; r < 2 * kHigh; ++r) row[r] = top + r / 2 * (64 * kGroups) + r % 2 * 8;
    int group = threadIdx.x / 128 - 1, first = get<1>(coord) * size<1>(tile);  // the first warp group loads
    Columns columns{params, first, reinterpret_cast<SharedStorage*>(smem)->columns[group],
                    static_cast<int>(cutlass::arch::NamedBarrier::ReservedNamedBarrierCount) + group};
    quamba::finish_columns<2 * kHigh, kBlocks>(params, row, first, columns, [&](int r, int b) {
      return make_float2(static_cast<float>(acc(make_coord(0, r % 2, b), r / 2, 0)),
                         static_cast<float>(acc(make_coord(1, r % 2, b), r / 2, 0)));
    });
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

template <int TileM, int TileN, int ClusterM, class Schedule, class Scheduler>
struct Config {
  using Tile = Shape<Int<TileM>, Int<TileN>, _128>;
  using Cluster = Shape<Int<ClusterM>, _1, _1>;
  using Finisher = cutlass::epilogue::collective::detail::Sm90TmaWarpSpecializedAdapter<Epilogue<TileN>>;
  using Mainloop = typename gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, int8_t, cutlass::layout::RowMajor, 16, int8_t,
      cutlass::layout::ColumnMajor, 16, int32_t, Tile, Cluster,
      gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename Finisher::TensorStorage))>,
      Schedule>::CollectiveOp;
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
    args.epilogue = quamba::make_finish(a, static_cast<const float*>(a.w_scale));
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

template <int TileM, int TileN, int ClusterM, class Schedule, class Scheduler>
constexpr Choice choice(float rate, float extra) {
  using C = Config<TileM, TileN, ClusterM, Schedule, Scheduler>;
  constexpr char kind = C::kStreamK ? 's' : std::is_same_v<Schedule, Pingpong> ? 'p' : 'c';
  return {TileM, TileN, ClusterM, kind, rate, extra, C::launch, C::workspace};
}

template <int N>
constexpr Choices choices(const Choice (&all)[N]) {
  return {all, all + N};
}

}  // namespace quamba::w8a8
