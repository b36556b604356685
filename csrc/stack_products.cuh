// Products of one token with the weights in a ring (stack_ring.cuh), by mma.sync: seven of eight columns are the same token
// again, but instructions are what counts, and most of them unpack.
//
// int4 weights, stored with +8, are taken as they come apart with the fewest of them: q + 8 or 16 q. What is too much of the
// first is the same for all rows, so a group's sum begins with its negative, which lies behind the group's x.
//
// Floats become multiples of 2^-22 of the token's largest, in three digits of eight bits, each a token of its own to the
// product, in columns that would be the same token again. So they take the instructions of int8.
//
// Where x lies in shared memory: int8 for int8 weights in the order of K; for int4 ones eight elements are a word of the even
// and a word of the odd ones, as the nibbles come apart; of floats, whose weights are in an order of their own
// (operand_w4.cuh), a word of the low and one of the high nibbles' elements, the upper digits before the lower ones in each half
// of a lane's.
#pragma once

#include "linear_skinny_epilogue.cuh"
#include "linear_skinny_products.cuh"
#include "stack_ring.cuh"

namespace quamba::stack {

using skinny::Kind;
using skinny::kInteger;

// Bytes of x in a step, and of what its sum begins with (four times).
template <Kind KIND>
constexpr int kStepX = KIND == Kind::kW8A8 ? 64 : KIND == Kind::kW4A8 ? 128 + 16 : 3 * 128;

template <Kind KIND>
constexpr int kLaneX = KIND == Kind::kW4A8 ? 32 : 16;  // of it, a lane's from its neighbour's

constexpr int kTooMuch = 8;  // of q + 8

constexpr int kDigits = 3, kDigitBytes = 64;  // of floats; of a digit of half of a step
constexpr float kMostDigits = 4194303.f;      // the largest of a token in digits

constexpr int kWarps = 16, kTeam = 32 * kWarps;

// The warps that are not busy with copies; where element i of a row that they rotate lies.
struct Team {
  static __device__ __forceinline__ int threads() { return kTeam; }
  static __device__ __forceinline__ void sync() { sync_threads(1, kTeam); }
  // four floats after every 32: quads stay whole, and no two lanes meet in a bank when a pass takes every fourth element
  static __host__ __device__ __forceinline__ constexpr int place(int i) { return i + (i >> 5 << 2); }
};

// What a lane has of a strip: its bytes of the part's first step, of its first row.
struct Lane {
  const char *w, *x, *begin, *scales;
  int row_bytes, scale_bytes;  // to its other row
  int upper;                   // what its first column counts of its second one: 256, or 0 where that is no digit
};

// (word & mask) ^ more: one instruction where the constants lie in registers.
template <uint32_t MASK, uint32_t MORE>
__device__ __forceinline__ uint32_t part_of(uint32_t word) {
  uint32_t part;
  asm("lop3.b32 %0, %1, %2, %3, 0x6a;" : "=r"(part) : "r"(word), "r"(MASK), "r"(MORE));
  return part;
}

__device__ __forceinline__ uint32_t low_codes(uint32_t word) { return word & 0x0f0f0f0fu; }                       // q + 8
__device__ __forceinline__ uint32_t high_codes(uint32_t word) { return part_of<0xf0f0f0f0u, 0x80808080u>(word); }  // 16 q

__device__ __forceinline__ uint32_t raised_codes(uint32_t word) { return high_codes(word << 4); }  // 16 q of the low ones

// Sums of the lane's two rows, 8 apart, as the products leave them: in elements 0 and 2. Products take turns in two of them
// where one would wait for the one before.
template <Kind KIND>
using Sums = std::conditional_t<kInteger<KIND>, int, float>[KIND == Kind::kW8A8 ? 2 : 1][4];

__device__ __forceinline__ void multiply_step(Sums<Kind::kW8A8>& acc, const Lane& l, int s,
                                              std::integral_constant<Kind, Kind::kW8A8>) {
  const uint4 a = *reinterpret_cast<const uint4*>(l.w + s * kStep);
  const uint4 b = *reinterpret_cast<const uint4*>(l.w + s * kStep + l.row_bytes);
  const uint4 x = *reinterpret_cast<const uint4*>(l.x + s * kStepX<Kind::kW8A8>);
  mma_s8(acc[0], a.x, b.x, a.y, b.y, x.x, x.y);
  mma_s8(acc[1], a.z, b.z, a.w, b.w, x.z, x.w);
}

// acc in sixteenths: no more than 127 * 127 * K, which is 2^31 / 16.2 for the largest K.
__device__ __forceinline__ void multiply_step(Sums<Kind::kW4A8>& acc, const Lane& l, int s,
                                              std::integral_constant<Kind, Kind::kW4A8>) {
  const uint4 a = *reinterpret_cast<const uint4*>(l.w + s * kStep);
  const uint4 b = *reinterpret_cast<const uint4*>(l.w + s * kStep + l.row_bytes);
  const uint4* const x = reinterpret_cast<const uint4*>(l.x + s * kStepX<Kind::kW4A8>);
  const uint4 first = x[0], second = x[1], begin = *reinterpret_cast<const uint4*>(l.begin + s * kStepX<Kind::kW4A8>);
  const int m[2] = {static_cast<uint8_t>(l.scales[s]), static_cast<uint8_t>(l.scales[s + l.scale_bytes])};
  int low[4] = {static_cast<int>(begin.x), static_cast<int>(begin.y), static_cast<int>(begin.z), static_cast<int>(begin.w)};
  int high[4] = {};
  mma_s8(low, low_codes(a.x), low_codes(b.x), low_codes(a.y), low_codes(b.y), first.x, first.y);
  mma_s8(high, high_codes(a.x), high_codes(b.x), high_codes(a.y), high_codes(b.y), first.z, first.w);
  mma_s8(low, low_codes(a.z), low_codes(b.z), low_codes(a.w), low_codes(b.w), second.x, second.y);
  mma_s8(high, high_codes(a.z), high_codes(b.z), high_codes(a.w), high_codes(b.w), second.z, second.w);
  acc[0][0] += (low[0] * 16 + high[0]) * m[0], acc[0][2] += (low[2] * 16 + high[2]) * m[1];
}

// Columns of the two upper digits belong to one lane in four, the lowest digit to the next one's second column.
template <Kind KIND>
__device__ __forceinline__ void multiply_step(Sums<KIND>& acc, const Lane& l, int s, std::integral_constant<Kind, KIND>) {
  const uint4 a = *reinterpret_cast<const uint4*>(l.w + s * kStep);
  const uint4 b = *reinterpret_cast<const uint4*>(l.w + s * kStep + l.row_bytes);
  const uint16_t scale[2] = {reinterpret_cast<const uint16_t*>(l.scales)[s],
                             reinterpret_cast<const uint16_t*>(l.scales + l.scale_bytes)[s]};
  const uint4 first = *reinterpret_cast<const uint4*>(l.x + s * kStepX<KIND>);
  const uint4 second = *reinterpret_cast<const uint4*>(l.x + s * kStepX<KIND> + kDigits * kDigitBytes);
  int low[4] = {}, high[4] = {};
  mma_s8(low, raised_codes(a.x), raised_codes(b.x), raised_codes(a.y), raised_codes(b.y), first.x, first.y);
  mma_s8(high, high_codes(a.x), high_codes(b.x), high_codes(a.y), high_codes(b.y), first.z, first.w);
  mma_s8(low, raised_codes(a.z), raised_codes(b.z), raised_codes(a.w), raised_codes(b.w), second.x, second.y);
  mma_s8(high, high_codes(a.z), high_codes(b.z), high_codes(a.w), high_codes(b.w), second.z, second.w);
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const int sum = (low[i] + high[i]) * l.upper + (low[i + 1] + high[i + 1]);
    acc[0][i] = fmaf(static_cast<float>(sum), skinny::float_of_half(scale[i / 2]), acc[0][i]);
  }
}

