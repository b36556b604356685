// How the decode kernels are launched.
#pragma once

#include <cuda_runtime.h>

#include "launch.cuh"

namespace quamba::decode {

inline bool hopper() {
  static thread_local int ordinal = -1, major = 0;
  int now = 0;
  if (cudaGetDevice(&now) == cudaSuccess && now != ordinal &&
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, now) == cudaSuccess)
    ordinal = now;
  return major >= 9;
}

// From sm_90 on a kernel may start before its predecessor has ended, and waits for it by itself.
template <typename Params>
cudaError_t launch(void (*kernel)(Params), const Params& params, dim3 grid, int threads, int shared, void* stream) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = hopper() ? 1 : 0;
  cudaError_t error = prefer_shared(kernel);
  if (error == cudaSuccess && shared > 48 * 1024)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (error != cudaSuccess) return error;
  error = cudaLaunchKernelEx(&config, kernel, params);
  return error != cudaSuccess ? error : cudaGetLastError();
}

}  // namespace quamba::decode
