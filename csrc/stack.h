// The C ABI of a stack of Mamba2 blocks (ops/stack.py): one token of one sequence through norm, in_proj, mixer, out_proj and
// residual of every layer, in one launch. Entry points as in linear.h:
//   quamba_ssd_stack_w8a8, _w4a8, _w4a16 (int NAME(const QuambaStack*, void* stream)), with NAME_workspace;
//   NAME_serves launches nothing and looks at sizes and types alone.
// All layers have the same sizes and types; gains and biases have the type of the activations, and so has the convolution
// of w4a16, where the others have codes. Weights start at a multiple of 16 bytes.
#pragma once

#include "decode.h"

typedef struct {
  const void* w;             // as in QuambaLinear
  const void* w_scale;
  const void* w_multiplier;
  const void* bias;          // [O] or null
} QuambaStackLinear;

typedef struct {
  QuambaStackLinear in, out;
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
  const float* A;
  const float* D;
  const float* dt_bias;
  const float* x_scale;
  const float* B_scale;
  const float* C_scale;
  const float* z_scale;
  const void* gate_weight;   // QuambaDecode's norm_weight
  const float* out_scale;
} QuambaStackLayer;

typedef struct {
  QuambaDecode mixer;              // sizes, counts and types; its pointers and strides are not read, but for these:
  void* workspace;
  long long workspace_bytes;
  const QuambaStackLayer* layers;  // host memory
  const float* x;                  // [D]
  float* y;                        // [D], written
  int count, D, S;                 // layers, channels of the residual, group size of int4 weights
  float eps;                       // of the norm before in_proj
} QuambaStack;
