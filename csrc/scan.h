// The C ABI of the selective scan. Status and rules as in linear.h; there is no scratch.
#pragma once

#include "conv.h"
#include "expansion.h"
#include "linear.h"

typedef struct {         // quamba_selective_scan
  const void *x, *dt;    // [B, T, I]: x int8 or float, dt float; the last axis is dense, strides in elements below
  const void *b, *c;     // [B, T, N]: int8 or float
  const float *x_scale;  // [1] or [I] beside int8 x; else null
  const float *b_scale, *c_scale;  // [1] beside int8; else null
  const float* A;                  // [I, N]
  const void *D, *dt_bias;         // [I] float; dt_bias may be null
  const void* z;                   // [B, T, I] as x: y becomes y silu(z); or null
  const float* z_scale;            // [1] or [I]: z is int8, or rounded to it on its way in; else null
  const float* state;              // [sequences, I, N] before the first token, or null
  float* last;                     // [sequences, I, N] after the last
  const int* cu_seqlens;           // [sequences + 1] where B is 1 and sequences lie one after the other; else null
  void* y;                         // [B, T, I] contiguous
  long long T;
  long long x_batch, x_token, dt_batch, dt_token, b_batch, b_token, c_batch, c_token, z_batch, z_token;
  int I, N, sequences;
  int x_scale_count, z_scale_count;
  int lanes;  // of a channel, 8 or 4, or 24 of three; 0 for what fits the size
  int x_dtype, dt_dtype, b_dtype, c_dtype, D_dtype, dt_bias_dtype, z_dtype, y_dtype;
  QuambaExpansion expansion;  // beside: on multiprocessors that the scan leaves idle
} QuambaScan;

enum { QUAMBA_SCAN_RANK = 160 };  // the most that these two take, in whole 32

typedef struct {     // quamba_scan_codes
  const void* x;     // [B, T, rank + 2 N] contiguous, float
  void* rank_codes;  // int8 [B, ceil(T / 16), rank / 32, 32, 16]: what a lane of mma_s8 takes of 16 tokens and 32
                     // columns: columns 8 (lane % 4) + 0..3 of tokens 2 (lane / 4) and the next, + 4..7 of both
  float* rank_scale;               // [B, ceil(T / 16), 16]
  void* columns;                   // int8 [B, T, 2 N], or null
  const float *b_scale, *c_scale;  // [1] beside columns
  long long T;
  int B, rank, N, x_dtype;
} QuambaScanCodes;

typedef struct {           // quamba_scan_rates: dt_proj
  const void* rank_codes;  // of quamba_scan_codes
  const float* rank_scale;
  const void* w;           // int8 [I, rank]
  const float* w_scale;    // [I]
  const void* bias;        // [I] float, or null
  void* dt;                // [B, T, I] contiguous, fp16 or bf16
  long long T;
  int B, I, rank, bias_dtype, dt_dtype;
} QuambaScanRates;

typedef struct {         // quamba_ssd_scan, with quamba_ssd_scan_workspace
  const void *x, *dt;    // [B, T, H, P] int8, fp16 or bf16 in whole 16 bytes; [B, T, H] float; strides in elements below
  const void *b, *c;     // [B, T, G, N], as x
  const float *x_scale;  // [H, P] beside int8 x; else null
  const float *b_scale, *c_scale;  // [G] beside int8; else null
  const float* A;                  // [H]
  const void *D, *dt_bias;         // [H] float; dt_bias may be null
  const float* state;              // [sequences, H, P, N] before the first token, or null
  float* last;                     // [sequences, H, P, N] after the last
  const int* cu_seqlens;           // [sequences + 1] where B is 1 and sequences lie one after the other; else null
  void* y;                         // [B, T, H, P] contiguous, fp16 or bf16
  void* workspace;
  long long workspace_bytes;
  long long T;
  long long x_batch, x_token, x_head, dt_batch, dt_token, b_batch, b_token, b_group, c_batch, c_token, c_group;
  int H, P, G, N, sequences, cuts;  // cuts: segments of a sequence, 0 for what fits the size
  int x_dtype, dt_dtype, b_dtype, c_dtype, D_dtype, dt_bias_dtype, y_dtype;
  float lowest, highest;  // of dt
  QuambaExpansion expansion;  // beside: on multiprocessors that the scan leaves idle
} QuambaSsdScan;

typedef struct {  // quamba_ssd_prefill, with quamba_ssd_prefill_workspace: a convolution, then the scan of what it gives
  void* workspace;
  long long workspace_bytes;
  QuambaConv conv;     // of the channels of x, B and C; of y only those of x are stored
  QuambaSsdScan scan;  // x, b and c: y of the convolution; workspace: none
} QuambaSsdPrefill;
