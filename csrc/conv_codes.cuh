// The convolution where weights, state and outputs are int8 codes and a kernel has four taps: what a quantised model runs.
//
// The last four inputs of a channel are the bytes of a word, its taps those of another, and the sum is one instruction.
#pragma once

#include <type_traits>

#include "conv_ahead.cuh"

namespace quamba::conv {

// X: the type of x; 16-bit floats are rounded by in_scale.
template <int X>
struct Codes {
  using Raw = std::conditional_t<X == QUAMBA_I8, unsigned, uint2>;
  using Kept = unsigned;
  using Out = unsigned;
  struct Window {
    unsigned inputs[4];  // of each channel
  };

  Window window;
  float limit[4], inverse[4], rest[4];  // of inputs: 127 scales, 1 / scale as the sum of two floats
  float sum_step[4], bias_step[4], sum_power[4], bias_power[4];  // from sums to 1 / 254 of a code, and to powers of 2
  int taps[4];

  __device__ __forceinline__ Codes(const QuambaConv& a, int first) {
    const float4 none = make_float4(0.f, 0.f, 0.f, 0.f);
    auto scales = [&](const float* data, int count) {
      if (data && count > 1) return constant_quad(data, QUAMBA_F32, first);
      const float one = data ? __ldg(data) : 1.f;
      return make_float4(one, one, one, one);
    };
    const float4 in = X == QUAMBA_I8 ? scales(a.x_scale, a.x_scale_count) : scales(a.in_scale, a.in_scale_count);
    const float4 weight = scales(a.weight_scale, a.C), out = scales(a.out_scale, a.out_scale_count);
    const float4 bias = a.bias ? constant_quad(a.bias, a.bias_dtype, first) : none;
    const float ins[4] = {in.x, in.y, in.z, in.w}, outs[4] = {out.x, out.y, out.z, out.w};
    const float weights[4] = {weight.x, weight.y, weight.z, weight.w}, biases[4] = {bias.x, bias.y, bias.z, bias.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      limit[j] = 127.f * ins[j], inverse[j] = reciprocal_approximate(ins[j]);
      rest[j] = __fmaf_rn(-inverse[j], ins[j], 1.f) * inverse[j];
      const float factor = ins[j] * weights[j], step = reciprocal_approximate(outs[j]) * (1.f / 254.f);
      sum_step[j] = factor * step, bias_step[j] = biases[j] * step;
      sum_power[j] = factor * -kLog2e, bias_power[j] = biases[j] * -kLog2e;
    }
    const int4 words = __ldg(reinterpret_cast<const int4*>(static_cast<const signed char*>(a.weight) + 4LL * first));
    taps[0] = words.x, taps[1] = words.y, taps[2] = words.z, taps[3] = words.w;
  }

  __device__ __forceinline__ void enter(Raw raw) {
    if constexpr (X == QUAMBA_I8) {
      enter_kept(raw);
    } else {
      const float2 low = pair_of<X == QUAMBA_F16>(raw.x), high = pair_of<X == QUAMBA_F16>(raw.y);
      const float v[4] = {low.x, low.y, high.x, high.y};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float near = fminf(fmaxf(v[j], -limit[j]), limit[j]);
        const float quotient = __fmaf_rn(near, inverse[j], __fmul_rn(near, rest[j]));  // as a division rounds it
        window.inputs[j] = __byte_perm(window.inputs[j], __float_as_uint(__fadd_rn(quotient, kRounder)), 0x4321);
      }
    }
  }

  __device__ __forceinline__ void enter_kept(unsigned word) {
#pragma unroll
    for (int j = 0; j < 4; ++j) window.inputs[j] = __byte_perm(window.inputs[j], word, 0x321 | (4 + j) << 12);
  }

  __device__ __forceinline__ unsigned step(Raw raw) {
    enter(raw);
    unsigned codes[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      // a float beside the sum
      const int bits = __dp4a(static_cast<int>(window.inputs[j]), taps[j], __float_as_int(kRounder));
      const float sum = __fadd_rn(__int_as_float(bits), -kRounder);
      const float share = reciprocal_approximate(1.f + exp2_approximate(__fmaf_rn(sum, sum_power[j], bias_power[j])));
      codes[j] = code_bits(share, __fmaf_rn(sum, sum_step[j], bias_step[j]));
    }
    return pack(codes, 0);
  }

  static __device__ __forceinline__ unsigned kept(const Window& window, int i) { return pack(window.inputs, i + 1); }

 private:
  static __device__ __forceinline__ unsigned pack(const unsigned (&v)[4], int byte) {  // a byte of each
    const int two = byte | (4 + byte) << 4;
    return __byte_perm(__byte_perm(v[0], v[1], two), __byte_perm(v[2], v[3], two), 0x5410);
  }
};

// Whether a call is of this kind, beyond what holds for every call.
inline bool of_codes(const Conv& p) {
  const QuambaConv& a = p.a;
  return in_whole_quads(p) && a.weight_dtype == QUAMBA_I8 && a.out_scale && in_quads(a.weight, QUAMBA_F32) &&
         in_quads(a.in_scale, QUAMBA_F32) && in_quads(a.x_scale, QUAMBA_F32) && in_quads(a.out_scale, QUAMBA_F32) &&
         (a.in_scale ? size_of(a.x_dtype) == 2 : a.x_dtype == QUAMBA_I8);
}

}  // namespace quamba::conv
