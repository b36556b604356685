#include <cstdint>

#include "decode_finish.h"
#include "ssd_decode.h"
#include "ssd_stream.h"

extern "C" long long quamba_ssd_decode_workspace(const QuambaDecode* q) {
  return 4ll * q->batch * q->H * q->P;
}

extern "C" int quamba_ssd_decode(const QuambaDecode* call, void* stream) {
  using namespace quamba;
  using namespace quamba::decode;
  const QuambaDecode& q = *call;
  Rotation rotation;
  if (q.G < 1 || q.H % q.G || q.batch > 65535 || !can_finish(q, rotation)) return QUAMBA_UNSUPPORTED;
  if (q.state_type == QUAMBA_I8 ? !q.state_scale : q.state_scale != nullptr) return QUAMBA_UNSUPPORTED;
  int ordinal = 0, sms = 0;
  cudaError_t error = cudaGetDevice(&ordinal);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, ordinal);
  if (error != cudaSuccess) return error;
  int status = QUAMBA_UNSUPPORTED;
  const bool streams = can_stream(q, sms);
  if (streams)
    status = launch_stream(q, sms, stream);
  else if (q.state_type == QUAMBA_F32)
    status = launch_ssd_f32(q, sms, stream);
  else if (q.state_type == QUAMBA_F16)
    status = launch_ssd_f16(q, sms, stream);
  else if (q.state_type == QUAMBA_I8)
    status = launch_ssd_i8(q, sms, stream);
  return status != QUAMBA_OK ? status : launch_finish(q, rotation, 2 * q.G * q.N, streams, sms, stream);
}
