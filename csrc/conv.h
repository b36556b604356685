// The C ABI of the causal convolution. Status and rules as in linear.h; there is no scratch.
#pragma once

#include "expansion.h"
#include "linear.h"

typedef struct {              // quamba_causal_conv1d
  const void* x;              // [B, T, C]: int8 or float; channels are neighbours, strides in elements below
  const float* in_scale;      // [1] or [C]: float x is rounded to int8 on its way in; else null
  const float* x_scale;       // [1] or [C] beside int8 x; else null
  const void* weight;         // [C, W]: int8 or float
  const float* weight_scale;  // [C] beside int8 weights; else null
  const void* bias;           // [C] float or null
  void* state;                // [sequences, W - 1, C]: int8 where x is or becomes int8, else as x; or null
  const int* cu_seqlens;      // [sequences + 1] where B is 1 and sequences lie one after the other; else null
  const float* out_scale;     // [1] or [C]: y is int8; null: y_dtype
  void* y;                    // [B, T, C] contiguous
  long long T, batch_stride, token_stride;
  int B, C, W, sequences;
  int in_scale_count, x_scale_count, out_scale_count;
  int x_dtype, weight_dtype, bias_dtype, y_dtype;
  QuambaExpansion expansion;  // beside, by blocks of their own
} QuambaConv;
