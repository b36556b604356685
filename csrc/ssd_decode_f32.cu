#include "ssd_decode.cuh"
#include "ssd_decode.h"

int quamba::decode::launch_ssd_f32(const QuambaDecode& q, int sms, void* stream) {
  return launch_ssd<float>(q, sms, stream);
}
