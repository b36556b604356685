// The host side of the few-token linears: checks the arguments, picks a kernel and its plan, launches.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

#include "launch.cuh"
#include "linear_skinny.cuh"
#include "linear_skinny_measured.h"

namespace quamba::skinny {

// What narrows the choice: a measured plan, or with QUAMBA_TUNE
// QUAMBA_SKINNY_CONFIG="strips,wm,wk,splits,resident,ring,blocks", where -1 leaves one free.
inline Forced forced_plan(const Shape& s, const Device& d) {
#ifdef QUAMBA_TUNE
  Forced f;
  if (const char* text = std::getenv("QUAMBA_SKINNY_CONFIG")) {
    std::sscanf(text, "%d,%d,%d,%d,%d,%d,%d", &f.strips, &f.wm, &f.wk, &f.splits, &f.resident, &f.ring, &f.blocks);
    return f;
  }
#endif
  return measured_plan(s, d);
}

using Kernel = void (*)(Params);

struct Choice {
  Kernel kernel;
  Plan plan;
};

template <Kind KIND, bool FOLD, int R, int NT, int RING>
cudaError_t consider(const Shape& s, const Device& d, const Forced& forced, Choice& best) {
  using Config = Config<KIND, R, NT, RING>;
  const Kernel kernel = linear_skinny<KIND, FOLD, R, NT, RING>;
  cudaFuncAttributes attributes;
  cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  if (error != cudaSuccess) return error;
  const Variant variant{R, NT, Config::kDepth, RING, attributes.numRegs, Config::kWarps};
  const Plan plan = choose(s, d, forced, variant);
  if (plan.cost < 0 || (best.kernel && best.plan.cost <= plan.cost)) return cudaSuccess;
  best = {kernel, plan};
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, d.shared_per_block);
}

template <Kind KIND, bool FOLD, int R, int NT, int... RINGS>
cudaError_t consider_rings(const Shape& s, const Device& d, const Forced& forced, Choice& best) {
  cudaError_t error = cudaSuccess;
  ((error = error == cudaSuccess ? consider<KIND, FOLD, R, NT, RINGS>(s, d, forced, best) : error), ...);
  return error;
}

template <Kind KIND, bool FOLD>
cudaError_t choose_kernel(const Shape& s, const Device& d, const Forced& forced, Choice& best) {
  if (s.M > 32) {
    // here the weight takes its scale whatever the group: there are no registers for a second set of sums
    constexpr bool kFold = KIND != Kind::kW8A8;
    return consider<KIND, kFold, 2, 8, 0>(s, d, forced, best);
  }
  if (s.M > 16) return consider<KIND, FOLD, 2, 4, 0>(s, d, forced, best);
  if (s.M > 8) return consider_rings<KIND, FOLD, 2, 2, 0, 2, 3>(s, d, forced, best);
  const cudaError_t error = consider_rings<KIND, FOLD, 1, 1, 0, 2, 3>(s, d, forced, best);
  return error == cudaSuccess ? consider_rings<KIND, FOLD, 2, 1, 0, 2, 3>(s, d, forced, best) : error;
}

inline cudaError_t describe(int ordinal, Device& d) {
  int major = 0;
  const auto get = [&](int& value, cudaDeviceAttr attribute) {
    return cudaDeviceGetAttribute(&value, attribute, ordinal);
  };
  for (const cudaError_t error :
       {get(d.sms, cudaDevAttrMultiProcessorCount), get(d.shared_per_sm, cudaDevAttrMaxSharedMemoryPerMultiprocessor),
        get(d.shared_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin),
        get(d.threads_per_sm, cudaDevAttrMaxThreadsPerMultiProcessor),
        get(d.registers_per_sm, cudaDevAttrMaxRegistersPerMultiprocessor),
        get(major, cudaDevAttrComputeCapabilityMajor)})
    if (error != cudaSuccess) return error;
  d.clusters = major >= 9;
  return cudaSuccess;
}

// The choice for a shape on the present device; each host thread remembers its latest ones.
template <Kind KIND, bool FOLD>
cudaError_t cached_choice(const Shape& s, Choice& choice, bool& clusters) {
  struct Entry {
    int ordinal = -1;
    bool clusters = false;
    Shape shape{};
    Choice choice{};
  };
  constexpr unsigned kEntries = 256;
  static thread_local Entry entries[kEntries];
  int ordinal = 0;
  cudaError_t error = cudaGetDevice(&ordinal);
  if (error != cudaSuccess) return error;
  Entry& e = entries[(s.M * 31u + s.O * 7u + s.K / 32u) % kEntries];
#ifdef QUAMBA_TUNE
  e.ordinal = -1;
#endif
  if (e.ordinal != ordinal || !(e.shape == s)) {
    Device d{};
    Choice best{};
    if ((error = describe(ordinal, d)) != cudaSuccess) return error;
    if ((error = choose_kernel<KIND, FOLD>(s, d, forced_plan(s, d), best)) != cudaSuccess) return error;
#ifndef QUAMBA_TUNE
    // a plan that was measured for a near problem may not fit this one
    if (!best.kernel && (error = choose_kernel<KIND, FOLD>(s, d, Forced{}, best)) != cudaSuccess) return error;
#endif
    if (best.kernel && d.clusters && (error = prefer_shared(best.kernel)) != cudaSuccess) return error;
    e = {ordinal, d.clusters, s, best};
  }
  choice = e.choice;
  clusters = e.clusters;
  return cudaSuccess;
}

inline bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

template <Kind KIND>
int launch(const QuambaLinear& q, cudaStream_t stream) {
  constexpr bool kGroups = KIND != Kind::kW8A8;
  if (q.M < 1 || q.M > 256 || q.O < 8 || q.O % 8 || q.K < 32 || q.K % 32 || q.K > kMaxK) return QUAMBA_UNSUPPORTED;
  if (kGroups && (q.S < 32 || q.S % 32 || q.K % q.S)) return QUAMBA_UNSUPPORTED;
  if (!aligned(q.x) || !aligned(q.w)) return QUAMBA_UNSUPPORTED;

  const Shape shape{q.M, q.O, q.K, kGroups ? q.K / 2 : q.K, kInteger<KIND> ? 1 : 2};
  const bool fold = kGroups && q.S % 128 && q.S != q.K;
  Choice choice{};
  bool overlap = false;
  cudaError_t error = fold ? cached_choice<KIND, kGroups>(shape, choice, overlap)
                           : cached_choice<KIND, false>(shape, choice, overlap);
  if (error != cudaSuccess) return error;
  if (!choice.kernel) return QUAMBA_UNSUPPORTED;
  const Plan& plan = choice.plan;
  const unsigned per_group = kGroups ? q.S / 32 : 1;
  int wm_shift = 0;
  while (1 << wm_shift < plan.wm) ++wm_shift;
  const Params params{q,
                      plan,
                      shape.row_bytes,
                      kGroups ? q.K / q.S : 1,
                      ((1u << kMagicBits) + per_group - 1) / per_group,
                      wm_shift,
                      wm_shift + (plan.strips == 1 ? 4 : 5)};

  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = plan.splits;
  attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(plan.splits, plan.token_blocks, plan.groups);
  config.blockDim = dim3(plan.threads());
  config.dynamicSmemBytes = plan.shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = overlap ? (plan.splits > 1 ? 2 : 1) : 0;
  error = cudaLaunchKernelEx(&config, choice.kernel, params);
  return error != cudaSuccess ? error : cudaGetLastError();
}

}  // namespace quamba::skinny
