// The C ABI of the linear kernels. M rows (tokens), K in features, O out features, S group size along K.
//
// Every entry point is  extern "C" int NAME(const QuambaLinear*, void* stream)  and returns QUAMBA_OK,
// QUAMBA_UNSUPPORTED or a cudaError_t; one that needs scratch also has
// extern "C" long long NAME_workspace(const QuambaLinear*), in bytes. None allocates, synchronises or keeps device
// state, so all may run on any stream and under CUDA graph capture.
#pragma once

enum { QUAMBA_OK = 0, QUAMBA_UNSUPPORTED = -1, /* > 0: a cudaError_t */ };
enum { QUAMBA_F32 = 0, QUAMBA_F16 = 1, QUAMBA_BF16 = 2, QUAMBA_I8 = 3 };
typedef struct {
  const void* x;            // [M, K] row-major contiguous: int8, fp16 or bf16
  const float* x_scale;     // int8 x: [1] or [M]; else null
  const void* w;            // canonical: int8 [O, K], or int32 [O, K/8] (eight nibbles a word, low first, stored with +8)
  const void* w_scale;      // fp32 [O] (w8a8, w4a8); fp16 [O, K/S] (w4a16)
  const void* w_multiplier; // int8 [O, K/S] in 1..17 (w4a8); else null
  const void* bias;         // [O] or null
  const void* residual;     // [M, O] row-major or null
  const float* out_scale;   // [1] or [O]: y is int8; null: y is y_dtype
  void* y;                  // [M, O]
  void* workspace;          // scratch from torch's allocator, may be null when *_workspace() says 0
  long long workspace_bytes;
  int M, O, K, S;
  int x_scale_count, out_scale_count;
  int x_dtype, y_dtype, bias_dtype, residual_dtype;
} QuambaLinear;
