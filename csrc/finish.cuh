// The epilogue of the tiled linears: y = float(acc) * x_scale * w_scale + bias + residual, then a cast or static int8,
// as ops/linear.finish and ops/rowwise.to_int8 define it. Every product and sum is rounded on its own (no fma).
//
// Tensor cores leave a tile in registers so that lane 4 g + q of a warp holds columns 2 q, 2 q + 1 of each block of
// eight, in rows g and g + 8. fp32 results and residuals are thus whole 32-byte sectors as they lie; 16-bit and int8
// results are passed around within the four lanes of a row first, so that a lane stores eight neighbours at once.
//
// Accumulators live in registers, so all of this is unrolled over the tile, and code that does not fit the instruction
// cache costs more than the arithmetic in it. Types are therefore told apart once a tile, not once an element.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "linear.h"

namespace quamba {

constexpr int kBlock = 8;  // columns that belong together in a tensor core's accumulator
constexpr int kGroup = 4;  // blocks that are finished together: 32 columns

struct Finish {
  const float* x_scale;
  const float* w_scale;
  const void* bias;
  const void* residual;
  const float* out_scale;  // null: y has type y_dtype
  void* y;
  int M, O;
  int x_step, out_step;  // 0: one scale for all rows (columns)
  int bias_dtype, residual_dtype, y_dtype;
};

inline Finish make_finish(const QuambaLinear& a, const float* w_scale) {
  return {a.x_scale,
          w_scale,
          a.bias,
          a.residual,
          a.out_scale,
          a.y,
          a.M,
          a.O,
          a.x_scale_count > 1 ? 1 : 0,
          a.out_scale_count > 1 ? 1 : 0,
          a.bias_dtype,
          a.residual_dtype,
          a.out_scale ? QUAMBA_I8 : a.y_dtype};
}

// What the epilogue and the loads can serve: O a multiple of 8, float bias and residual, tensors at 16 bytes.
inline bool can_finish(const QuambaLinear& a) {
  auto is_float = [](int type) { return type == QUAMBA_F32 || type == QUAMBA_F16 || type == QUAMBA_BF16; };
  for (const void* p : {a.x, a.w, a.w_scale, a.bias, a.residual, static_cast<const void*>(a.out_scale),
                        static_cast<const void*>(a.y)})
    if (reinterpret_cast<unsigned long long>(p) % 16) return false;
  return a.M > 0 && a.O > 0 && a.O % kBlock == 0 && (!a.bias || is_float(a.bias_dtype)) &&
         (!a.residual || is_float(a.residual_dtype)) && (a.out_scale || is_float(a.y_dtype));
}

// One element of a vector over the columns.
__device__ __forceinline__ float load_one(const void* data, int type, int at) {
  if (type == QUAMBA_F32) return __ldg(static_cast<const float*>(data) + at);
  if (type == QUAMBA_F16) return __half2float(__ldg(static_cast<const __half*>(data) + at));
  return __bfloat162float(__ldg(static_cast<const __nv_bfloat16*>(data) + at));
}

__device__ __forceinline__ unsigned pack_pair(float low, float high, bool half) {
  __half2 halves = __floats2half2_rn(low, high);
  __nv_bfloat162 brains = __floats2bfloat162_rn(low, high);
  return half ? reinterpret_cast<unsigned&>(halves) : reinterpret_cast<unsigned&>(brains);
}

// rint(y / scale) in [-127, 127], as the low byte of a word: from the rounded inverse, one Newton step makes the
// quotient correctly rounded (Markstein), where it is small enough to matter. Adding 3 * 2^22 leaves a sum whose last
// place is 1, which rounds half to even.
__device__ __forceinline__ unsigned to_code(float y, float scale, float inverse) {
  float quotient = __fmul_rn(y, inverse);
  float exact = __fmaf_rn(__fmaf_rn(-quotient, scale, y), inverse, quotient);
  quotient = fabsf(quotient) < 1024.f ? exact : quotient;
  return __float_as_uint(__fadd_rn(fminf(fmaxf(quotient, -127.f), 127.f), 12582912.f));
}

// The four lanes of a row each hold a word of four blocks; lane q leaves with the four words of block q.
__device__ __forceinline__ uint4 gather_words(const unsigned (&word)[kGroup]) {
  bool odd = threadIdx.x & 1, upper = threadIdx.x & 2;
  unsigned even_source[2], odd_source[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    unsigned kept = odd ? word[2 * h + 1] : word[2 * h];
    unsigned got = __shfl_xor_sync(~0u, odd ? word[2 * h] : word[2 * h + 1], 1);
    even_source[h] = odd ? got : kept;
    odd_source[h] = odd ? kept : got;
  }
  unsigned low = __shfl_xor_sync(~0u, upper ? even_source[0] : even_source[1], 2);
  unsigned high = __shfl_xor_sync(~0u, upper ? odd_source[0] : odd_source[1], 2);
  return upper ? make_uint4(low, high, even_source[1], odd_source[1])
               : make_uint4(even_source[0], odd_source[0], low, high);
}

// The same for 16-bit pieces, two blocks a word: lane q leaves with the eight bytes of block q.
__device__ __forceinline__ uint2 gather_bytes(unsigned blocks01, unsigned blocks23) {
  bool odd = threadIdx.x & 1, upper = threadIdx.x & 2;
  unsigned kept = __byte_perm(blocks01, blocks23, odd ? 0x7632 : 0x5410);
  unsigned got = __shfl_xor_sync(~0u, __byte_perm(blocks01, blocks23, odd ? 0x5410 : 0x7632), 1);
  unsigned even_source = odd ? got : kept, odd_source = odd ? kept : got;
  unsigned mine = __byte_perm(even_source, odd_source, upper ? 0x7632 : 0x5410);
  unsigned other = __shfl_xor_sync(~0u, __byte_perm(even_source, odd_source, upper ? 0x5410 : 0x7632), 2);
  return upper ? make_uint2(other, mine) : make_uint2(mine, other);
}

// Parameters of two neighbouring columns.
struct Pair {
  float2 w, bias, scale, inverse;
};

// Columns as they lie in global memory.
template <bool Scaled>
struct GlobalColumns {
  static constexpr bool kScaled = Scaled;
  const Finish& p;
  int first;

