// What the decode kernels share: elements of any type, one token of the convolution, and rows of the recurrent state.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "approximate.cuh"
#include "decode.h"
#include "mma.cuh"

namespace quamba::decode {

constexpr int kWidth = 4;  // taps of the convolution

// Elements are fetched as the aligned words that hold them and made floats later: one load whatever the type, and none
// that waits for the one before it to be converted.
__device__ __forceinline__ uintptr_t address(const void* data, int type, long long at) {
  return reinterpret_cast<uintptr_t>(data) + (at << (type == QUAMBA_F32 ? 2 : type == QUAMBA_I8 ? 0 : 1));
}

// What an earlier kernel wrote: through L2, since L1 may hold what was there before.
__device__ __forceinline__ unsigned fetch(const void* data, int type, long long at) {
  return __ldcg(reinterpret_cast<const unsigned*>(address(data, type, at) & ~static_cast<uintptr_t>(3)));
}

__device__ __forceinline__ unsigned fetch_constant(const void* data, int type, long long at) {
  return constant_word(reinterpret_cast<const void*>(address(data, type, at) & ~static_cast<uintptr_t>(3)));
}

__device__ __forceinline__ float to_float(unsigned bits, int type) {
  const unsigned short low = static_cast<unsigned short>(bits);
  const float half = __half2float(reinterpret_cast<const __half&>(low));
  const float brain = __uint_as_float(bits << 16);
  const float code = static_cast<float>(static_cast<signed char>(bits));
  return type == QUAMBA_F32 ? __uint_as_float(bits) : type == QUAMBA_F16 ? half : type == QUAMBA_BF16 ? brain : code;
}

// The element in a word that was fetched with the same arguments.
__device__ __forceinline__ float value(unsigned word, const void* data, int type, long long at) {
  return to_float(word >> (address(data, type, at) % 4 * 8), type);
}

// One fp32 constant of the model, or `none` where there is no tensor.
__device__ __forceinline__ float constant(const float* data, int at, float none) { return data ? __uint_as_float(constant_word(data + at)) : none; }

__device__ __forceinline__ void store(void* data, int type, long long at, float v) {
  if (type == QUAMBA_F32) static_cast<float*>(data)[at] = v;
  if (type == QUAMBA_F16) static_cast<__half*>(data)[at] = __float2half_rn(v);
  if (type == QUAMBA_BF16) static_cast<__nv_bfloat16*>(data)[at] = __float2bfloat16_rn(v);
  if (type == QUAMBA_I8) static_cast<signed char*>(data)[at] = static_cast<signed char>(v);
}

// v as a tensor of that type would keep it.
__device__ __forceinline__ float rounded(float v, int type) {
  if (type == QUAMBA_F16) return __half2float(__float2half_rn(v));
  if (type == QUAMBA_BF16) return __bfloat162float(__float2bfloat16_rn(v));
  return v;
}

// v / d to the last place, without the branches of a division: one Newton step from an approximate inverse. d and 1 / d are
// normal numbers.
__device__ __forceinline__ float quotient(float v, float d) {
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(d));
  const float q = __fmul_rn(v, inverse);
  return __fmaf_rn(__fmaf_rn(-q, d, v), inverse, q);
}

__device__ __forceinline__ float code_of(float v, float scale) {
  const float limit = 1024.f * scale;  // far beyond the last code, and the step takes no infinity
  return fminf(fmaxf(rintf(quotient(fminf(fmaxf(v, -limit), limit), scale)), -127.f), 127.f);
}

__device__ __forceinline__ float silu(float v) { return quotient(v, 1.f + fminf(expf(-v), 1e37f)); }

// max(v, 0) + log(1 + exp(-|v|)), without branches: log(1 + t) = 2 atanh(t / (2 + t)), a series of which 8 terms suffice.
__device__ __forceinline__ float softplus(float v) {
  const float t = exp2_approximate(-1.44269504088896341f * fabsf(v)), s = quotient(t, 2.f + t), square = s * s;
  float sum = 1.f / 15.f;
#pragma unroll
  for (int k = 13; k > 0; k -= 2) sum = fmaf(sum, square, 1.f / static_cast<float>(k));
  return fmaxf(v, 0.f) + 2.f * s * sum;
}

