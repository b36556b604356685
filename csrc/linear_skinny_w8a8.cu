#include "linear_skinny_launch.cuh"

extern "C" int quamba_linear_w8a8_skinny(const QuambaLinear* q, void* stream) {
  using namespace quamba::skinny;
  if (q->x_dtype != QUAMBA_I8) return QUAMBA_UNSUPPORTED;
  return launch<Kind::kW8A8>(*q, static_cast<cudaStream_t>(stream));
}
