// y = (x w^T) * x_scale * w_scale + bias + residual for many rows on Hopper: int8 wgmma fed by TMA.
//
// x int8 [M, K], w int8 [O, K], both with K contiguous, which is the only order that 8-bit wgmma takes. The mainloops,
// the warp specialisation and the tile schedulers are CUTLASS's; the epilogue is finish.cuh, which knows the types of
// bias, residual and y at run time, so that a tile is one kernel and not one for each combination.
#define CUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED  // tiles of 160 and 192 columns as single instructions

#include <cstdlib>
#include <iterator>

#include "cute/tensor.hpp"
#include "cutlass/cutlass.h"
#include "cutlass/device_kernel.h"
#include "cutlass/epilogue/collective/detail.hpp"
#include "cutlass/epilogue/dispatch_policy.hpp"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/gemm/kernel/gemm_universal.hpp"

#include "finish.cuh"

namespace quamba::w8a8 {

using namespace cute;
namespace gemm = cutlass::gemm;

// A CUTLASS collective epilogue that hands the accumulators to finish_tile and needs no shared memory.
class Epilogue {
 public:
  using DispatchPolicy = cutlass::epilogue::NoSmemWarpSpecialized;
  using ElementC = void;
  using ElementD = float;  // stands for whatever y is
  using StrideC = Stride<int64_t, _1, int64_t>;
  using StrideD = StrideC;
  struct SharedStorage {};
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
                                 int thread, char*) {
    // acc is ((2, 2, N / 8), blocks of 64 rows a warp group, 1): (neighbours, rows g and g + 8, blocks of 8 columns)
    constexpr int kGroups = size(Mma{}) / 128, kHigh = decltype(size<1>(acc))::value;
    constexpr int kBlocks = decltype(size<0, 2>(acc))::value;
    static_assert(decltype(size<2>(acc))::value == 1, "one instruction spans the columns of a tile");
    int row[2 * kHigh];
    int top = get<0>(coord) * size<0>(tile) + thread / 128 * 64 + thread % 128 / 32 * 16 + thread % 32 / 4;
    CUTLASS_PRAGMA_UNROLL
    for (int r = 0; r < 2 * kHigh; ++r) row[r] = top + r / 2 * (64 * kGroups) + r % 2 * 8;
    quamba::finish_tile<2 * kHigh, kBlocks>(params, row, get<1>(coord) * size<1>(tile), [&](int r, int b) {
      return make_float2(static_cast<float>(acc(make_coord(0, r % 2, b), r / 2, 0)),
                         static_cast<float>(acc(make_coord(1, r % 2, b), r / 2, 0)));
    });
  }

 private:
  const Params& params;
};

template <int TileM, int TileN, int ClusterM, class Schedule, class Scheduler>
struct Config {
  using Tile = Shape<Int<TileM>, Int<TileN>, _128>;
  using Cluster = Shape<Int<ClusterM>, _1, _1>;
  using Finisher = cutlass::epilogue::collective::detail::Sm90TmaWarpSpecializedAdapter<Epilogue>;
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
    cudaLaunchAttribute cluster;
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {ClusterM, 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = Kernel::get_grid_shape(params);
    config.blockDim = Kernel::get_block_shape();
    config.dynamicSmemBytes = Kernel::SharedStorageSize;
    config.stream = stream;
    config.attrs = &cluster;
    config.numAttrs = 1;
    error = cudaLaunchKernelEx(&config, kernel, params);
    return error != cudaSuccess ? error : cudaGetLastError();
  }
};

using Cooperative = gemm::KernelTmaWarpSpecializedCooperative;
using Pingpong = gemm::KernelTmaWarpSpecializedPingpong;
using Persistent = gemm::PersistentScheduler;
using StreamK = gemm::StreamKScheduler;

// What the choice needs to know of a configuration: its tile, the share of the tensor cores' peak that its main loop
// reaches, the cycles a tile costs besides (in a pingpong most of them hide behind the other tile), and how it runs.
struct Choice {
  int tile_m, tile_n, cluster;
  bool stream_k;
  float rate, extra;
  int (*launch)(const QuambaLinear&, int, cudaStream_t);
  long long (*workspace)(const QuambaLinear&, int);
};