// One channel of the convolution: constants of the model, then what the step brings, as they lie.
//
// CODES: what a quantised model has (16-bit activations, int8 state, taps and output) is known at compile time.
template <bool CODES>
struct Types {
  static __device__ __forceinline__ int state(const QuambaDecode& q) { return CODES ? QUAMBA_I8 : q.conv_state_type; }
  static __device__ __forceinline__ int weight(const QuambaDecode& q) { return CODES ? QUAMBA_I8 : q.conv_weight_type; }
  static __device__ __forceinline__ int input(const QuambaDecode& q) {
    return CODES ? (q.in == QUAMBA_F16 ? QUAMBA_F16 : QUAMBA_BF16) : q.in;
  }
};

inline bool all_codes(const QuambaDecode& q) {
  return q.in != QUAMBA_F32 && q.conv_state_type == QUAMBA_I8 && q.conv_weight_type == QUAMBA_I8 && q.conv_in_scale &&
         q.conv_weight_scale && q.conv_out_scale;
}

struct Taps {
  uint4 weight;
  unsigned bias;
  float in, weight_scale, out;
};

template <bool CODES>
__device__ __forceinline__ Taps taps_of(const QuambaDecode& q, int channel) {
  Taps t{};
  const int type = Types<CODES>::weight(q);
  if (type == QUAMBA_F32) {
    t.weight = constant_quad(static_cast<const uint4*>(q.conv_weight) + channel);
  } else {
    const int pair = type == QUAMBA_I8 ? channel / 2 : channel;  // int8: of two channels
    const uint2 two = constant_pair(static_cast<const uint2*>(q.conv_weight) + pair);
    t.weight.x = two.x, t.weight.y = two.y;
  }
  if (q.conv_bias) t.bias = fetch_constant(q.conv_bias, q.conv_bias_type, channel);
  t.in = constant(q.conv_in_scale, q.conv_in_count > 1 ? channel : 0, 1.f);
  t.weight_scale = constant(q.conv_weight_scale, channel, 1.f);
  t.out = constant(q.conv_out_scale, channel, 1.f);
  return t;
}

__device__ __forceinline__ void unpack_taps(int type, const uint4& v, int channel, float (&w)[kWidth]) {
  if (type == QUAMBA_I8) {
    const unsigned four = channel % 2 ? v.y : v.x;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) w[i] = to_float(four >> (8 * i), QUAMBA_I8);
  } else if (type == QUAMBA_F32) {
    w[0] = __uint_as_float(v.x), w[1] = __uint_as_float(v.y), w[2] = __uint_as_float(v.z), w[3] = __uint_as_float(v.w);
  } else {
    w[0] = to_float(v.x, type), w[1] = to_float(v.x >> 16, type);
    w[2] = to_float(v.y, type), w[3] = to_float(v.y >> 16, type);
  }
}

// A channel's inputs: where they lie, those before, and the new one.
struct Window {
  int batch, channel;
  const void* input;
  long long at;
  unsigned past[kWidth - 1], x;
};

__device__ __forceinline__ long long conv_place(const QuambaDecode& q, const Window& v, int tap) {
  return (static_cast<long long>(v.batch) * (kWidth - 1) + tap) * q.channels + v.channel;
}

// `at`: of the channel's input in `input`.
template <bool CODES>
__device__ __forceinline__ Window window_of(const QuambaDecode& q, int batch, int channel, const void* input,
                                            long long at) {
  Window v{batch, channel, input, at};
  v.x = fetch(input, Types<CODES>::input(q), at);
#pragma unroll
  for (int w = 0; w < kWidth - 1; ++w) v.past[w] = fetch(q.conv_state, Types<CODES>::state(q), conv_place(q, v, w));
  return v;
}

template <bool CODES>
__device__ __forceinline__ float past(const QuambaDecode& q, const Window& v, int tap) {
  return value(v.past[tap], q.conv_state, Types<CODES>::state(q), conv_place(q, v, tap));
}

// What the state keeps of the new input: a code where there is a scale.
template <bool CODES>
__device__ __forceinline__ float newest(const QuambaDecode& q, float in_scale, const Window& v) {
  const float x = value(v.x, v.input, Types<CODES>::input(q), v.at);
  return CODES || q.conv_in_scale ? code_of(x, in_scale) : x;
}