  __device__ __forceinline__ void ready() const {}

  template <bool Codes>
  __device__ __forceinline__ Pair load(int column) const {
    Pair c{};
    int n = first + column;
    if (n >= p.O) return c;
    if (Scaled) c.w = __ldg(reinterpret_cast<const float2*>(p.w_scale + n));
    if (p.bias) c.bias = make_float2(load_one(p.bias, p.bias_dtype, n), load_one(p.bias, p.bias_dtype, n + 1));
    if (Codes) {
      c.scale = make_float2(__ldg(p.out_scale + n * p.out_step), __ldg(p.out_scale + (n + 1) * p.out_step));
      c.inverse = make_float2(__frcp_rn(c.scale.x), __frcp_rn(c.scale.y));
    }
    return c;
  }
};

// Columns of a tile that a warp group has brought into shared memory as fp32, so that no type, bound or division is
// left to what is unrolled.
template <int Count>
struct SharedColumns {
  static constexpr bool kScaled = true;
  struct Storage {
    float w[Count], bias[Count], scale[Count], inverse[Count];
  };
  const Finish& p;
  int first;
  Storage& s;
  int barrier;  // of these 128 threads alone

  __device__ __forceinline__ void sync() const { asm volatile("bar.sync %0, 128;" ::"r"(barrier) : "memory"); }

  __device__ __forceinline__ void ready() const {
    sync();  // the tile before has been read
#pragma unroll 1
    for (int i = threadIdx.x % 128; i < Count; i += 128) {
      int n = min(first + i, p.O - 1);
      s.w[i] = __ldg(p.w_scale + n);
      s.bias[i] = p.bias ? load_one(p.bias, p.bias_dtype, n) : 0.f;
      if (p.out_scale) {
        float scale = __ldg(p.out_scale + n * p.out_step);
        s.scale[i] = scale;
        s.inverse[i] = __frcp_rn(scale);
      }
    }
    sync();
  }

