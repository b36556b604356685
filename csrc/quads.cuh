// Four neighbours at a time, of any of the types of linear.h, and the functions that elementwise kernels share.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "approximate.cuh"
#include "linear.h"

namespace quamba {

// A type that is known when a kernel is compiled: one of linear.h, QUAMBA_F16 standing for both of 16 bits, or any.
constexpr int kAny = -1;

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kRounder = 12582912.f;  // 1.5 * 2^23: what is added to it is rounded half to even

__host__ __device__ __forceinline__ constexpr int size_of(int type) {
  return type == QUAMBA_I8 ? 1 : type == QUAMBA_F32 ? 4 : 2;
}

// Whether rows of such a stride can be read in quads: base and rows lie at a multiple of a quad's bytes.
inline bool in_quads(const void* base, int type, long long stride = 0, long long other = 0) {
  return reinterpret_cast<unsigned long long>(base) % (4 * size_of(type)) == 0 && stride % 4 == 0 && other % 4 == 0;
}

// Elements at .. at + count of data, count in 0..4, as they lie: int8 fill x, 16 bits x and y. Through L2: what the
// kernel before has just written is never in L1. ``whole``: all four exist or none, at an aligned place.
__device__ __forceinline__ uint4 load_raw(const void* data, int type, long long at, int count, bool whole) {
  uint4 raw = make_uint4(0, 0, 0, 0);
  if (count <= 0) return raw;
  if (type == QUAMBA_F32) {
    const unsigned* p = static_cast<const unsigned*>(data) + at;
    if (whole) return __ldcg(reinterpret_cast<const uint4*>(p));
    raw.x = __ldcg(p);
    if (count > 1) raw.y = __ldcg(p + 1);
    if (count > 2) raw.z = __ldcg(p + 2);
    if (count > 3) raw.w = __ldcg(p + 3);
  } else if (type == QUAMBA_I8) {
    const unsigned char* p = static_cast<const unsigned char*>(data) + at;
    if (whole) {
      raw.x = __ldcg(reinterpret_cast<const unsigned*>(p));
      return raw;
    }
    raw.x = __ldcg(p);
    if (count > 1) raw.x |= static_cast<unsigned>(__ldcg(p + 1)) << 8;
    if (count > 2) raw.x |= static_cast<unsigned>(__ldcg(p + 2)) << 16;
    if (count > 3) raw.x |= static_cast<unsigned>(__ldcg(p + 3)) << 24;
  } else {
    const unsigned short* p = static_cast<const unsigned short*>(data) + at;
    if (whole) {
      uint2 two = __ldcg(reinterpret_cast<const uint2*>(p));
      return make_uint4(two.x, two.y, 0, 0);
    }
    raw.x = __ldcg(p);
    if (count > 1) raw.x |= static_cast<unsigned>(__ldcg(p + 1)) << 16;
    if (count > 2) raw.y = __ldcg(p + 2);
    if (count > 3) raw.y |= static_cast<unsigned>(__ldcg(p + 3)) << 16;
  }
  return raw;
}

// Four int8 codes of a word as floats: behind the bits of 2^23 they are its last places.
__device__ __forceinline__ float4 codes_to_floats(unsigned word) {
  word ^= 0x80808080u;
  constexpr float kBias = 8388736.f;
  return make_float4(__uint_as_float(__byte_perm(word, 0x4b000000u, 0x7440)) - kBias,
                     __uint_as_float(__byte_perm(word, 0x4b000000u, 0x7441)) - kBias,
                     __uint_as_float(__byte_perm(word, 0x4b000000u, 0x7442)) - kBias,
                     __uint_as_float(__byte_perm(word, 0x4b000000u, 0x7443)) - kBias);
}

__device__ __forceinline__ float2 halves_to_floats(unsigned word, bool half) {
  float2 halves = __half22float2(reinterpret_cast<__half2&>(word));
  return make_float2(half ? halves.x : __uint_as_float(word << 16),
                     half ? halves.y : __uint_as_float(word & 0xffff0000u));
}

__device__ __forceinline__ float4 to_floats(uint4 raw, int type) {
  if (type == QUAMBA_I8) return codes_to_floats(raw.x);
  if (type == QUAMBA_F32)
    return make_float4(__uint_as_float(raw.x), __uint_as_float(raw.y), __uint_as_float(raw.z), __uint_as_float(raw.w));
  float2 low = halves_to_floats(raw.x, type == QUAMBA_F16), high = halves_to_floats(raw.y, type == QUAMBA_F16);
  return make_float4(low.x, low.y, high.x, high.y);
}

// Eight neighbours, and what they are as they lie: 16-bit ones fill `low`.
struct Octet {
  float4 low, high;
};

struct RawOctet {
  uint4 low, high;
};

__device__ __forceinline__ Octet octet_of(const RawOctet& raw, int type) {
  const uint4 low = raw.low, high = type == QUAMBA_F32 ? raw.high : make_uint4(low.z, low.w, 0, 0);
  return {to_floats(low, type), to_floats(high, type)};
}

// The same where the type is known to be Type.
template <int Type>
__device__ __forceinline__ uint4 load_raw_as(const void* data, int type, long long at, int count, bool whole) {
  return load_raw(data, Type == kAny ? type : Type, at, count, whole);
}

template <int Type>
__device__ __forceinline__ float4 to_floats_as(uint4 raw, int type) {
  if constexpr (Type != QUAMBA_F16) return to_floats(raw, Type == kAny ? type : Type);
  float2 low = halves_to_floats(raw.x, type == QUAMBA_F16), high = halves_to_floats(raw.y, type == QUAMBA_F16);
  return make_float4(low.x, low.y, high.x, high.y);
}

__device__ __forceinline__ float4 load_quad(const void* data, int type, long long at, int count, bool whole) {
  return to_floats(load_raw(data, type, at, count, whole), type);
}

// Four constants of a vector over channels, of [1] (step 0) or [C]; absent ones are ``none``.
__device__ __forceinline__ float4 load_scales(const float* data, int step, int first, int count, float none = 0.f) {
  auto one = [&](int j) { return data && j < count ? __ldg(data + static_cast<long long>(first + j) * step) : none; };
  return make_float4(one(0), one(1), one(2), one(3));
}

__device__ __forceinline__ unsigned short to_half(float v, bool half) {
  __half h = __float2half_rn(v);
  __nv_bfloat16 b = __float2bfloat16_rn(v);
  return half ? reinterpret_cast<unsigned short&>(h) : reinterpret_cast<unsigned short&>(b);
}

// What a quad is as elements of a type; int8 takes codes as floats.
__device__ __forceinline__ uint4 to_raw(float4 v, int type) {
  if (type == QUAMBA_F32)
    return make_uint4(__float_as_uint(v.x), __float_as_uint(v.y), __float_as_uint(v.z), __float_as_uint(v.w));
  if (type == QUAMBA_I8) {
    unsigned low = __byte_perm(__float_as_uint(v.x + kRounder), __float_as_uint(v.y + kRounder), 0x0040);
    unsigned high = __byte_perm(__float_as_uint(v.z + kRounder), __float_as_uint(v.w + kRounder), 0x0040);
    return make_uint4(__byte_perm(low, high, 0x5410), 0, 0, 0);
  }
  bool half = type == QUAMBA_F16;
  return make_uint4(to_half(v.x, half) | static_cast<unsigned>(to_half(v.y, half)) << 16,
                    to_half(v.z, half) | static_cast<unsigned>(to_half(v.w, half)) << 16, 0, 0);
}

__device__ __forceinline__ void store_raw(void* data, int type, long long at, uint4 raw, int count, bool whole) {
  if (count <= 0) return;
  if (type == QUAMBA_F32) {
    unsigned* p = static_cast<unsigned*>(data) + at;
    if (whole) {
      *reinterpret_cast<uint4*>(p) = raw;
      return;
    }
    p[0] = raw.x;
    if (count > 1) p[1] = raw.y;
    if (count > 2) p[2] = raw.z;
    if (count > 3) p[3] = raw.w;
  } else if (type == QUAMBA_I8) {
    unsigned char* p = static_cast<unsigned char*>(data) + at;
    if (whole) {
      *reinterpret_cast<unsigned*>(p) = raw.x;
      return;
    }
    for (int j = 0; j < count; ++j) p[j] = static_cast<unsigned char>(raw.x >> (8 * j));
  } else {
    unsigned short* p = static_cast<unsigned short*>(data) + at;
    if (whole) {
      *reinterpret_cast<uint2*>(p) = make_uint2(raw.x, raw.y);
      return;
    }
    p[0] = static_cast<unsigned short>(raw.x);
    if (count > 1) p[1] = static_cast<unsigned short>(raw.x >> 16);
    if (count > 2) p[2] = static_cast<unsigned short>(raw.y);
    if (count > 3) p[3] = static_cast<unsigned short>(raw.y >> 16);
  }
}

__device__ __forceinline__ void store_quad(void* data, int type, long long at, float4 v, int count, bool whole) {
  store_raw(data, type, at, to_raw(v, type), count, whole);
}

template <class F>
__device__ __forceinline__ float4 each(F f, float4 a, float4 b) {
  return make_float4(f(a.x, b.x), f(a.y, b.y), f(a.z, b.z), f(a.w, b.w));
}

template <class F>
__device__ __forceinline__ float4 each(F f, float4 a, float4 b, float4 c) {
  return make_float4(f(a.x, b.x, c.x), f(a.y, b.y, c.y), f(a.z, b.z, c.z), f(a.w, b.w, c.w));
}

__device__ __forceinline__ float silu(float v) { return v * reciprocal_approximate(1.f + exp2_approximate(-kLog2e * v)); }

__device__ __forceinline__ float saturate_code(float v) { return fminf(fmaxf(v, -127.f), 127.f); }

// The code nearest to v / scale, as a float, from the quotient correctly rounded: see to_code in finish.cuh.
__device__ __forceinline__ float round_code(float v, float scale, float inverse) {
  float quotient = __fmul_rn(v, inverse);
  float exact = __fmaf_rn(__fmaf_rn(-quotient, scale, v), inverse, quotient);
  quotient = fabsf(quotient) < 1024.f ? exact : quotient;
  return __fadd_rn(__fadd_rn(saturate_code(quotient), kRounder), -kRounder);
}

// What codes are multiples of: limited to 127 scale first, a quotient needs no bounds, and an approximate inverse will do.
struct Grid {
  float scale, inverse, limit;
};

__device__ __forceinline__ Grid make_grid(float scale) {
  return {scale, reciprocal_approximate(scale), __fmul_rn(127.f, scale)};
}

// The code nearest to v / scale, as a float, from the quotient correctly rounded.
__device__ __forceinline__ float code_on(float v, const Grid& g) {
  v = fminf(fmaxf(v, -g.limit), g.limit);
  const float quotient = __fmul_rn(v, g.inverse);
  const float exact = __fmaf_rn(__fmaf_rn(-quotient, g.scale, v), g.inverse, quotient);
  return __fadd_rn(__fadd_rn(exact, kRounder), -kRounder);
}

// The code nearest to 254 step v, within -127..127, in the lowest byte. The product is limited as a share of 0..1, which a
// multiplication does by the way, and so rounded to about 2^-16 of a code: a tie may become either neighbour.
__device__ __forceinline__ unsigned code_bits(float v, float step) {
  return __float_as_uint(__fmaf_rn(__saturatef(__fmaf_rn(v, step, 0.5f)), 254.f, kRounder - 127.f));
}

// Four constants of a model that lie in a whole quad, through L1.
__device__ __forceinline__ float4 constant_quad(const void* data, int type, int at) {
  if (type == QUAMBA_F32) return __ldg(reinterpret_cast<const float4*>(static_cast<const float*>(data) + at));
  const uint2 two = __ldg(reinterpret_cast<const uint2*>(static_cast<const unsigned short*>(data) + at));
  return to_floats(make_uint4(two.x, two.y, 0, 0), type);
}

// Two 16-bit floats of a word, of the type that is known.
template <bool Half>
__device__ __forceinline__ float2 pair_of(unsigned word) {
  if constexpr (Half) return __half22float2(reinterpret_cast<__half2&>(word));
  return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u));
}

}  // namespace quamba