// The channel's output: a code, or a float of type `in`. Products and sums are rounded one by one, as in ops/conv.py,
// so that codes do not differ from its.
template <bool CODES>
__device__ __forceinline__ float convolve(const QuambaDecode& q, const Taps& t, const Window& v) {
  float w[kWidth];
  unpack_taps(Types<CODES>::weight(q), t.weight, v.channel, w);
  float y = __fmul_rn(past<CODES>(q, v, 0), w[0]);
  y = __fadd_rn(y, __fmul_rn(past<CODES>(q, v, 1), w[1]));
  y = __fadd_rn(y, __fmul_rn(past<CODES>(q, v, 2), w[2]));
  y = __fadd_rn(y, __fmul_rn(newest<CODES>(q, t.in, v), w[3]));
  y = __fmul_rn(__fmul_rn(y, t.in), t.weight_scale);
  if (q.conv_bias) y = __fadd_rn(y, value(t.bias, q.conv_bias, q.conv_bias_type, v.channel));
  y = silu(y);
  return CODES || q.conv_out_scale ? code_of(y, t.out) : rounded(y, q.in);
}

template <bool CODES>
__device__ __forceinline__ void shift(const QuambaDecode& q, float in_scale, const Window& v) {
  const int type = Types<CODES>::state(q);
#pragma unroll
  for (int w = 0; w < kWidth - 2; ++w) store(q.conv_state, type, conv_place(q, v, w), past<CODES>(q, v, w + 1));
  store(q.conv_state, type, conv_place(q, v, kWidth - 2), newest<CODES>(q, in_scale, v));
}

// What a row of Mamba2's state brings into the recurrence, and the constants that this takes.
struct __align__(16) Row {
  float decay, input, skip, gate;  // exp(dt A), dt x, D x, silu(z)
};

struct Rates {
  float A, D, dt_bias, z_scale;
};

// silu(z), z being quantised first where it has a scale.
__device__ __forceinline__ float gate_of(const QuambaDecode& q, float z, float scale) {
  return silu(q.z_scale ? __fmul_rn(code_of(z, scale), scale) : z);
}

// The dither of ops/state.py: one hash a row and one a column.
__device__ __forceinline__ unsigned mix(unsigned v) {
  v = (v ^ v >> 16) * 0x7FEB352Du;
  v = (v ^ v >> 15) * 0x846CA68Bu;
  return v ^ v >> 16;
}

__device__ __forceinline__ unsigned dither_key(const long long* rng) {
  return mix(static_cast<unsigned>(__ldcg(rng)) ^ mix(static_cast<unsigned>(__ldcg(rng + 1))));
}

// As 32 bits behind the point, of which fp32 keeps 24, so that the sum of two wraps around to its fraction. It has to wrap
// where the fp32 sum of ops/state.py does, which rounds to 1 from 1 - 2^-25 on: that is added to a row's. Where one wrapped
// and the other did not, codes of values beside an integer were off by 2.
__device__ __forceinline__ unsigned column_draw(unsigned key, unsigned index) {
  return __float2uint_rz(fminf(__uint2float_rn(mix(index + key)), 4294967040.f));
}

__device__ __forceinline__ unsigned row_draw(unsigned key, unsigned index) { return column_draw(key, index) + 128; }

// COUNT neighbouring elements of a row of the state, as they are stored.
template <typename State, int COUNT>
struct Stored {
  static constexpr int kWords = COUNT * sizeof(State) / 16;
  uint4 words[kWords];

  __device__ __forceinline__ void load(const State* p) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = __ldcg(reinterpret_cast<const uint4*>(p) + i);
  }

  __device__ __forceinline__ void store(State* p) const {
#pragma unroll
    for (int i = 0; i < kWords; ++i) __stcg(reinterpret_cast<uint4*>(p) + i, words[i]);
  }
};

__device__ __forceinline__ void unpack(const Stored<float, 4>& s, float (&h)[4]) {
  const uint4 v = s.words[0];
  h[0] = __uint_as_float(v.x), h[1] = __uint_as_float(v.y), h[2] = __uint_as_float(v.z), h[3] = __uint_as_float(v.w);
}

__device__ __forceinline__ void unpack(const Stored<float, 8>& s, float (&h)[8]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint4 v = s.words[i];
    h[4 * i] = __uint_as_float(v.x), h[4 * i + 1] = __uint_as_float(v.y);
    h[4 * i + 2] = __uint_as_float(v.z), h[4 * i + 3] = __uint_as_float(v.w);
  }
}

__device__ __forceinline__ void unpack(const Stored<__half, 8>& s, float (&h)[8]) {
  const unsigned words[4] = {s.words[0].x, s.words[0].y, s.words[0].z, s.words[0].w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 two = __half22float2(reinterpret_cast<const __half2&>(words[i]));
    h[2 * i] = two.x, h[2 * i + 1] = two.y;
  }
}