  template <bool Codes>
  __device__ __forceinline__ Pair load(int column) const {
    auto pair = [&](const float* a) { return *reinterpret_cast<const float2*>(a + column); };
    Pair c{pair(s.w), pair(s.bias), {}, {}};
    if (Codes) c.scale = pair(s.scale), c.inverse = pair(s.inverse);
    return c;
  }
};

// What is added to 32 columns of one row. The residual may be y itself: what is loaded ahead is stored later. It and
// scales of x come through L2: L1 may hold what a buffer of activations had before.
__device__ __forceinline__ void load_residual(const Finish& p, int row, int first, float2 (&r)[kGroup]) {
  if (row >= p.M) return;
  long long start = static_cast<long long>(row) * p.O + first + 2 * (threadIdx.x & 3);
  if (p.residual_dtype == QUAMBA_F32) {
    auto from = reinterpret_cast<const float2*>(static_cast<const float*>(p.residual) + start);
#pragma unroll
    for (int j = 0; j < kGroup; ++j)
      if (first + kBlock * j < p.O) r[j] = __ldcg(from + kBlock / 2 * j);
  } else {
    auto from = reinterpret_cast<const unsigned*>(static_cast<const short*>(p.residual) + start);
    bool half = p.residual_dtype == QUAMBA_F16;
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      if (first + kBlock * j >= p.O) continue;
      unsigned both = __ldcg(from + kBlock / 2 * j);
      float2 halves = __half22float2(reinterpret_cast<__half2&>(both));
      r[j].x = half ? halves.x : __uint_as_float(both << 16);
      r[j].y = half ? halves.y : __uint_as_float(both & 0xffff0000u);
    }
  }
}

// Store 32 columns of one row; all lanes of a warp take part, whether their row exists or not. Y is QUAMBA_F16 for both
// 16-bit types. y is larger than what is read, which is read again: it leaves L2 first.
template <int Y>
__device__ __forceinline__ void store_group(const Finish& p, const Pair (&c)[kGroup], int row, int first,
                                            const float2 (&v)[kGroup]) {
  int lane = threadIdx.x & 3;
  long long start = static_cast<long long>(row) * p.O + first;
  bool exists = row < p.M, stores = exists && first + kBlock * lane < p.O;
  if constexpr (Y == QUAMBA_F32) {
#pragma unroll
    for (int j = 0; j < kGroup; ++j)
      if (exists && first + kBlock * j < p.O)
        __stcs(reinterpret_cast<float2*>(static_cast<float*>(p.y) + start + kBlock * j + 2 * lane), v[j]);
  } else if constexpr (Y == QUAMBA_I8) {
    unsigned codes[kGroup];
#pragma unroll
    for (int j = 0; j < kGroup; ++j)
      codes[j] = __byte_perm(to_code(v[j].x, c[j].scale.x, c[j].inverse.x),
                             to_code(v[j].y, c[j].scale.y, c[j].inverse.y), 0x0040);
    uint2 bytes = gather_bytes(__byte_perm(codes[0], codes[1], 0x5410), __byte_perm(codes[2], codes[3], 0x5410));
    if (stores) __stcs(reinterpret_cast<uint2*>(static_cast<signed char*>(p.y) + start + kBlock * lane), bytes);
  } else {
    unsigned words[kGroup];
#pragma unroll
    for (int j = 0; j < kGroup; ++j) words[j] = pack_pair(v[j].x, v[j].y, p.y_dtype == QUAMBA_F16);
    uint4 eight = gather_words(words);
    if (stores) __stcs(reinterpret_cast<uint4*>(static_cast<unsigned short*>(p.y) + start + kBlock * lane), eight);
  }
}

// Where what is added to a step, 32 columns of a row, comes from; kAhead steps are asked for before they are used.
struct NoResidual {
  static constexpr bool kAdds = false, kEvery = false;  // kEvery: steps beyond the last column are taken too
  static constexpr int kAhead = 0;
  __device__ __forceinline__ void operator()(int, int, int, float2 (&)[kGroup]) const {}
};

template <int Ahead>
struct GlobalResidual {
  static constexpr bool kAdds = true, kEvery = false;
  static constexpr int kAhead = Ahead;
  const Finish& p;
  __device__ __forceinline__ void operator()(int, int row, int first, float2 (&r)[kGroup]) const {
    load_residual(p, row, first, r);
  }
};

