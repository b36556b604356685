// How a prompt's convolution is divided: a thread takes four channels through a run of tokens. Whoever reads the state of
// a sequence, which only its first tokens do, also writes the new one: no run begins within the first W - 1 tokens.
#pragma once

#include <cuda_runtime.h>

#include "conv.h"
#include "expansion.cuh"

namespace quamba {

struct Conv {
  QuambaConv a;
  int run;  // tokens of a thread
  bool whole_x, whole_weight, whole_state, whole_y;
  int down;             // rows of blocks; those below expand a weight
  Expansion expansion;
};

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