template <Kind KIND, int STEPS>
__device__ __forceinline__ void multiply_steps(Sums<KIND>& acc, const Lane& l, int s) {
#pragma unroll
  for (int i = 0; i < STEPS; ++i) multiply_step(acc, l, s + i, std::integral_constant<Kind, KIND>{});
}

// Sums of a strip's rows over the steps of a part, written by one lane in four: of row lane / 4 and the eighth below.
template <Kind KIND>
__device__ __forceinline__ void multiply_part(const Lane& l, int steps, uint32_t* sums, int lane) {
  Sums<KIND> acc = {};
  constexpr int kMost = 5;
  int s = 0;
#pragma unroll 1
  for (; s + kMost <= steps; s += kMost) multiply_steps<KIND, kMost>(acc, l, s);
#pragma unroll 1
  for (; s < steps; ++s) multiply_steps<KIND, 1>(acc, l, s);
  if constexpr (KIND == Kind::kW8A8) acc[0][0] += acc[1][0], acc[0][2] += acc[1][2];
  if constexpr (!kInteger<KIND>)
#pragma unroll
    for (int i = 0; i < 4; i += 2) acc[0][i] = fmaf(acc[0][i], 256.f, __shfl_down_sync(~0u, acc[0][i], 1));
  if (lane % 4 == 0) sums[lane / 4] = skinny::bits_of(acc[0][0]), sums[lane / 4 + 8] = skinny::bits_of(acc[0][2]);
}

