// How the token-wise kernels are launched, and sums over a block.
#pragma once

#include <cuda_runtime.h>

#include "linear.h"
#include "mma.cuh"

namespace quamba {

inline cudaError_t device_attribute(cudaDeviceAttr attribute, int& value) {
  int ordinal = 0;
  cudaError_t error = cudaGetDevice(&ordinal);
  return error != cudaSuccess ? error : cudaDeviceGetAttribute(&value, attribute, ordinal);
}

// A multiprocessor divides its memory anew between L1 and shared memory only when it is empty. So all kernels of a decode
// step ask for the same, that the next one, which may want most of it, finds room beside them.
template <class Kernel>
cudaError_t prefer_shared(Kernel kernel) {
  return cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
}

// Launch kernel(params). From sm_90 on it may start while the kernel before it still runs, so it has to call
// wait_for_previous_kernel before it touches anything that is not a constant of the model; not where ``early`` is false.
template <class Params>
int launch(void (*kernel)(Params), const Params& params, dim3 grid, int threads, void* stream, int shared = 0,
           bool early = true) {
  int major = 0;
  cudaError_t error = device_attribute(cudaDevAttrComputeCapabilityMajor, major);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = early && major >= 9 ? 1 : 0;
  error = cudaLaunchKernelEx(&config, kernel, params);
  return error != cudaSuccess ? error : cudaGetLastError();
}

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int step = 16; step; step /= 2) v += __shfl_xor_sync(~0u, v, step);
  return v;
}

// Combine a value over the threads of a block, always in the same order; ``shared`` holds a float a warp and is used once.
template <class F>
__device__ __forceinline__ float block_reduce(float v, float* shared, F combine) {
#pragma unroll
  for (int step = 16; step; step /= 2) v = combine(v, __shfl_xor_sync(~0u, v, step));
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = v;
  __syncthreads();
  v = shared[0];
  for (int warp = 1; warp < static_cast<int>(blockDim.x) / 32; ++warp) v = combine(v, shared[warp]);
  return v;
}

}  // namespace quamba
