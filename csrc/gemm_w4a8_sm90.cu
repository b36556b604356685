// y = (x w^T) * x_scale * w_scale + bias + residual for many rows on Hopper, w = q4 * multiplier in int8: x int8
// [M, K], multiplier int8 [O, K/S] in 1..17, S a multiple of 32; accumulated in int32.
#include "gemm_w4_sm90.cuh"

extern "C" int quamba_linear_w4a8_gemm(const QuambaLinear* a, void* stream) {
  if (a->x_dtype != QUAMBA_I8 || !a->x_scale || !a->w_multiplier) return QUAMBA_UNSUPPORTED;
  return quamba::w4::run<int8_t>(*a, static_cast<cudaStream_t>(stream));
}
