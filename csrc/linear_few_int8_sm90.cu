// y = (x w^T) * x_scale * w_scale + bias + residual for few tokens on Hopper, x int8 [M, K], w int8 [O, K] or
// q4 * multiplier in int8: multiplier int8 [O, K/S] in 1..17, S a multiple of 64. Accumulated in int32.
#include "linear_few_launch.cuh"

extern "C" int quamba_linear_w8a8_few(const QuambaLinear* a, void* stream) {
  if (a->x_dtype != QUAMBA_I8 || !a->x_scale || !a->w_scale) return QUAMBA_UNSUPPORTED;
  return quamba::few::run<int8_t, false>(*a, static_cast<cudaStream_t>(stream));
}

extern "C" int quamba_linear_w4a8_few(const QuambaLinear* a, void* stream) {
  if (a->x_dtype != QUAMBA_I8 || !a->x_scale || !a->w_scale || !a->w_multiplier) return QUAMBA_UNSUPPORTED;
  return quamba::few::run<int8_t, true>(*a, static_cast<cudaStream_t>(stream));
}
