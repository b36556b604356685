// Single instructions of the special function unit, to about one unit in the last place.
#pragma once

#include <cuda_runtime.h>

namespace quamba {

// 2^v; results below 2^-126 become zero.
__device__ __forceinline__ float exp2_approximate(float v) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(v));
  return y;
}

// 1 / v; denormal v count as zero, and of v above 2^126 the result is zero.
__device__ __forceinline__ float reciprocal_approximate(float v) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(v));
  return y;
}

}  // namespace quamba
