// How the linear over few tokens (linear_few_sm90.cuh) is launched: what a device allows, the plan, and the kernel
// that it names.
#pragma once

#include <algorithm>

#include "linear_few_plan.h"
#include "linear_few_sm90.cuh"

namespace quamba::few {

// Whether the two halves of a step may lie in two groups.
template <bool Packed>
bool halves(const QuambaLinear& a) {
  return Packed && a.S % kTileK != 0;
}

template <class Element, bool Packed, int TileM, Form kForm = Form::kPlain>
struct Launch {
  using Op = Operand<Element>;
  using L = Layout<Element, Packed, TileM, kForm>;

  static void configure(cudaLaunchConfig_t& config, cudaLaunchAttribute (&attributes)[2], dim3 grid, int blocks) {
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim.x = grid.x;
    attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
    attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[1].val.programmaticStreamSerializationAllowed = 1;
    config.gridDim = grid;
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = L::shared_bytes(blocks);
    config.attrs = attributes;
    config.numAttrs = 2;
  }

  static cudaError_t limits(Limits& found, bool halves) {
    auto kernel = linear_few<Element, Packed, TileM, kForm>;
    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, L::shared_bytes(1));
    if (error == cudaSuccess)
      error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                   cudaSharedmemCarveoutMaxShared);
    for (int blocks = L::kDense ? L::kBlocks : 1; blocks <= L::kBlocks; ++blocks) {
      const bool overlaid = L::kOverlaid || L::kMayOverlay;
      const int most = L::stages(blocks, most_mail(TileM, L::kFold), halves, overlaid) >= 3 ? kMaxSplits : 0;
      for (int splits = 1; splits <= most && error == cudaSuccess; ++splits) {
        cudaLaunchConfig_t config = {};
        cudaLaunchAttribute attributes[2] = {};
        configure(config, attributes, dim3(splits), blocks);
        config.numAttrs = 1;
        error = cudaOccupancyMaxActiveClusters(&found.clusters[blocks][splits], kernel, &config);
      }
    }
    return error;
  }

  static int run(const QuambaLinear& a, const Plan& plan, cudaStream_t stream) {
    static const Encode encode = encoder();
    if (!encode) return cudaErrorNotSupported;
    CUtensorMap x_map, w_map;
    const CUtensorMapDataType words = Packed ? CU_TENSOR_MAP_DATA_TYPE_INT32 : CU_TENSOR_MAP_DATA_TYPE_UINT8;
    constexpr int kInWord = Packed ? 8 : 1;
    if (!describe(encode, &x_map, Op::kType, a.x, a.K, a.M, a.K * static_cast<long long>(sizeof(Element)), Op::kBox,
                  TileM, CU_TENSOR_MAP_SWIZZLE_128B) ||
        !describe(encode, &w_map, words, a.w, a.K / kInWord, a.O, Packed ? a.K / 2 : a.K, kTileK / kInWord,
                  L::kChannels, Packed ? CU_TENSOR_MAP_SWIZZLE_64B : CU_TENSOR_MAP_SWIZZLE_128B))
      return cudaErrorInvalidValue;
    const Weights w{Op::kScaled ? a.w_multiplier : a.w_scale, a.M, a.O, a.K, Packed ? a.K / a.S : 1,
                    Packed ? static_cast<unsigned>(((1ull << 32) + a.S - 1) / a.S) : 0u, Op::kBias};
    const int mail = mail_bytes(std::min(a.M, TileM), plan.splits, L::kFold);
    const bool halves = few::halves<Packed>(a);
    int stages = L::stages(plan.blocks, mail, halves);
    const bool overlaid =
        L::kMayOverlay && (stages < 3 || Packed && !L::kHalf && 2 * stages * kTileK * plan.splits < a.K);
    if (overlaid) stages = L::stages(plan.blocks, mail, halves, true);
    const Cut cut{stages, mail, L::scale_bytes(halves), (65535 + plan.splits) / plan.splits, halves, overlaid};
    cudaLaunchConfig_t config = {};
    cudaLaunchAttribute attributes[2] = {};
    configure(config, attributes, dim3(plan.splits, (a.M + TileM - 1) / TileM, across(a.O, L::kChannels)),
              plan.blocks);
    config.stream = stream;
    const cudaError_t error = cudaLaunchKernelEx(
        &config, linear_few<Element, Packed, TileM, kForm>, x_map, w_map, w,
        make_finish(a, Op::kScaled ? static_cast<const float*>(a.w_scale) : nullptr), cut);
    return error != cudaSuccess ? error : cudaGetLastError();
  }
};

