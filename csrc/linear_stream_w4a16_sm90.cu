#include "linear_stream.cuh"

extern "C" int quamba_linear_w4a16_stream(const QuambaStream* s, void* stream) {
  using namespace quamba::stream;
  const auto at = static_cast<cudaStream_t>(stream);
  const int type = s->prologue ? s->code_dtype : s->linear.x_dtype;
  return type == QUAMBA_F16    ? launch<Kind::kW4F16>(*s, at)
         : type == QUAMBA_BF16 ? launch<Kind::kW4BF16>(*s, at)
                               : static_cast<int>(QUAMBA_UNSUPPORTED);
}