// A code, its sign flipped, behind the bits of 2^23 is a float whose last places it fills: a byte permutation and a
// subtraction.
constexpr unsigned kFlip = 0x80808080u;

__device__ __forceinline__ void unpack(const unsigned (&codes)[4], float (&h)[16]) {
#pragma unroll
  for (int i = 0; i < 16; ++i)
    h[i] = __uint_as_float(__byte_perm(codes[i / 4], 0x4b000000u, 0x7440 + i % 4)) - 8388736.f;
}

__device__ __forceinline__ void unpack(const Stored<int8_t, 16>& s, float (&h)[16]) {
  const uint4& v = s.words[0];
  const unsigned codes[4] = {v.x ^ kFlip, v.y ^ kFlip, v.z ^ kFlip, v.w ^ kFlip};
  unpack(codes, h);
}

template <int COUNT>
__device__ __forceinline__ void pack(const float (&h)[COUNT], Stored<float, COUNT>& s) {
#pragma unroll
  for (int i = 0; i < COUNT / 4; ++i)
    s.words[i] = make_uint4(__float_as_uint(h[4 * i]), __float_as_uint(h[4 * i + 1]), __float_as_uint(h[4 * i + 2]),
                            __float_as_uint(h[4 * i + 3]));
}

__device__ __forceinline__ void pack(const float (&h)[8], Stored<__half, 8>& s) {
  unsigned words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const __half2 two = __floats2half2_rn(h[2 * i], h[2 * i + 1]);
    words[i] = reinterpret_cast<const unsigned&>(two);
  }
  s.words[0] = make_uint4(words[0], words[1], words[2], words[3]);
}

template <int LANES>
__device__ __forceinline__ float sum_lanes(float v) {
#pragma unroll
  for (int step = LANES / 2; step; step /= 2) v += __shfl_xor_sync(~0u, v, step);
  return v;
}

template <int LANES>
__device__ __forceinline__ float max_lanes(float v) {
#pragma unroll
  for (int step = LANES / 2; step; step /= 2) v = fmaxf(v, __shfl_xor_sync(~0u, v, step));
  return v;
}

// A row of codes has the scale peak / 127. With dither the inverse is a few units in the last place too small, so that no
// code lies beyond 127 and nothing has to be clamped.
__device__ __forceinline__ float scale_of(float peak) { return peak > 0.f ? quotient(peak, 127.f) : 1.f; }

__device__ __forceinline__ float inverse_of(float peak, bool noisy) {
  const float nearest = peak > 0x1p-120f ? quotient(127.f, peak) : 0.f;
  return noisy ? nearest * (1.f - 0x1p-21f) : nearest;
}

// 1.5 * 2^23 leaves a sum whose last place is 1: added to nearest it rounds half to even, added downwards it is the floor;
// the code is the low byte either way.
__device__ __forceinline__ void round_row(float (&h)[16], float inverse, bool noisy, unsigned of_row,
                                          const unsigned (&column)[16], Stored<int8_t, 16>& s) {
  constexpr float kRounder = 12582912.f;
  if (noisy) {
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      // 1 + dither: its upper 23 bits behind the exponent of 1.
      const float dither = __uint_as_float(__funnelshift_r(of_row + column[i], 0x7f, 9));
      h[i] = __fadd_rd(__fmaf_rn(h[i], inverse, dither), kRounder - 1.f);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 16; ++i) h[i] = __fadd_rn(__fmul_rn(h[i], inverse), kRounder);
  }
  unsigned words[4];
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    const auto pair = [&](int i) { return __byte_perm(__float_as_uint(h[i]), __float_as_uint(h[i + 1]), 0x0040); };
    words[w] = __byte_perm(pair(4 * w), pair(4 * w + 2), 0x5410);
  }
  s.words[0] = make_uint4(words[0], words[1], words[2], words[3]);
}

// Quantises a row that LANES lanes hold; returns its scale.
template <int LANES>
__device__ __forceinline__ float quantize_row(float (&h)[16], bool noisy, unsigned of_row, const unsigned (&column)[16],
                                              Stored<int8_t, 16>& s) {
  float peak = 0.f;
#pragma unroll
  for (int i = 0; i < 16; ++i) peak = fmaxf(peak, fabsf(h[i]));
  peak = max_lanes<LANES>(peak);
  round_row(h, inverse_of(peak, noisy), noisy, of_row, column, s);
  return scale_of(peak);
}

}  // namespace quamba::decode
