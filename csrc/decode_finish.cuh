// What both ways to finish a decode step share: decode_finish.cu, a block a token, and decode_finish_slices.cu, several.
#pragma once

#include <algorithm>

#include "conv_quad.cuh"
#include "decode_finish.h"
#include "decode_launch.cuh"

namespace quamba::decode {

struct FinishParams {
  QuambaDecode q;
  Rotation rotation;
  int channels, shared_channels;  // I; channels of the convolution's state that are shifted here
  bool quads;                     // whether they lie so that four are shifted at a time
  bool read;                      // whether the first kernel has read them by the time this one starts
  bool rehearse;                  // decode_finish_slices.cu
};

// The `block`th of `blocks` blocks that shift the convolution's state of B and C.
__device__ __forceinline__ void shift_shared(const FinishParams& p, int block, int blocks) {
  const QuambaDecode& q = p.q;
  const int inner = p.channels, stride = blocks * blockDim.x, half = p.shared_channels / 2;
  if (p.quads) {
    for (int i = 4 * (block * blockDim.x + threadIdx.x); i < q.batch * p.shared_channels; i += 4 * stride) {
      const int batch = i / p.shared_channels, c = i - batch * p.shared_channels;
      const long long at = batch * q.bc_stride + (c < half ? c : c - half);
      shift_quad(q, batch, inner + c, fetch_halves(c < half ? q.B : q.C, at));
    }
    return;
  }
  for (int i = block * blockDim.x + threadIdx.x; i < q.batch * p.shared_channels; i += stride) {
    const int batch = i / p.shared_channels, c = i - batch * p.shared_channels;
    const void* input = c < half ? q.B : q.C;
    const float in_scale = constant(q.conv_in_scale, q.conv_in_count > 1 ? inner + c : 0, 1.f);
    const Window v = window_of<false>(q, batch, inner + c, input, batch * q.bc_stride + (c < half ? c : c - half));
    shift<false>(q, in_scale, v);
  }
}

inline bool shifts_quads(const QuambaDecode& q) {
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 8 == 0; };
  return (has_quads(q) || has_half_quads(q)) && q.G * q.N % 4 == 0 && aligned(q.B) && aligned(q.C) &&
         q.bc_stride % 4 == 0;
}

// How many blocks of a size the shift is worth: two quads a thread, or a channel.
inline int shifters(const FinishParams& p, int threads) {
  const long long shifts = static_cast<long long>(p.q.batch) * p.shared_channels, each = threads * (p.quads ? 8 : 1);
  return static_cast<int>(std::min((shifts + each - 1) / each, 64ll));
}

// Whether decode_finish_slices.cu serves a call and is the faster of the two, and its launch.
bool can_slice(const FinishParams& p, int sms);
cudaError_t launch_slices(FinishParams p, void* stream);

}  // namespace quamba::decode
