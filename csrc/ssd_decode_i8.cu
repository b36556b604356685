#include "ssd_decode.cuh"
#include "ssd_decode.h"

int quamba::decode::launch_ssd_i8(const QuambaDecode& q, int sms, void* stream) {
  return launch_ssd<int8_t>(q, sms, stream);
}
