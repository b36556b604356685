// y = (x w^T) * x_scale * w_scale + bias + residual for many rows on Ampere and Ada: int8 mma.sync fed by cp.async.
//
// x int8 [M, K], w int8 [O, K], both with K contiguous. CUTLASS has the main loop of a tile; the kernel around it walks
// over tiles so that what runs together shares x and w in L2, and ends in finish.cuh, which takes the accumulators from
// registers.
#include <cstdlib>
#include <iterator>

#include "cutlass/cutlass.h"
#include "cutlass/gemm/threadblock/default_mma.h"
#include "cutlass/gemm/threadblock/mma_multistage.h"

#include "finish.cuh"

#ifndef QUAMBA_SM
#error "build with -DQUAMBA_SM=80, 86, 87 or 89: the number of stages depends on the shared memory of a multiprocessor"
#endif

namespace quamba::w8a8 {

constexpr bool kRoomy = QUAMBA_SM == 80 || QUAMBA_SM == 87;  // 163 KiB of shared memory a block, else 99
constexpr int kBand = 8;                                      // rows of tiles that are walked together

template <int TileM, int TileN, int TileK, int WarpM, int WarpN, int Stages>
struct Config {
  using Core = typename cutlass::gemm::threadblock::DefaultMma<
      int8_t, cutlass::layout::RowMajor, 16, int8_t, cutlass::layout::ColumnMajor, 16, int32_t,
      cutlass::layout::RowMajor, cutlass::arch::OpClassTensorOp, cutlass::arch::Sm80,
      cutlass::gemm::GemmShape<TileM, TileN, TileK>, cutlass::gemm::GemmShape<WarpM, WarpN, TileK>,
      cutlass::gemm::GemmShape<16, 8, 32>, Stages, cutlass::arch::OpMultiplyAddSaturate>::ThreadblockMma;
  static constexpr int kTileM = TileM, kTileN = TileN, kTileK = TileK, kWarpM = WarpM, kWarpN = WarpN;
  static constexpr int kWarpsM = TileM / WarpM, kThreads = 32 * kWarpsM * (TileN / WarpN);
  static constexpr int kBytes = sizeof(typename Core::SharedStorage);

  struct Params {
    typename Core::IteratorA::Params walk_x;
    typename Core::IteratorB::Params walk_w;
    int8_t *x, *w;
    int M, O, K;
    Finish finish;
  };

