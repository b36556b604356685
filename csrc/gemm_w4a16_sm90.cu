// y = x w^T + bias + residual for many rows on Hopper, w = q4 * scale rounded once to the type of x: x fp16 or bf16
// [M, K], scale fp16 [O, K/S], S a multiple of 32.
#include "gemm_w4_sm90.cuh"

extern "C" int quamba_linear_w4a16_gemm(const QuambaLinear* a, void* stream) {
  if (a->x_dtype == QUAMBA_F16) return quamba::w4::run<cute::half_t>(*a, static_cast<cudaStream_t>(stream));
  if (a->x_dtype == QUAMBA_BF16) return quamba::w4::run<cute::bfloat16_t>(*a, static_cast<cudaStream_t>(stream));
  return QUAMBA_UNSUPPORTED;
}