template <int Y, int Rows, int Blocks, class Columns, class Residual, class Value>
__device__ __forceinline__ void finish_typed(const Finish& p, const int (&row)[Rows], int first,
                                             const Columns& columns, Residual&& source, Value value) {
  using Source = std::remove_reference_t<Residual>;
  constexpr bool kScaled = Columns::kScaled;
  constexpr int kSteps = Blocks / kGroup * Rows, kAhead = Source::kAhead;  // (32 columns, row), rows first
  float x_scale[Rows];
#pragma unroll
  for (int r = 0; r < Rows; ++r) x_scale[r] = kScaled && row[r] < p.M ? __ldcg(p.x_scale + row[r] * p.x_step) : 1.f;
  float2 residual[kAhead + 1][kGroup] = {};
  auto fetch = [&](int step) {
    if (step < kSteps)
      source(step, row[step % Rows], first + kBlock * kGroup * (step / Rows), residual[step % (kAhead + 1)]);
  };
#pragma unroll
  for (int s = 0; s < kAhead; ++s) fetch(s);
  columns.ready();
#pragma unroll
  for (int b = 0; b < Blocks; b += kGroup) {
    int n = first + kBlock * b;
    if (!Source::kEvery && n >= p.O) break;
    Pair c[kGroup];
#pragma unroll
    for (int j = 0; j < kGroup; ++j)
      c[j] = columns.template load<Y == QUAMBA_I8>(kBlock * (b + j) + 2 * (threadIdx.x & 3));
#pragma unroll
    for (int r = 0; r < Rows; ++r) {
      int step = b / kGroup * Rows + r;
      fetch(step + kAhead);
      float2 v[kGroup];
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        v[j] = value(r, b + j);
        if (kScaled) v[j].x = __fmul_rn(__fmul_rn(v[j].x, x_scale[r]), c[j].w.x);
        if (kScaled) v[j].y = __fmul_rn(__fmul_rn(v[j].y, x_scale[r]), c[j].w.y);
        v[j] = make_float2(__fadd_rn(v[j].x, c[j].bias.x), __fadd_rn(v[j].y, c[j].bias.y));
        float2 more = residual[step % (kAhead + 1)][j];
        if (Source::kAdds) v[j] = make_float2(__fadd_rn(v[j].x, more.x), __fadd_rn(v[j].y, more.y));
      }
      store_group<Y>(p, c, row[r], n, v);
    }
  }
}

template <int Y, int Rows, int Blocks, class Columns, class Value>
__device__ __forceinline__ void finish_as(const Finish& p, const int (&row)[Rows], int first, const Columns& columns,
                                          Value value) {
  constexpr int kAhead = Rows * Blocks <= 64 && Rows < 8 ? 2 : 1;
  if (p.residual)
    finish_typed<Y, Rows, Blocks>(p, row, first, columns, GlobalResidual<kAhead>{p}, value);
  else
    finish_typed<Y, Rows, Blocks>(p, row, first, columns, NoResidual{}, value);
}

// Finish what one warp holds of a tile: Rows rows a lane, Blocks blocks of eight columns from ``first`` on, where
// ``columns`` begin. value(r, b) returns the two accumulators of row r and block b as a float2.
template <int Rows, int Blocks, class Columns, class Value>
__device__ __forceinline__ void finish_columns(const Finish& p, const int (&row)[Rows], int first,
                                               const Columns& columns, Value value) {
  static_assert(Blocks % kGroup == 0, "a tile is a multiple of 32 columns");
  if (p.y_dtype == QUAMBA_F32)
    finish_as<QUAMBA_F32, Rows, Blocks>(p, row, first, columns, value);
  else if (p.y_dtype == QUAMBA_I8)
    finish_as<QUAMBA_I8, Rows, Blocks>(p, row, first, columns, value);
  else
    finish_as<QUAMBA_F16, Rows, Blocks>(p, row, first, columns, value);
}

// The same with columns from global memory; Scaled: x_scale and w_scale multiply the accumulators.
template <int Rows, int Blocks, bool Scaled = true, class Value>
__device__ __forceinline__ void finish_tile(const Finish& p, const int (&row)[Rows], int first, Value value) {
  finish_columns<Rows, Blocks>(p, row, first, GlobalColumns<Scaled>{p, first}, value);
}

}  // namespace quamba
