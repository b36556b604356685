// Operands of the SSD scan in shared memory, and the products that read them.
//
// An operand is rows (tokens) of fp16 in panels of 64 columns: 128 bytes a row, whose eight pieces of 16 bytes are
// permuted by the row's place among eight. That is what wgmma calls a 128 byte swizzle, and ldmatrix reads it without
// bank conflicts, along the rows or across them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "quads.cuh"

namespace quamba::ssd {

constexpr int kPitch = 128;  // bytes of a panel's row
constexpr int kBits = 7;     // |operand| < 2^7, as that of a code
constexpr int kLeastInput = -15;  // the exponent below which inputs are not scaled up: its power is an fp16 too

// Bytes from an operand's start to a column (a multiple of 8, or a pair within a piece) of a row.
template <int Rows>
__device__ __forceinline__ int place(int row, int column) {
  return (column / 64) * (Rows * kPitch) + row * kPitch + (((column % 64) / 8) ^ (row & 7)) * 16 + (column % 8) * 2;
}

__device__ __forceinline__ void load_matrices_across(uint32_t (&v)[4], uint32_t at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
               : "r"(at)
               : "memory");
}

// Bytes to the first or second 8 of a block of 16 columns, of a row.
template <int Rows>
__device__ __forceinline__ int place_in(int row, int block, int half) {
  return (block / 4) * (Rows * kPitch) + row * kPitch + (((half ^ (row & 7)) << 4) ^ (block % 4 << 5));
}

// A block of 16 rows and one of 16 columns as the left operand of a product along the columns.
template <int Rows>
__device__ __forceinline__ void left_along(uint32_t (&v)[4], uint32_t operand, int row, int block) {
  const int lane = threadIdx.x % 32;
  load_matrices(v, operand + place_in<Rows>(row + (lane & 15), block, lane >> 4));
}

// The same with rows and columns exchanged: element (i, j) of the left operand is row + j, column i of the block.
template <int Rows>
__device__ __forceinline__ void left_across(uint32_t (&v)[4], uint32_t operand, int row, int block) {
  const int lane = threadIdx.x % 32;
  load_matrices_across(v, operand + place_in<Rows>(row + (lane & 7) + (lane >> 4) * 8, block, (lane >> 3) & 1));
}

// Two right operands of 16 x 8, for a product along the columns: v[0..1] of 8 rows, v[2..3] of the next 8.
template <int Rows>
__device__ __forceinline__ void right_along(uint32_t (&v)[4], uint32_t operand, int row, int block) {
  const int lane = threadIdx.x % 32;
  load_matrices(v, operand + place_in<Rows>(row + (lane & 7) + (lane >> 4) * 8, block, (lane >> 3) & 1));
}

// The same for a product along the rows: v[0..1] of 8 columns, v[2..3] of the next 8.
template <int Rows>
__device__ __forceinline__ void right_across(uint32_t (&v)[4], uint32_t operand, int row, int block) {
  const int lane = threadIdx.x % 32;
  load_matrices_across(v, operand + place_in<Rows>(row + (lane & 15), block, lane >> 4));
}

// d [16 x 8], four sums a lane, += a left operand times a right one.
__device__ __forceinline__ void multiply(float* d, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  mma_f16(*reinterpret_cast<float(*)[4]>(d), a[0], a[1], a[2], a[3], b0, b1);
}

// An 8 x 8 matrix of 16 bits, a row over four lanes, turned.
__device__ __forceinline__ uint32_t turned(uint32_t v) {
  uint32_t d;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(v));
  return d;
}

__device__ __forceinline__ uint32_t pack_f16(float low, float high) {
  uint32_t d;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}

__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  uint32_t d;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}

__device__ __forceinline__ uint32_t times_f16(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}

__device__ __forceinline__ float2 unpack_f16(uint32_t v) { return __half22float2(reinterpret_cast<__half2&>(v)); }

// Four int8 codes as four fp16: as the last places of 1024, from which 1152 is taken.
__device__ __forceinline__ uint2 codes_to_halves(uint32_t word) {
  word ^= 0x80808080u;
  constexpr uint32_t kBias = 0x64806480u;
  return make_uint2(sub_f16x2(__byte_perm(word, 0x64646464u, 0x4140), kBias),
                    sub_f16x2(__byte_perm(word, 0x64646464u, 0x4342), kBias));
}

__device__ __forceinline__ uint32_t brains_to_halves(uint32_t word, float factor) {
  return pack_f16(__uint_as_float(word << 16) * factor, __uint_as_float(word & 0xffff0000u) * factor);
}

__device__ __forceinline__ float log2_approximate(float v) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(v));
  return y;
}

// e where |v| lies in 2^e .. 2^(e + 1), not below `least`.
__device__ __forceinline__ int exponent_of(float v, int least) {
  return max(((__float_as_int(v) >> 23) & 255) - 127, least);
}

// 2^e, infinite for what is too large.
__device__ __forceinline__ float power_of_two(int e) { return __int_as_float((min(e, 128) + 127) << 23); }

// The exponent of the power of two by which inputs, of which this is the largest, become operands.
__device__ __forceinline__ int scale_of(float largest) {
  return max(exponent_of(largest, -127) + 1 - kBits, kLeastInput);
}

// The largest |element| of a piece of fp16 or bf16.
__device__ __forceinline__ float largest_of(const uint4& v, int type) {
  // of 15 bits without a sign the largest is the same whether they stand for fp16, bf16 or integers
  const uint32_t two = __vmaxu2(__vmaxu2(v.x & 0x7fff7fffu, v.y & 0x7fff7fffu),
                                __vmaxu2(v.z & 0x7fff7fffu, v.w & 0x7fff7fffu));
  const float2 floats = halves_to_floats(two, type == QUAMBA_F16);
  return fmaxf(floats.x, floats.y);
}

// A piece of fp16 or bf16 as fp16, times a power of two.
__device__ __forceinline__ uint4 scaled_halves(const uint4& v, int type, float factor) {
  if (type == QUAMBA_BF16)
    return make_uint4(brains_to_halves(v.x, factor), brains_to_halves(v.y, factor), brains_to_halves(v.z, factor),
                      brains_to_halves(v.w, factor));
  const uint32_t both = pack_f16(factor, factor);
  return make_uint4(times_f16(v.x, both), times_f16(v.y, both), times_f16(v.z, both), times_f16(v.w, both));
}

// 16 codes of a row into an operand.
template <int Rows>
__device__ __forceinline__ void store_codes(unsigned char* operand, int row, int piece, const uint4& v) {
  const uint2 one = codes_to_halves(v.x), two = codes_to_halves(v.y);
  const uint2 three = codes_to_halves(v.z), four = codes_to_halves(v.w);
  const uint4 low = make_uint4(one.x, one.y, two.x, two.y), high = make_uint4(three.x, three.y, four.x, four.y);
  const bool turn = piece & 4;  // so that pieces four apart do not meet in a bank
  *reinterpret_cast<uint4*>(operand + place_in<Rows>(row, piece, turn)) = turn ? high : low;
  *reinterpret_cast<uint4*>(operand + place_in<Rows>(row, piece, !turn)) = turn ? low : high;
}

}  // namespace quamba::ssd
