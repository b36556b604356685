// The convolution where x, state and outputs are of one 16-bit type and a kernel has four taps: 16-bit activations.
#pragma once

#include "conv_ahead.cuh"

namespace quamba::conv {

// Half: fp16, else bf16. Inputs of the window are kept as floats.
template <bool Half>
struct Halves {
  using Raw = uint2;
  using Kept = uint2;
  using Out = uint2;
  struct Window {
    float inputs[3][4];  // the oldest first
  };

  Window window;
  float taps[4][4], bias[4];  // taps: of the oldest input first

  __device__ __forceinline__ Halves(const QuambaConv& a, int first) {
    constexpr uint4 kNone{};
    uint4 rows[4];  // all loads before the first use
#pragma unroll
    for (int j = 0; j < 4; ++j) rows[j] = load_raw(a.weight, a.weight_dtype, 4LL * (first + j), 4, true);
    const uint4 raw_bias = a.bias ? load_raw(a.bias, a.bias_dtype, first, 4, true) : kNone;
    float scales[4] = {1.f, 1.f, 1.f, 1.f};
    if (a.weight_scale) set(constant_quad(a.weight_scale, QUAMBA_F32, first), scales);
    auto put = [&](int type) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float w[4];
        set(to_floats(rows[j], type), w);
#pragma unroll
        for (int k = 0; k < 4; ++k) taps[k][j] = w[k] * scales[j];
      }
    };
    switch (a.weight_dtype) {
      case QUAMBA_I8: put(QUAMBA_I8); break;
      case QUAMBA_F32: put(QUAMBA_F32); break;
      case QUAMBA_F16: put(QUAMBA_F16); break;
      default: put(QUAMBA_BF16);
    }
    set(to_floats(raw_bias, a.bias_dtype), bias);
  }

  __device__ __forceinline__ void enter(uint2 raw) {
    float v[4];
    set(to_quad(raw), v);
    push(v);
  }

  __device__ __forceinline__ void enter_kept(uint2 raw) { enter(raw); }

  __device__ __forceinline__ uint2 step(uint2 raw) {
    float now[4], y[4];
    set(to_quad(raw), now);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      y[j] = bias[j];
#pragma unroll
      for (int i = 0; i < 3; ++i) y[j] = __fmaf_rn(taps[i][j], window.inputs[i][j], y[j]);
      y[j] = silu(__fmaf_rn(taps[3][j], now[j], y[j]));
    }
    push(now);
    return words(y);
  }

  static __device__ __forceinline__ uint2 kept(const Window& window, int i) { return words(window.inputs[i]); }

 private:
  static __device__ __forceinline__ void set(const float4& from, float (&to)[4]) {
    to[0] = from.x, to[1] = from.y, to[2] = from.z, to[3] = from.w;
  }
  static __device__ __forceinline__ float4 to_quad(uint2 raw) {
    const float2 low = pair_of<Half>(raw.x), high = pair_of<Half>(raw.y);
    return make_float4(low.x, low.y, high.x, high.y);
  }
  static __device__ __forceinline__ uint2 words(const float (&v)[4]) {
    const uint4 raw = to_raw(make_float4(v[0], v[1], v[2], v[3]), Half ? QUAMBA_F16 : QUAMBA_BF16);
    return make_uint2(raw.x, raw.y);
  }
  __device__ __forceinline__ void push(const float (&v)[4]) {
#pragma unroll
    for (int j = 0; j < 4; ++j)
      window.inputs[0][j] = window.inputs[1][j], window.inputs[1][j] = window.inputs[2][j], window.inputs[2][j] = v[j];
  }
};

// Whether a call is of this kind, beyond what holds for every call.
inline bool of_halves(const Conv& p) {
  const QuambaConv& a = p.a;
  return in_whole_quads(p) && p.whole_weight && size_of(a.x_dtype) == 2 && a.y_dtype == a.x_dtype && !a.out_scale &&
         !a.in_scale && !a.x_scale;
}

}  // namespace quamba::conv
