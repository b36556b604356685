// Products of one token with the weights in a ring (stack_ring.cuh), by mma.sync: seven of eight columns are the same token
// again, but instructions are what counts, and most of them unpack.
//
// Where x lies in shared memory: int8 for int8 weights in the order of K; for int4 ones eight elements are a word of the even
// and a word of the odd ones, as the nibbles come apart; floats as skinny::multiply takes them, pieces 8 places apart.
#pragma once

#include "linear_skinny_epilogue.cuh"
#include "linear_skinny_products.cuh"
#include "stack_ring.cuh"

namespace quamba::stack {

using skinny::Kind;
using skinny::kInteger;

template <Kind KIND>
constexpr int kStepX = KIND == Kind::kW8A8 ? 64 : KIND == Kind::kW4A8 ? 128 : 512;  // bytes of x in a step

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
  const char *w, *x, *scales;
  int row_bytes, scale_bytes;  // to its other row
};

// 16 times the int4 codes of a word's high nibbles.
__device__ __forceinline__ uint32_t codes_of(uint32_t word) {
  uint32_t codes;  // (word & mask) ^ sign: one instruction where the constants lie in registers
  asm("lop3.b32 %0, %1, %2, %3, 0x6a;" : "=r"(codes) : "r"(word), "r"(0xf0f0f0f0u), "r"(0x80808080u));
  return codes;
}

// Sums of the lane's two rows over one step.
__device__ __forceinline__ void multiply_step(int (&acc)[2], const Lane& l, int s, std::integral_constant<Kind, Kind::kW8A8>) {
  const uint4 a = *reinterpret_cast<const uint4*>(l.w + s * kStep);
  const uint4 b = *reinterpret_cast<const uint4*>(l.w + s * kStep + l.row_bytes);
  const uint4 x = *reinterpret_cast<const uint4*>(l.x + s * kStepX<Kind::kW8A8>);
  int d[4] = {acc[0], 0, acc[1], 0};
  mma_s8(d, a.x, b.x, a.y, b.y, x.x, x.y);
  mma_s8(d, a.z, b.z, a.w, b.w, x.z, x.w);
  acc[0] = d[0], acc[1] = d[2];
}

__device__ __forceinline__ void multiply_step(int (&acc)[2], const Lane& l, int s, std::integral_constant<Kind, Kind::kW4A8>) {
  const uint4 a = *reinterpret_cast<const uint4*>(l.w + s * kStep);
  const uint4 b = *reinterpret_cast<const uint4*>(l.w + s * kStep + l.row_bytes);
  const uint4* const x = reinterpret_cast<const uint4*>(l.x + s * kStepX<Kind::kW4A8>);
  const uint4 first = x[0], second = x[1];
  const int m[2] = {static_cast<uint8_t>(l.scales[s]), static_cast<uint8_t>(l.scales[s + l.scale_bytes])};
  int d[2][4] = {};
  mma_s8(d[0], codes_of(a.x << 4), codes_of(b.x << 4), codes_of(a.x), codes_of(b.x), first.x, first.y);
  mma_s8(d[1], codes_of(a.y << 4), codes_of(b.y << 4), codes_of(a.y), codes_of(b.y), first.z, first.w);
  mma_s8(d[0], codes_of(a.z << 4), codes_of(b.z << 4), codes_of(a.z), codes_of(b.z), second.x, second.y);
  mma_s8(d[1], codes_of(a.w << 4), codes_of(b.w << 4), codes_of(a.w), codes_of(b.w), second.z, second.w);
  acc[0] += ((d[0][0] + d[1][0]) >> 4) * m[0], acc[1] += ((d[0][2] + d[1][2]) >> 4) * m[1];
}

template <Kind KIND>
__device__ __forceinline__ void multiply_step(float (&acc)[2], const Lane& l, int s, std::integral_constant<Kind, KIND>) {
  skinny::Step<1> step;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    step.w[0][h] = *reinterpret_cast<const uint4*>(l.w + s * kStep + h * l.row_bytes);
    step.scale[0][h] = reinterpret_cast<const uint16_t*>(l.scales + h * l.scale_bytes)[s];
  }
  float d[1][1][4] = {acc[0], 0.f, acc[1], 0.f};
  skinny::multiply<KIND, false, 1, 1>(d, step, reinterpret_cast<const uint4*>(l.x + s * kStepX<KIND>), threadIdx.x % 4, 8);
  acc[0] = d[0][0][0], acc[1] = d[0][0][2];
}

