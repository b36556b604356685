// The C ABI of the linears of a decode step, which may make their own input: x as an earlier kernel left it, normalised
// and rounded by every block for itself, so that no kernel stands between.
#pragma once

#include "linear.h"

// linear.x is [M, K] floats of linear.x_dtype, M up to 2; with prologue 0 it is what linear.h says, M up to 8.
// x / rms(x) * norm_weight, then codes: by in_scale [1], or by each token's largest magnitude where in_scale is null.
typedef struct {
  QuambaLinear linear;
  const void* norm_weight;  // [K] or null
  const float* in_scale;
  float eps;
  int prologue, norm_weight_dtype;
} QuambaStream;
