// log(1 + exp(v)), to a few units in the last place.
#pragma once

#include "quads.cuh"

namespace quamba {

// max(v, 0) + 2 artanh(e / (2 + e)), e = exp(-|v|).
__device__ __forceinline__ float softplus(float v) {
  const float e = exp2_approximate(-kLog2e * fabsf(v)), s = e * reciprocal_approximate(2.f + e), q = s * s;
  float sum = 0.28011987f;
  sum = __fmaf_rn(sum, q, 0.28001805f);
  sum = __fmaf_rn(sum, q, 0.40021527f);
  sum = __fmaf_rn(sum, q, 0.66666416f);
  sum = __fmaf_rn(sum, q, 2.f);
  return __fmaf_rn(sum, s, fmaxf(v, 0.f));
}

}  // namespace quamba
