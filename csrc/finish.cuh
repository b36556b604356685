// The epilogue of the tiled linears: y = float(acc) * x_scale * w_scale + bias + residual, then a cast or static int8,
// as ops/linear.finish and ops/rowwise.to_int8 define it. Every product and sum is rounded on its own (no fma).
//
// Tensor cores leave a tile in registers so that lane 4 g + q of a warp holds columns 2 q, 2 q + 1 of each block of
// eight, in rows g and g + 8. fp32 results and residuals are thus whole 32-byte sectors as they lie; 16-bit and int8
// results are passed around within the four lanes of a row first, so that a lane stores eight neighbours at once.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

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

// Two neighbouring elements at an even index. Constant: nothing writes them meanwhile, so the load may move.
template <bool Constant>
__device__ __forceinline__ float2 load_pair(const void* data, int type, long long at) {
  auto load = [](auto* p) { return Constant ? __ldg(p) : *p; };
  if (type == QUAMBA_F32) return load(reinterpret_cast<const float2*>(static_cast<const float*>(data) + at));
  if (type == QUAMBA_F16)
    return __half22float2(load(reinterpret_cast<const __half2*>(static_cast<const __half*>(data) + at)));
  return __bfloat1622float2(
      load(reinterpret_cast<const __nv_bfloat162*>(static_cast<const __nv_bfloat16*>(data) + at)));
}

__device__ __forceinline__ unsigned pack_pair(float low, float high, bool half) {
  if (half) {
    __half2 pair = __floats2half2_rn(low, high);
    return reinterpret_cast<unsigned&>(pair);
  }
  __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<unsigned&>(pair);
}

// rint(y / scale) in [-127, 127]: from the rounded inverse, one Newton step makes the quotient correctly rounded
// (Markstein), where it is small enough to matter.
__device__ __forceinline__ int to_code(float y, float scale) {
  float inverse = __frcp_rn(scale), quotient = __fmul_rn(y, inverse);
  float exact = __fmaf_rn(__fmaf_rn(-quotient, scale, y), inverse, quotient);
  quotient = fabsf(quotient) < 1024.f ? exact : quotient;
  return __float2int_rn(fminf(fmaxf(quotient, -127.f), 127.f));
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

// Per-column parameters of 32 columns, as one lane needs them.
struct Columns {
  float2 w[kGroup], bias[kGroup];
};

template <bool Scaled>
__device__ __forceinline__ Columns load_columns(const Finish& p, int first) {
  Columns c;
#pragma unroll
  for (int j = 0; j < kGroup; ++j) {
    int n = first + kBlock * j + 2 * (threadIdx.x & 3);
    bool inside = n < p.O;
    if (Scaled) c.w[j] = inside ? load_pair<true>(p.w_scale, QUAMBA_F32, n) : make_float2(0.f, 0.f);
    c.bias[j] = inside && p.bias ? load_pair<true>(p.bias, p.bias_dtype, n) : make_float2(0.f, 0.f);
  }
  return c;
}

// What is added to 32 columns of one row. The residual may be y itself: what is loaded ahead is stored later.
__device__ __forceinline__ void load_residual(const Finish& p, int row, int first, float2 (&r)[kGroup]) {
  if (!p.residual || row >= p.M) return;
  long long start = static_cast<long long>(row) * p.O + first + 2 * (threadIdx.x & 3);
#pragma unroll
  for (int j = 0; j < kGroup; ++j)
    if (first + kBlock * j < p.O) r[j] = load_pair<false>(p.residual, p.residual_dtype, start + kBlock * j);
}

// Finish 32 columns of one row; all lanes of a warp take part, whether their row exists or not.
template <bool Scaled>
__device__ __forceinline__ void finish_group(const Finish& p, const Columns& c, int row, int first, float x_scale,
                                             float2 (&v)[kGroup], const float2 (&residual)[kGroup]) {
  int lane = threadIdx.x & 3;
  long long start = static_cast<long long>(row) * p.O + first;
  bool exists = row < p.M;
#pragma unroll
  for (int j = 0; j < kGroup; ++j) {
    if (Scaled) v[j].x = __fmul_rn(__fmul_rn(v[j].x, x_scale), c.w[j].x);
    if (Scaled) v[j].y = __fmul_rn(__fmul_rn(v[j].y, x_scale), c.w[j].y);
    v[j] = make_float2(__fadd_rn(v[j].x, c.bias[j].x), __fadd_rn(v[j].y, c.bias[j].y));
  }
  if (p.residual) {
#pragma unroll
    for (int j = 0; j < kGroup; ++j)
      v[j] = make_float2(__fadd_rn(v[j].x, residual[j].x), __fadd_rn(v[j].y, residual[j].y));
  }
  bool stores = exists && first + kBlock * lane < p.O;
  if (p.y_dtype == QUAMBA_F32) {
#pragma unroll
    for (int j = 0; j < kGroup; ++j)
      if (exists && first + kBlock * j < p.O)
        *reinterpret_cast<float2*>(static_cast<float*>(p.y) + start + kBlock * j + 2 * lane) = v[j];
  } else if (p.y_dtype == QUAMBA_I8) {
    unsigned codes[kGroup];
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      float2 scale = make_float2(1.f, 1.f);
      if (first + kBlock * j < p.O)
        scale = p.out_step ? load_pair<true>(p.out_scale, QUAMBA_F32, first + kBlock * j + 2 * lane)
                           : make_float2(__ldg(p.out_scale), __ldg(p.out_scale));
      codes[j] = (to_code(v[j].x, scale.x) & 0xff) | (to_code(v[j].y, scale.y) & 0xff) << 8;
    }
    uint2 bytes = gather_bytes(codes[0] | codes[1] << 16, codes[2] | codes[3] << 16);
    if (stores) *reinterpret_cast<uint2*>(static_cast<signed char*>(p.y) + start + kBlock * lane) = bytes;
  } else {
    unsigned words[kGroup];
#pragma unroll
    for (int j = 0; j < kGroup; ++j) words[j] = pack_pair(v[j].x, v[j].y, p.y_dtype == QUAMBA_F16);
    uint4 eight = gather_words(words);
    if (stores) *reinterpret_cast<uint4*>(static_cast<unsigned short*>(p.y) + start + kBlock * lane) = eight;
  }
}

