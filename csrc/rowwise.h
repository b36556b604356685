// The C ABI of the token-wise kernels. Status and rules as in linear.h; there is no scratch.
#pragma once

#include "linear.h"

typedef struct {           // quamba_rms_norm, quamba_quantize
  const void* x;           // [rows, D] float, a row every x_stride elements
  const void* weight;      // [D] float or null
  const float* out_scale;  // y is int8: [1], or [D] (quamba_quantize)
  float* y_scale;          // [rows]: y is int8 with a scale per row, written here
  void* y;                 // [rows, D] contiguous: int8 where there is a scale, else y_dtype
  long long rows, x_stride;
  int D, out_scale_count;
  int x_dtype, weight_dtype, y_dtype;
  int holds_next;  // with many rows the next kernel starts at the end: it does nothing before it has y
  float eps;
} QuambaRows;

typedef struct {           // quamba_gate_output
  const void* y;           // [rows, I] float, a row every y_stride elements
  const void* z;           // [rows, I] float or int8, a row every z_stride elements; null leaves y as it is
  const float* z_scale;    // [1] or [I]: z is int8, or rounded to it on its way in; else null
  const void* weight;      // [I] float or null
  const float* out_scale;  // [1]: u is int8
  float* u_scale;          // [rows]: u is int8 with a scale per row, written here
  void* u;                 // [rows, I] contiguous: int8 where there is a scale, else u_dtype
  long long rows, y_stride, z_stride;
  int I, z_scale_count;
  int norm_groups;  // 0: no norm
  int block;        // of the Hadamard rotation, 0 or 1: none
  int y_dtype, z_dtype, weight_dtype, u_dtype;
  float eps;
} QuambaGate;