template <int TileM, int TileN, int ClusterM, class Schedule, class Scheduler>
constexpr Choice choice(float rate, float extra) {
  using C = Config<TileM, TileN, ClusterM, Schedule, Scheduler>;
  return {TileM, TileN, ClusterM, C::kStreamK, rate, extra, C::launch, C::workspace};
}

const Choice kChoices[] = {
    choice<128, 256, 2, Cooperative, Persistent>(0.72f, 4000.f),
    choice<128, 192, 2, Cooperative, Persistent>(0.70f, 3500.f),
    choice<128, 160, 2, Pingpong, Persistent>(0.68f, 1200.f),
    choice<128, 128, 2, Pingpong, Persistent>(0.66f, 1000.f),
    choice<64, 128, 1, Pingpong, Persistent>(0.50f, 800.f),
    choice<128, 64, 1, Cooperative, StreamK>(0.45f, 3000.f),
#ifdef QUAMBA_TUNE  // candidates, never chosen by themselves
    choice<256, 128, 2, Cooperative, Persistent>(1e-3f, 0.f),
    choice<128, 256, 2, Cooperative, StreamK>(1e-3f, 0.f),
    choice<256, 160, 2, Cooperative, Persistent>(1e-3f, 0.f),
    choice<128, 256, 1, Cooperative, Persistent>(1e-3f, 0.f),
#endif
};

int multiprocessors() {
  int device = 0, count = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess)
    return 0;
  return count;
}

// Estimated cycles: whole waves of tiles, or for stream-K the tiles' work spread evenly.
float cycles(const Choice& c, const QuambaLinear& a, int sms) {
  auto up = [](long long n, long long d) { return (n + d - 1) / d; };
  long long rows = up(up(a.M, c.tile_m), c.cluster) * c.cluster, tiles = rows * up(a.O, c.tile_n);
  float tile = up(a.K, 128) * 128.f * c.tile_m * c.tile_n / (4096.f * c.rate);
  if (c.stream_k) return tile * tiles / sms + c.extra * up(tiles, sms) + 4000.f;
  return up(tiles, sms / c.cluster * c.cluster) * (tile + c.extra);
}

const Choice& best(const QuambaLinear& a, int sms) {
#ifdef QUAMBA_TUNE
  if (const char* forced = std::getenv("QUAMBA_TILE")) return kChoices[std::atoi(forced) % std::size(kChoices)];
#endif
  const Choice* found = kChoices;
  for (const Choice& c : kChoices)
    if (cycles(c, a, sms) < cycles(*found, a, sms)) found = &c;
  return *found;
}

bool serves(const QuambaLinear& a) {
  return a.x_dtype == QUAMBA_I8 && a.x_scale && a.w_scale && a.K > 0 && a.K % 32 == 0 && quamba::can_finish(a);
}

}  // namespace quamba::w8a8

extern "C" long long quamba_linear_w8a8_gemm_workspace(const QuambaLinear* a) {
  using namespace quamba::w8a8;
  int sms = serves(*a) ? multiprocessors() : 0;
  return sms ? best(*a, sms).workspace(*a, sms) : 0;
}

extern "C" int quamba_linear_w8a8_gemm(const QuambaLinear* a, void* stream) {
  using namespace quamba::w8a8;
  if (!serves(*a)) return QUAMBA_UNSUPPORTED;
  int sms = multiprocessors();
  if (!sms) return cudaErrorInvalidDevice;
  return best(*a, sms).launch(*a, sms, static_cast<cudaStream_t>(stream));
}

#ifdef QUAMBA_TUNE
extern "C" int quamba_linear_w8a8_gemm_tiles() { return std::size(quamba::w8a8::kChoices); }
extern "C" void quamba_linear_w8a8_gemm_tile(int i, int* out) {
  const auto& c = quamba::w8a8::kChoices[i];
  out[0] = c.tile_m, out[1] = c.tile_n, out[2] = c.cluster, out[3] = c.stream_k;
}
#endif
