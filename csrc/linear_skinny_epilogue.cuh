// From the sums of the few-token linears to y: partial sums, scales, bias, residual, and the type of the output.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "linear.h"
#include "linear_skinny_loads.cuh"

namespace quamba::skinny {

// Through L2: L1 may hold what a buffer of activations had before.
__device__ __forceinline__ float load_float(const void* p, int64_t i, int dtype) {
  if (dtype == QUAMBA_F32) return __ldcg(static_cast<const float*>(p) + i);
  if (dtype == QUAMBA_F16) return __half2float(__ldcg(static_cast<const __half*>(p) + i));
  return __bfloat162float(__ldcg(static_cast<const __nv_bfloat16*>(p) + i));
}

__device__ __forceinline__ void store_float(void* p, int64_t i, int dtype, float v) {
  if (dtype == QUAMBA_F32)
    static_cast<float*>(p)[i] = v;
  else if (dtype == QUAMBA_F16)
    static_cast<__half*>(p)[i] = __float2half_rn(v);
  else
    static_cast<__nv_bfloat16*>(p)[i] = __float2bfloat16_rn(v);
}

// What the epilogue needs of one row of weights: constants, so they may be read before the dependency wait.
struct Channel {
  float scale, bias, out;
};

template <Kind KIND>
__device__ __forceinline__ Channel channel_at(const QuambaLinear& q, int row) {
  Channel c{1.0f, -0.0f, 1.0f};  // adding -0 changes nothing, not even a sign
  if (row >= q.O) return c;
  if (kInteger<KIND>) c.scale = static_cast<const float*>(q.w_scale)[row];
  if (q.bias) c.bias = load_float(q.bias, row, q.bias_dtype);
  if (q.out_scale) c.out = q.out_scale[q.out_scale_count > 1 ? row : 0];
  return c;
}

// y = acc * x_scale * w_scale + bias + residual, each rounded by itself, then int8 or a cast.
template <Kind KIND>
__device__ __forceinline__ void finish(const QuambaLinear& q, const Channel& c, float v, float x_scale, float residual,
                                       int64_t at) {
  if (kInteger<KIND>) v = __fmul_rn(__fmul_rn(v, x_scale), c.scale);
  v = __fadd_rn(__fadd_rn(v, c.bias), residual);
  if (q.out_scale) {
    v = fminf(fmaxf(rintf(__fdiv_rn(v, c.out)), -127.0f), 127.0f);
    static_cast<int8_t*>(q.y)[at] = static_cast<int8_t>(v);
  } else {
    store_float(q.y, at, q.y_dtype, v);
  }
}

// Partial sums, always added in the same order.
template <typename Acc>
__device__ __forceinline__ Acc sum(const uint32_t* from, int count, int by) {
  const Acc* p = reinterpret_cast<const Acc*>(from);
  Acc total = p[0];
#pragma unroll 4
  for (int i = 1; i < count; ++i) total += p[i * by];
  return total;
}

__device__ __forceinline__ uint32_t bits_of(int v) { return static_cast<uint32_t>(v); }
__device__ __forceinline__ uint32_t bits_of(float v) { return __float_as_uint(v); }

}  // namespace quamba::skinny
