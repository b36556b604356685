#include "ssd_decode.cuh"
#include "ssd_decode.h"

int quamba::decode::launch_ssd_f16(const QuambaDecode& q, int sms, void* stream) {
  return launch_ssd<__half>(q, sms, stream);
}
