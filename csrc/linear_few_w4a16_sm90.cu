// y = x w^T + bias + residual for few tokens on Hopper: x fp16 or bf16 [M, K], scale fp16 [O, K/S], S a multiple of 64.
// w = q4 * scale rounded once to the type of x; up to 8 tokens it is not rounded (linear_few_grouped.cuh).
#include "linear_few_launch.cuh"

extern "C" int quamba_linear_w4a16_few(const QuambaLinear* a, void* stream) {
  if (a->x_dtype == QUAMBA_F16) return quamba::few::run<cute::half_t, true>(*a, static_cast<cudaStream_t>(stream));
  if (a->x_dtype == QUAMBA_BF16) return quamba::few::run<cute::bfloat16_t, true>(*a, static_cast<cudaStream_t>(stream));
  return QUAMBA_UNSUPPORTED;
}
