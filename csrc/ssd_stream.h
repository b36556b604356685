// The kernel that takes the place of ssd_rows for many rows of int8 state; see ssd_stream.cu.
#pragma once

#include "decode.h"

namespace quamba::decode {

// Whether it serves the call, and pays: alignment of what it reads as words, and enough rows.
bool can_stream(const QuambaDecode& q, int sms);
int launch_stream(const QuambaDecode& q, int sms, void* stream);

}  // namespace quamba::decode
