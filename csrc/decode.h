// The C ABI of the decode steps (ops/decode.py): one token of B sequences. Axes as there; H heads of P channels make
// the I rows of a state [B, I, N] (the selective scan: H = I, P = 1). Entry points as in linear.h:
//   quamba_ssd_decode, quamba_selective_decode, quamba_conv_decode (int NAME(const QuambaDecode*, void* stream)),
// the first two with NAME_workspace. state, workspace, conv_weight, norm_weight, out and the A of the selective scan start
// at a multiple of 16 bytes, the rest at one of its own type.
#pragma once

#include "linear.h"

typedef struct {
  // activations of type `in`, rows of B; *_stride: elements from one to the next
  const void* z;                  // [B, I]
  const void* x;                  // [B, I], before the convolution; the selective scan: after it, of type `x_in`
  const void* B;                  // [B, G N]
  const void* C;                  // [B, G N]
  const void* dt;                 // [B, H]
  void* conv_state;               // [B, 3, channels], int8 or `in`: x, B and C, or x alone
  const void* conv_weight;        // [channels, 4] int8 or float
  const float* conv_weight_scale; // [channels] or null
  const void* conv_bias;          // [channels] or null
  const float* conv_in_scale;     // [1] or [channels]; null: floats
  const float* conv_out_scale;    // [channels]; null: floats of type `in`
  void* state;                    // [B, I, N] fp32, fp16 or int8
  float* state_scale;             // [B, I] for int8
  long long* rng;                 // seed, step; null: round to nearest
  const float* A;                 // [H], or [I, N]
  const float* D;                 // [H]
  const float* dt_bias;           // [H] or null
  const float* x_scale;           // [1] or [I], null for floats
  const float* B_scale;           // [1] or [G]
  const float* C_scale;
  const float* z_scale;           // [1] or [I]
  const void* norm_weight;        // [I] or null
  const float* out_scale;         // [1]: static int8
  float* token_scale;             // [B], written: int8 with a scale per token
  void* out;                      // [B, I] int8, or of type `out_type`; quamba_conv_decode: int8 or `in`
  void* workspace;
  long long workspace_bytes;
  long long z_stride, x_stride, bc_stride, dt_stride;
  int batch, H, P, G, N, channels;
  int in, x_in, conv_state_type, conv_weight_type, conv_bias_type, state_type, norm_weight_type, out_type;
  int conv_in_count, x_count, B_count, C_count, z_count;
  int norm_groups, block;
  float eps, dt_min, dt_max;
} QuambaDecode;
