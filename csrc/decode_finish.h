// The second kernel of a decode step, see decode_finish.cu and decode_finish_slices.cu.
#pragma once

#include <cuda_runtime.h>

#include "decode.h"
#include "hadamard.cuh"

namespace quamba::decode {

// Whether launch_finish serves a call, and the rotation of its block.
bool can_finish(const QuambaDecode& q, Rotation& rotation);

// shared_channels: of B and C together, whose convolution state is shifted; 0 where the convolution came before.
// read: the blocks of the kernel before have read that state when they let this one start.
cudaError_t launch_finish(const QuambaDecode& q, const Rotation& rotation, int shared_channels, bool read, int sms,
                          void* stream);

}  // namespace quamba::decode
