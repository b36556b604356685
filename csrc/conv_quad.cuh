// One token of the convolution for four neighbouring channels of codes, which travel as words: what many sequences pay for.
#pragma once

#include "decode_state.cuh"

namespace quamba::decode {

// Four scales of neighbouring channels, or one for all; 1 where there is none.
__device__ __forceinline__ void quad_of(const float* data, int count, int channel, float (&v)[4]) {
  if (data && count > 1) {
    const uint4 four = constant_quad(data + channel);
    v[0] = __uint_as_float(four.x), v[1] = __uint_as_float(four.y);
    v[2] = __uint_as_float(four.z), v[3] = __uint_as_float(four.w);
  } else {
    v[0] = v[1] = v[2] = v[3] = constant(data, 0, 1.f);
  }
}

// Element j of four of a 16-bit type.
__device__ __forceinline__ float half_of(const uint2& words, int j, int type) {
  return to_float((j < 2 ? words.x : words.y) >> (16 * (j % 2)), type == QUAMBA_F16 ? QUAMBA_F16 : QUAMBA_BF16);
}

__device__ __forceinline__ uint2 fetch_halves(const void* data, long long at) {
  return __ldcg(reinterpret_cast<const uint2*>(address(data, QUAMBA_F16, at)));
}

// The low bytes of four words.
__device__ __forceinline__ unsigned low_bytes(unsigned a, unsigned b, unsigned c, unsigned d) {
  return __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410);
}

struct QuadTaps {
  unsigned weight[4];
  float in[4], weight_scale[4], out[4], bias[4];
};

// Constants of channels c .. c + 3, c a multiple of 4.
// The bias of four channels, of any type of float; left as it is where there is none.
__device__ __forceinline__ void quad_bias(const QuambaDecode& q, int c, float (&bias)[4]) {
  if (q.conv_bias && q.conv_bias_type == QUAMBA_F32) {
    quad_of(static_cast<const float*>(q.conv_bias), 4, c, bias);
  } else if (q.conv_bias) {
    const uint2 two = constant_pair(static_cast<const uint2*>(q.conv_bias) + c / 4);
#pragma unroll
    for (int j = 0; j < 4; ++j) bias[j] = half_of(two, j, q.conv_bias_type);
  }
}

__device__ __forceinline__ QuadTaps quad_taps(const QuambaDecode& q, int c) {
  QuadTaps t{};
  const uint4 weight = constant_quad(static_cast<const uint4*>(q.conv_weight) + c / 4);
  t.weight[0] = weight.x, t.weight[1] = weight.y, t.weight[2] = weight.z, t.weight[3] = weight.w;
  quad_of(q.conv_in_scale, q.conv_in_count, c, t.in);
  quad_of(q.conv_weight_scale, 4, c, t.weight_scale);
  quad_of(q.conv_out_scale, 4, c, t.out);
  quad_bias(q, c, t.bias);
  return t;
}

// The inputs before, a word a token.
struct QuadWindow {
  unsigned* at;
  unsigned past[3];
};

__device__ __forceinline__ QuadWindow quad_window(const QuambaDecode& q, int batch, int c) {
  QuadWindow w;
  w.at = reinterpret_cast<unsigned*>(static_cast<char*>(q.conv_state) + 3ll * batch * q.channels + c);
#pragma unroll
  for (int i = 0; i < 3; ++i) w.past[i] = __ldcg(w.at + i * (q.channels / 4));
  return w;
}

// Output codes of the four channels, for the new inputs `x` of 16 bits; `moves`: the state moves on. As convolve and
// shift of decode_state.cuh, code by code: sums of products of codes are exact in any order.
__device__ __forceinline__ void convolve_quad(const QuambaDecode& q, const QuadTaps& t, const QuadWindow& w, const uint2& x,
                                              float (&y)[4], bool moves = true) {
  const int in = Types<true>::input(q);
  unsigned codes[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) codes[j] = static_cast<unsigned>(static_cast<int>(code_of(half_of(x, j, in), t.in[j])));
  const unsigned newest = low_bytes(codes[0], codes[1], codes[2], codes[3]);
  if (moves) w.at[0] = w.past[1], w.at[q.channels / 4] = w.past[2], w.at[q.channels / 4 * 2] = newest;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int pick = (4 + j) << 4 | j;
    const unsigned tokens =
        __byte_perm(__byte_perm(w.past[0], w.past[1], pick), __byte_perm(w.past[2], newest, pick), 0x5410);
    const float sum = static_cast<float>(__dp4a(static_cast<int>(tokens), static_cast<int>(t.weight[j]), 0));
    float v = __fmul_rn(__fmul_rn(sum, t.in[j]), t.weight_scale[j]);
    if (q.conv_bias) v = __fadd_rn(v, t.bias[j]);
    y[j] = code_of(silu(v), t.out[j]);
  }
}

