#include "linear_stream.cuh"

extern "C" int quamba_linear_w8a8_stream(const QuambaStream* s, void* stream) {
  using namespace quamba::stream;
  return launch<Kind::kW8A8>(*s, static_cast<cudaStream_t>(stream));
}
