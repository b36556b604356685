// What both ways to finish a decode step share: decode_finish.cu, a block a token, and decode_finish_slices.cu, several.
#pragma once

#include "decode_finish.h"
#include "decode_launch.cuh"
#include "decode_state.cuh"

namespace quamba::decode {

struct FinishParams {
  QuambaDecode q;
  Rotation rotation;
  int channels, shared_channels;  // I; channels of the convolution's state that are shifted here
  bool rehearse;                  // decode_finish_slices.cu
};

// The `block`th of `blocks` blocks that shift the convolution's state of B and C.
__device__ __forceinline__ void shift_shared(const FinishParams& p, int block, int blocks) {
  const QuambaDecode& q = p.q;
  const int inner = p.channels, stride = blocks * blockDim.x, half = p.shared_channels / 2;
  for (int i = block * blockDim.x + threadIdx.x; i < q.batch * p.shared_channels; i += stride) {
    const int batch = i / p.shared_channels, c = i - batch * p.shared_channels;
    const void* input = c < half ? q.B : q.C;
    const float in_scale = constant(q.conv_in_scale, q.conv_in_count > 1 ? inner + c : 0, 1.f);
    const Window v = window_of<false>(q, batch, inner + c, input, batch * q.bc_stride + (c < half ? c : c - half));
    shift<false>(q, in_scale, v);
  }
}

// How many blocks of a size the shift is worth.
inline int shifters(const QuambaDecode& q, int shared_channels, int threads) {
  const long long shifts = (static_cast<long long>(q.batch) * shared_channels + threads - 1) / threads;
  return static_cast<int>(shifts < 64 ? shifts : 64);
}

// Whether decode_finish_slices.cu serves a call and is the faster of the two, and its launch.
bool can_slice(const FinishParams& p, int sms);
cudaError_t launch_slices(FinishParams p, void* stream);

}  // namespace quamba::decode