// Finish what one warp holds of a tile: Rows rows a lane, Blocks blocks of eight columns from ``first`` on, loading
// ahead of what is finished. value(r, b) returns the two accumulators of row r and block b as a float2; Scaled: x_scale
// and w_scale multiply them.
template <int Rows, int Blocks, bool Scaled = true, class Value>
__device__ __forceinline__ void finish_tile(const Finish& p, const int (&row)[Rows], int first, Value value) {
  static_assert(Blocks % kGroup == 0, "a tile is a multiple of 32 columns");
  float x_scale[Rows];
#pragma unroll
  for (int r = 0; r < Rows; ++r) x_scale[r] = Scaled && row[r] < p.M ? __ldg(p.x_scale + row[r] * p.x_step) : 1.f;
  constexpr bool kAhead = Rows < 4;  // with more rows registers are short, and columns are loaded less often
  Columns now = load_columns<Scaled>(p, first);
  float2 residual[kGroup] = {};
  load_residual(p, row[0], first, residual);
#pragma unroll
  for (int b = 0; b < Blocks; b += kGroup) {
    int n = first + kBlock * b;
    if (n >= p.O) break;
    Columns next = now;
    if (kAhead && b + kGroup < Blocks) next = load_columns<Scaled>(p, n + kBlock * kGroup);
#pragma unroll
    for (int r = 0; r < Rows; ++r) {
      float2 v[kGroup], ahead[kGroup] = {};
      if (r + 1 < Rows)
        load_residual(p, row[(r + 1) % Rows], n, ahead);
      else if (b + kGroup < Blocks)
        load_residual(p, row[0], n + kBlock * kGroup, ahead);
#pragma unroll
      for (int j = 0; j < kGroup; ++j) v[j] = value(r, b + j);
      finish_group<Scaled>(p, now, row[r], n, x_scale[r], v, residual);
#pragma unroll
      for (int j = 0; j < kGroup; ++j) residual[j] = ahead[j];
    }
    now = next;
    if (!kAhead && b + kGroup < Blocks) now = load_columns<Scaled>(p, n + kBlock * kGroup);
  }
}

}  // namespace quamba
