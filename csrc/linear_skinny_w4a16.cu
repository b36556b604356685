#include "linear_skinny_launch.cuh"

extern "C" int quamba_linear_w4a16_skinny(const QuambaLinear* q, void* stream) {
  using namespace quamba::skinny;
  if (q->x_dtype == QUAMBA_F16) return launch<Kind::kW4F16>(*q, static_cast<cudaStream_t>(stream));
  if (q->x_dtype == QUAMBA_BF16) return launch<Kind::kW4BF16>(*q, static_cast<cudaStream_t>(stream));
  return QUAMBA_UNSUPPORTED;
}