  static int launch(const QuambaLinear& a, cudaStream_t stream);
};

template <class C>
__global__ void __launch_bounds__(C::kThreads) multiply(const __grid_constant__ typename C::Params p) {
  using Core = typename C::Core;
  extern __shared__ __align__(128) char smem[];
  int tiles_m = (p.M + C::kTileM - 1) / C::kTileM, tiles_n = (p.O + C::kTileN - 1) / C::kTileN;
  int band = blockIdx.x / (kBand * tiles_n), inside = blockIdx.x - band * kBand * tiles_n;
  int high = min(kBand, tiles_m - band * kBand);
  int top = (band * kBand + inside % high) * C::kTileM, left = inside / high * C::kTileN;

  int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  typename Core::IteratorA x(p.walk_x, p.x, {p.M, p.K}, threadIdx.x, {top, 0});
  typename Core::IteratorB w(p.walk_w, p.w, {p.K, p.O}, threadIdx.x, {0, left});
  Core core(*reinterpret_cast<typename Core::SharedStorage*>(smem), threadIdx.x, warp, lane);
  typename Core::FragmentC acc;
  acc.clear();
  core((p.K + C::kTileK - 1) / C::kTileK, acc, x, w, acc);

  // acc holds 16 x 8 fragments of four, those of a column of the warp's tile after each other
  constexpr int kHigh = C::kWarpM / 16;
  int row[2 * kHigh], first = top + warp % C::kWarpsM * C::kWarpM + lane / 4;
#pragma unroll
  for (int r = 0; r < 2 * kHigh; ++r) row[r] = first + r / 2 * 16 + r % 2 * 8;
  finish_tile<2 * kHigh, C::kWarpN / 8>(p.finish, row, left + warp / C::kWarpsM * C::kWarpN, [&](int r, int b) {
    int at = 4 * (r / 2 + b * kHigh) + r % 2 * 2;
    return make_float2(static_cast<float>(acc[at]), static_cast<float>(acc[at + 1]));
  });
}

template <int TileM, int TileN, int TileK, int WarpM, int WarpN, int Stages>
int Config<TileM, TileN, TileK, WarpM, WarpN, Stages>::launch(const QuambaLinear& a, cudaStream_t stream) {
  Params p{typename Core::IteratorA::Params(cutlass::layout::RowMajor(a.K)),
           typename Core::IteratorB::Params(cutlass::layout::ColumnMajor(a.K)),
           static_cast<int8_t*>(const_cast<void*>(a.x)),
           static_cast<int8_t*>(const_cast<void*>(a.w)),
           a.M,
           a.O,
           a.K,
           make_finish(a, static_cast<const float*>(a.w_scale))};
  auto kernel = multiply<Config>;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  long long tiles = static_cast<long long>((a.M + TileM - 1) / TileM) * ((a.O + TileN - 1) / TileN);
  if (tiles > 0x7fffffff) return QUAMBA_UNSUPPORTED;
  kernel<<<static_cast<unsigned>(tiles), kThreads, kBytes, stream>>>(p);
  return cudaGetLastError();
}

// A tile, how many blocks of it a multiprocessor holds, and its speed against the largest one's.
struct Choice {
  int tile_m, tile_n, resident;
  float rate;
  int (*launch)(const QuambaLinear&, cudaStream_t);
};

template <int TileM, int TileN, int TileK, int WarpM, int WarpN, int Stages>
constexpr Choice choice(int resident, float rate) {
  return {TileM, TileN, resident, rate, Config<TileM, TileN, TileK, WarpM, WarpN, Stages>::launch};
}

const Choice kChoices[] = {
    choice<128, 256, 64, 64, 64, kRoomy ? 4 : 3>(1, 1.00f),
    choice<256, 128, 64, 64, 64, kRoomy ? 4 : 3>(1, 0.98f),
    choice<128, 128, 64, 64, 64, kRoomy ? 5 : 3>(2, 0.92f),
    choice<64, 128, 64, 32, 64, kRoomy ? 5 : 4>(2, 0.75f),
    choice<64, 64, 128, 32, 32, kRoomy ? 5 : 3>(2, 0.55f),
};

const Choice& best(const QuambaLinear& a, int sms) {
#ifdef QUAMBA_TUNE
  if (const char* forced = std::getenv("QUAMBA_TILE")) return kChoices[std::atoi(forced) % std::size(kChoices)];
#endif
  auto time = [&](const Choice& c) {  // blocks that share a multiprocessor share its tensor cores
    long long tiles = static_cast<long long>((a.M + c.tile_m - 1) / c.tile_m) * ((a.O + c.tile_n - 1) / c.tile_n);
    long long slots = static_cast<long long>(sms) * c.resident, full = tiles / slots * c.resident, rest = tiles % slots;
    return (full + (rest + sms - 1) / sms) * static_cast<float>(c.tile_m * c.tile_n) / c.rate;
  };
  const Choice* found = kChoices;
  for (const Choice& c : kChoices)
    if (time(c) < time(*found)) found = &c;
  return *found;
}

}  // namespace quamba::w8a8

extern "C" int quamba_linear_w8a8_gemm(const QuambaLinear* a, void* stream) {
  using namespace quamba::w8a8;
  if (a->x_dtype != QUAMBA_I8 || !a->x_scale || !a->w_scale || a->K <= 0 || a->K % 32 || !quamba::can_finish(*a))
    return QUAMBA_UNSUPPORTED;
  int device = 0, sms = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
  return error == cudaSuccess ? best(*a, sms).launch(*a, static_cast<cudaStream_t>(stream)) : error;
}