// What each device allows a step of one group and one of halves; a host thread asks once.
template <class Element, bool Packed>
cudaError_t limits_here(const Limits (*&limits)[kTiles], bool halves) {
  constexpr int kDevices = 64;
  static thread_local Limits known[kDevices][2][kTiles] = {};
  int ordinal = 0;
  cudaError_t error = cudaGetDevice(&ordinal);
  if (error != cudaSuccess) return error;
  Limits(&here)[kTiles] = known[ordinal % kDevices][halves];
  if (!here[4].clusters[1][1]) {
    error = Launch<Element, Packed, 8>::limits(here[0], halves);
    if (error == cudaSuccess) error = Launch<Element, Packed, 16>::limits(here[1], halves);
    if (error == cudaSuccess) error = Launch<Element, Packed, 32>::limits(here[2], halves);
    if (error == cudaSuccess) error = Launch<Element, Packed, 64>::limits(here[3], halves);
    if constexpr (Packed) {
      if (error == cudaSuccess) error = Launch<Element, Packed, 64, Form::kThree>::limits(here[3], halves);
      Limits* const folded = here + kFirstFolded;
      if (error == cudaSuccess) error = Launch<Element, Packed, 8, Form::kFolded>::limits(folded[0], halves);
      if (error == cudaSuccess) error = Launch<Element, Packed, 16, Form::kFolded>::limits(folded[1], halves);
    }
    if (error == cudaSuccess) error = Launch<Element, Packed, 128>::limits(here[4], halves);
  }
  limits = &here;
  return error;
}

template <class Element, bool Packed>
int run(const QuambaLinear& a, cudaStream_t stream) {
  if (a.K <= 0 || a.K % 32 || a.K >= 1 << 17 || !quamba::can_finish(a)) return QUAMBA_UNSUPPORTED;
  if (Packed && (a.S <= 0 || a.S % w4::kChunk || a.K % a.S || static_cast<long long>(a.K) * a.S >> 32))
    return QUAMBA_UNSUPPORTED;
  const Limits(*limits)[kTiles];
  const cudaError_t error = limits_here<Element, Packed>(limits, halves<Packed>(a));
  if (error != cudaSuccess) return error;
  Plan plan = choose(a, Packed, *limits);
  plan = {tuned("QUAMBA_TOKENS", plan.tokens), tuned("QUAMBA_CHANNELS", plan.channels),
          tuned("QUAMBA_SPLITS", plan.splits), tuned("QUAMBA_BLOCKS", plan.blocks)};
  if constexpr (Packed)
    if (plan.channels < kTileO)
      return plan.tokens == 8 ? Launch<Element, Packed, 8, Form::kFolded>::run(a, plan, stream)
                              : Launch<Element, Packed, 16, Form::kFolded>::run(a, plan, stream);
  switch (plan.tokens) {
    case 8: return Launch<Element, Packed, 8>::run(a, plan, stream);
    case 16: return Launch<Element, Packed, 16>::run(a, plan, stream);
    case 32: return Launch<Element, Packed, 32>::run(a, plan, stream);
    case 64:
      if constexpr (Packed)
        if (plan.blocks > Layout<Element, Packed, 64>::kBlocks)
          return Launch<Element, Packed, 64, Form::kThree>::run(a, plan, stream);
      return Launch<Element, Packed, 64>::run(a, plan, stream);
    case 128: return Launch<Element, Packed, 128>::run(a, plan, stream);
    default: return QUAMBA_UNSUPPORTED;
  }
}

}  // namespace quamba::few
