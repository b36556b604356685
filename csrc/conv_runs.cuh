// How a prompt's convolution is divided: a thread takes four channels through a run of tokens. Whoever reads the state of
// a sequence, which only its first tokens do, also writes the new one: no run begins within the first W - 1 tokens.
#pragma once

#include <cuda_runtime.h>

#include "conv.h"
#include "expansion.cuh"
#include "quads.cuh"

namespace quamba {

constexpr int kMostTaps = 4;

struct Conv {
  QuambaConv a;
  int run;  // tokens of a thread
  bool whole_x, whole_weight, whole_state, whole_y;
  int down;             // rows of blocks; those below expand a weight
  Expansion expansion;
};

// Whether there is a kernel for a convolution.
inline bool takes(const QuambaConv& a) {
  auto is_float = [](int type) { return type == QUAMBA_F32 || type == QUAMBA_F16 || type == QUAMBA_BF16; };
  return a.B >= 1 && a.B <= 65535 && a.T >= 1 && a.C >= 1 && a.W >= 2 && a.W <= kMostTaps && a.sequences >= 1 &&
         (a.cu_seqlens ? a.B == 1 && a.T <= 0x7fffffffLL : a.sequences == a.B) &&
         (!a.in_scale || is_float(a.x_dtype)) && (a.out_scale || is_float(a.y_dtype)) &&
         (!a.bias || is_float(a.bias_dtype)) && (!a.expansion.y || expands(a.expansion));
}

inline Conv conv_of(const QuambaConv& a, int run) {
  const bool dense = a.C % 4 == 0;
  return {a,
          run,
          dense && in_quads(a.x, a.x_dtype, a.token_stride, a.batch_stride),
          a.W == 4 && in_quads(a.weight, a.weight_dtype),
          dense && in_quads(a.state, a.in_scale ? QUAMBA_I8 : a.x_dtype),
          dense && in_quads(a.y, a.out_scale ? QUAMBA_I8 : a.y_dtype)};
}

struct Sequence {
  long long begin, end;
  int index;
};

// The sequence of token t of row `row`: the last that begins at or before it.
__device__ __forceinline__ Sequence find_sequence(const QuambaConv& a, long long t, int row) {
  if (!a.cu_seqlens) return {0, a.T, row};
  int low = 0, high = a.sequences - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (__ldg(a.cu_seqlens + middle) <= t)
      low = middle;
    else
      high = middle - 1;
  }
  const long long begin = __ldg(a.cu_seqlens + low), end = __ldg(a.cu_seqlens + low + 1);
  return {begin, end > t ? min(end, a.T) : a.T, low};
}

// Where the run begins that was to begin at t.
__device__ __forceinline__ long long cut(const QuambaConv& a, long long t, int row) {
  if (!a.cu_seqlens || t == 0 || t >= a.T) return min(t, a.T);
  const Sequence s = find_sequence(a, t, row);
  return t == s.begin ? t : max(t, min(s.begin + a.W - 1, s.end));
}

}  // namespace quamba