__device__ __forceinline__ unsigned quad_codes(const float (&y)[4]) {
  return low_bytes(static_cast<unsigned>(static_cast<int>(y[0])), static_cast<unsigned>(static_cast<int>(y[1])),
                   static_cast<unsigned>(static_cast<int>(y[2])), static_cast<unsigned>(static_cast<int>(y[3])));
}

// The same of a convolution in 16-bit floats, whose products and sums are rounded one by one as in convolve.
struct HalfTaps {
  uint4 weight[2];  // of two channels each
  float bias[4];
};

__device__ __forceinline__ HalfTaps half_taps(const QuambaDecode& q, int c) {
  HalfTaps t{};
  t.weight[0] = constant_quad(static_cast<const uint4*>(q.conv_weight) + c / 2);
  t.weight[1] = constant_quad(static_cast<const uint4*>(q.conv_weight) + c / 2 + 1);
  quad_bias(q, c, t.bias);
  return t;
}

struct HalfWindow {
  uint2* at;
  uint2 past[3];
};

__device__ __forceinline__ HalfWindow half_window(const QuambaDecode& q, int batch, int c) {
  HalfWindow w;
  w.at = reinterpret_cast<uint2*>(static_cast<char*>(q.conv_state) + 2 * (3ll * batch * q.channels + c));
#pragma unroll
  for (int i = 0; i < 3; ++i) w.past[i] = __ldcg(w.at + i * (q.channels / 4));
  return w;
}

__device__ __forceinline__ void convolve_halves(const QuambaDecode& q, const HalfTaps& t, const HalfWindow& w,
                                                const uint2& x, float (&y)[4], bool moves = true) {
  const int in = Types<true>::input(q);
  if (moves) w.at[0] = w.past[1], w.at[q.channels / 4] = w.past[2], w.at[q.channels / 4 * 2] = x;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const uint4& two = t.weight[j / 2];
    const uint2 taps = j % 2 ? make_uint2(two.z, two.w) : make_uint2(two.x, two.y);
    float v = __fmul_rn(half_of(w.past[0], j, in), half_of(taps, 0, q.conv_weight_type));
    v = __fadd_rn(v, __fmul_rn(half_of(w.past[1], j, in), half_of(taps, 1, q.conv_weight_type)));
    v = __fadd_rn(v, __fmul_rn(half_of(w.past[2], j, in), half_of(taps, 2, q.conv_weight_type)));
    v = __fadd_rn(v, __fmul_rn(half_of(x, j, in), half_of(taps, 3, q.conv_weight_type)));
    if (q.conv_bias) v = __fadd_rn(v, t.bias[j]);
    y[j] = rounded(silu(v), in);
  }
}

// The state of four channels moves on, without an output.
__device__ __forceinline__ void shift_quad(const QuambaDecode& q, int batch, int c, const uint2& x) {
  if (!q.conv_in_scale) {
    const HalfWindow w = half_window(q, batch, c);
    w.at[0] = w.past[1], w.at[q.channels / 4] = w.past[2], w.at[q.channels / 4 * 2] = x;
    return;
  }
  const QuadWindow w = quad_window(q, batch, c);
  float scale[4], codes[4];
  quad_of(q.conv_in_scale, q.conv_in_count, c, scale);
#pragma unroll
  for (int j = 0; j < 4; ++j) codes[j] = code_of(half_of(x, j, Types<true>::input(q)), scale[j]);
  w.at[0] = w.past[1], w.at[q.channels / 4] = w.past[2], w.at[q.channels / 4 * 2] = quad_codes(codes);
}

// Whether four channels of 16-bit floats lie as these functions read them.
inline bool has_half_quads(const QuambaDecode& q) {
  const auto aligned = [](const void* p, int bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; };
  const auto half = [](int type) { return type == QUAMBA_F16 || type == QUAMBA_BF16; };
  return half(q.in) && q.conv_state_type == q.in && half(q.conv_weight_type) && !q.conv_in_scale &&
         !q.conv_weight_scale && !q.conv_out_scale && aligned(q.conv_weight, 16) && aligned(q.conv_bias, 16) &&
         q.channels % 4 == 0 && aligned(q.conv_state, 8) && aligned(q.x, 8) && q.x_stride % 4 == 0;
}

// Whether four channels of codes lie as these functions read them.
inline bool has_quads(const QuambaDecode& q) {
  const auto aligned = [](const void* p, int bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; };
  for (const void* p : {q.conv_weight, static_cast<const void*>(q.conv_in_scale), q.conv_bias,
                        static_cast<const void*>(q.conv_weight_scale), static_cast<const void*>(q.conv_out_scale)})
    if (!aligned(p, 16)) return false;
  return all_codes(q) && q.channels % 4 == 0 && aligned(q.conv_state, 4) && aligned(q.x, 8) && q.x_stride % 4 == 0;
}

}  // namespace quamba::decode