template <Kind KIND, int STEPS, typename Acc>
__device__ __forceinline__ void multiply_steps(Acc (&acc)[2], const Lane& l, int s) {
#pragma unroll
  for (int i = 0; i < STEPS; ++i) multiply_step(acc, l, s + i, std::integral_constant<Kind, KIND>{});
}

// Sums of a strip's rows over the steps of a part, written by one lane in four: of row lane / 4 and the eighth below.
template <Kind KIND>
__device__ __forceinline__ void multiply_part(const Lane& l, int steps, uint32_t* sums, int lane) {
  std::conditional_t<kInteger<KIND>, int, float> acc[2] = {};
  constexpr int kMost = kInteger<KIND> ? 5 : 1;
  int s = 0;
#pragma unroll 1
  for (; s + kMost <= steps; s += kMost) multiply_steps<KIND, kMost>(acc, l, s);
#pragma unroll 1
  for (; s < steps; ++s) multiply_steps<KIND, 1>(acc, l, s);
  if (lane % 4 == 0) sums[lane / 4] = skinny::bits_of(acc[0]), sums[lane / 4 + 8] = skinny::bits_of(acc[1]);
}

// What the block has of a matrix, from `stage` on, which moves behind it: sums of parts in `sums`, [strip][part][row], where row
// g of a strip is the g / (stages of a strip)th of its stage g % (stages of a strip). The sync of the team that has to follow is
// the caller's.
template <Kind KIND>
__device__ __forceinline__ void products(const Ring& ring, const Matrix& m, const Share& share, Stage& stage,
                                         const char* x, uint32_t* sums) {
  constexpr int kScale = KIND == Kind::kW4A8 ? 1 : 2;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, part = warp & (m.parts - 1);
  const int stages = share.rows / m.stage_rows, stride = kWarps / m.parts;
  const int begin = m.steps * part / m.parts, steps = m.steps * (part + 1) / m.parts - begin;
  const int own = lane / 4 & (m.strip_stages - 1), below = lane / 4 / m.strip_stages, half = m.stage_rows / 2;
  const char* const w = ring.stages + below * m.row_bytes + lane % 4 * 16 + begin * kStep;
  const char* const scales = ring.stages + m.stage_rows * m.row_bytes + below * m.scale_bytes + begin * kScale;
  const char* const own_x = x + begin * kStepX<KIND> + (kInteger<KIND> ? lane % 4 * (kStepX<KIND> / 4) : 0);
#pragma unroll 1
  for (int strip = warp / m.parts; strip * m.strip_stages < stages; strip += stride) {
    // the last strip may have half of its stages: the other lanes read what there is, for nothing
    const int first = strip * m.strip_stages, there = min(m.strip_stages, stages - first);
    Stage mine = stage;
    mine.advance(ring, first + (own & (there - 1)));
    const int slot = mine.slot * ring.bytes;
    const Lane l{w + slot, own_x, scales + slot, half * m.row_bytes, half * m.scale_bytes};
    wait(ring.full + 8 * mine.slot, mine.parity);
    __syncwarp();
    multiply_part<KIND>(l, steps, sums + (strip * m.parts + part) * kStrip, lane);
    __syncwarp();
    if (lane % 4 == 0 && lane / 4 < there) arrive(ring.empty + 8 * mine.slot, kShares / m.parts);
  }
  stage.advance(ring, stages);
}

// The sum of row r of the block's share.
template <Kind KIND>
__device__ __forceinline__ float sum_of(const Matrix& m, const uint32_t* sums, int r) {
  using Acc = std::conditional_t<kInteger<KIND>, int, float>;
  const int in_strip = r % kStrip, stage = in_strip / m.stage_rows, g = in_strip % m.stage_rows * m.strip_stages + stage;
  const Acc* const from = reinterpret_cast<const Acc*>(sums) + r / kStrip * m.parts * kStrip + g;
  Acc total = from[0];
#pragma unroll 4
  for (int i = 1; i < m.parts; ++i) total += from[i * kStrip];
  return static_cast<float>(total);
}

}  // namespace quamba::stack
