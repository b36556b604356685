// The C ABI of a stack of Mamba1 blocks (ops/selective_stack.py): one token of one sequence through norm, in_proj,
// convolution, x_proj, dt_proj, selective scan, gate, out_proj and residual of every layer, in one launch. Entry points
// as in stack.h:
//   quamba_selective_stack_w8a8, _w4a8, _w4a16, with NAME_workspace and NAME_serves.
// in, x and out are of that format; dt is of w8a8, its input codes with a scale of the token's own. x has no bias.
// Types and alignment as in stack.h; the A of the scan and the weights of dt start at a multiple of 16 bytes.
#pragma once

#include "stack.h"

typedef struct {
  QuambaStackLinear in, x, dt, out;
  const void* norm_weight;   // [D] or null
  const float* in_scale;     // [1]: static codes of in_proj's input; null: a scale per token, or floats for w4a16
  // the rest as in QuambaDecode
  void* conv_state;
  const void* conv_weight;
  const float* conv_weight_scale;
  const void* conv_bias;
  const float* conv_in_scale;
  const float* conv_out_scale;
  void* state;
  float* state_scale;
  long long* rng;
  const float* A;            // [I, N]
  const float* D;            // [I]
  const float* x_scale;      // [1], of the codes that x_proj and the scan read
  const float* B_scale;      // [1]
  const float* C_scale;
  const float* z_scale;
  const float* out_scale;
} QuambaSelectiveStackLayer;

typedef struct {
  QuambaDecode mixer;              // H = I, P = 1; else as in QuambaStack
  void* workspace;
  long long workspace_bytes;
  const QuambaSelectiveStackLayer* layers;  // host memory
  const float* x;                  // [D]
  float* y;                        // [D], written
  int count, D, R, S;              // layers, channels of the residual, rank of dt, group size of int4 weights
  float eps;
} QuambaSelectiveStack;