// What the block has of a matrix, from `stage` on, which moves behind it: sums of parts in `sums`, [strip][part][row], where row
// g of a strip is the g / (stages of a strip)th of its stage g % (stages of a strip). The sync of the team that has to follow is
// the caller's.
template <Kind KIND>
__device__ __forceinline__ void products(const Ring& ring, const Matrix& m, const Share& share, Stage& stage,
                                         const char* x, uint32_t* sums) {
  constexpr int kScale = KIND == Kind::kW4A8 ? 1 : 2;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, part = warp & (m.parts() - 1);
  const int stages = share.rows >> m.stage_rows_log, stride = kWarps >> m.parts_log;
  const int begin = m.steps * part >> m.parts_log, steps = (m.steps * (part + 1) >> m.parts_log) - begin;
  const int own = lane / 4 & (m.strip_stages() - 1), below = lane / 4 >> m.strip_stages_log, half = m.stage_rows() / 2;
  const char* const w = ring.stages + below * m.row_bytes + lane % 4 * 16 + begin * kStep;
  const char* const scales = ring.stages + (m.row_bytes << m.stage_rows_log) + below * m.scale_bytes + begin * kScale;
  const int digit = kInteger<KIND> ? 0 : min(lane / 4, kDigits - 1);
  const char* const own_x = x + begin * kStepX<KIND> + lane % 4 * kLaneX<KIND> + digit * kDigitBytes;
  const char* const beginning = x + (begin + 1) * kStepX<KIND> - 16;
#pragma unroll 1
  for (int strip = warp >> m.parts_log; strip << m.strip_stages_log < stages; strip += stride) {
    // the last strip may have half of its stages: the other lanes read what there is, for nothing
    const int first = strip << m.strip_stages_log, there = min(m.strip_stages(), stages - first);
    Stage mine = stage;
    mine.advance(ring, first + (own & (there - 1)));
    const int slot = mine.slot * ring.bytes;
    const Lane l{w + slot, own_x, beginning, scales + slot, half * m.row_bytes, half * m.scale_bytes,
                 lane % 4 ? 0 : 256};
    wait(ring.full + 8 * mine.slot, mine.parity);
    __syncwarp();
    multiply_part<KIND>(l, steps, sums + ((strip << m.parts_log) + part) * kStrip, lane);
    __syncwarp();
    if (lane % 4 == 0 && lane / 4 < there) arrive(ring.empty + 8 * mine.slot, kShares >> m.parts_log);
  }
  stage.advance(ring, stages);
}

// The sum of row r of the block's share.
template <Kind KIND>
__device__ __forceinline__ float sum_of(const Matrix& m, const uint32_t* sums, int r) {
  using Acc = std::conditional_t<kInteger<KIND>, int, float>;
  const int in_strip = r % kStrip, stage = in_strip >> m.stage_rows_log;
  const int g = ((in_strip & (m.stage_rows() - 1)) << m.strip_stages_log) + stage;
  const Acc* const from = reinterpret_cast<const Acc*>(sums) + (r / kStrip << m.parts_log) * kStrip + g;
  Acc total = from[0];
#pragma unroll 4
  for (int i = 1; i < m.parts(); ++i) total += from[i * kStrip];
  if constexpr (KIND == Kind::kW8A8) return static_cast<float>(total);
  return KIND == Kind::kW4A8 ? static_cast<float>(total / 16) : total * 0.0625f;
}

}  // namespace quamba::stack
