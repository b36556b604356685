// The first kernel of Mamba2's decode step (ssd_decode.cuh), for each type of state in a file of its own.
#pragma once

#include "decode.h"

namespace quamba::decode {

int launch_ssd_f32(const QuambaDecode& q, int sms, void* stream);
int launch_ssd_f16(const QuambaDecode& q, int sms, void* stream);
int launch_ssd_i8(const QuambaDecode& q, int sms, void* stream);

}  // namespace quamba::decode
