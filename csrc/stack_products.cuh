// Products of one token with the weights in a ring (stack_ring.cuh).
//
// Integers: a lane takes 16 bytes of one of eight rows in a step and multiplies them by dp4a, since a tensor core would spend
// seven of eight columns on nothing and int4 weights have to be unpacked for it as well. Floats: strips of 16 rows and
// mma.sync, whose sums are fp32.
//
// Where x lies in shared memory: int8 for int8 weights in the order of K; for int4 ones eight elements are a word of the even
// and a word of the odd ones, as the nibbles come apart; floats as skinny::multiply takes them, pieces 8 places apart.
#pragma once

#include "linear_skinny_products.cuh"
#include "stack_ring.cuh"

namespace quamba::stack {

using skinny::Kind;
using skinny::kInteger;

template <Kind KIND>
constexpr int kRows = kInteger<KIND> ? 8 : 16;

template <Kind KIND>
constexpr int kStepX = KIND == Kind::kW8A8 ? 64 : KIND == Kind::kW4A8 ? 128 : 512;  // bytes of x in a step

constexpr int kWarps = 16, kTeam = 32 * kWarps;
constexpr int kMostSteps = (kRunBytes / kStep + kParts - 1) / kParts;  // of a part

// The warps that are not busy with copies.
struct Team {
  static __device__ __forceinline__ int threads() { return kTeam; }
  static __device__ __forceinline__ void sync() { sync_threads(1, kTeam); }
};

// What a lane has of a stage.
struct Lane {
  const char *w, *x;        // its bytes of step 0
  const char* scales;       // of its first row
  int pitch, scale_bytes, group_steps, step;  // step: of the row, at step 0 of the stage
};

__device__ __forceinline__ int group_of(const Lane& l, int step) {
  return l.group_steps == 1 ? l.step + step : (l.step + step) / l.group_steps;
}

// 16 times the int4 codes of a word: of the even nibbles, moved up, or of the odd ones.
__device__ __forceinline__ int codes_of(uint32_t nibbles) { return static_cast<int>((nibbles & 0xf0f0f0f0u) ^ 0x80808080u); }

template <Kind KIND>
__device__ __forceinline__ int multiply_step(const Lane& l, int s) {
  const uint4 w = *reinterpret_cast<const uint4*>(l.w + s * kStep);
  const uint4* const x = reinterpret_cast<const uint4*>(l.x + s * kStepX<KIND>);
  int dot = 0;
  if constexpr (KIND == Kind::kW8A8) {
    const uint4 a = x[0];
    dot = __dp4a(static_cast<int>(w.x), static_cast<int>(a.x), dot);
    dot = __dp4a(static_cast<int>(w.y), static_cast<int>(a.y), dot);
    dot = __dp4a(static_cast<int>(w.z), static_cast<int>(a.z), dot);
    return __dp4a(static_cast<int>(w.w), static_cast<int>(a.w), dot);
  } else {
    const uint4 a = x[0], b = x[1];
    const int m = reinterpret_cast<const uint8_t*>(l.scales)[group_of(l, s)];
    dot = __dp4a(codes_of(w.x << 4), static_cast<int>(a.x), dot);
    dot = __dp4a(codes_of(w.x), static_cast<int>(a.y), dot);
    dot = __dp4a(codes_of(w.y << 4), static_cast<int>(a.z), dot);
    dot = __dp4a(codes_of(w.y), static_cast<int>(a.w), dot);
    dot = __dp4a(codes_of(w.z << 4), static_cast<int>(b.x), dot);
    dot = __dp4a(codes_of(w.z), static_cast<int>(b.y), dot);
    dot = __dp4a(codes_of(w.w << 4), static_cast<int>(b.z), dot);
    dot = __dp4a(codes_of(w.w), static_cast<int>(b.w), dot);
    return (dot >> 4) * m;
  }
}

// Sums of a stage's rows over `steps` steps from `s` on, written by one lane a row.
template <Kind KIND>
__device__ __forceinline__ void multiply_part(const Lane& l, int s, int steps, uint32_t* sums, int lane) {
  if constexpr (kInteger<KIND>) {
    int acc = 0;
#pragma unroll
    for (int i = 0; i < kMostSteps; ++i)
      if (i < steps) acc += multiply_step<KIND>(l, s + i);
    acc += __shfl_xor_sync(~0u, acc, 1);
    acc += __shfl_xor_sync(~0u, acc, 2);
    if (lane % 4 == 0) sums[lane / 4] = static_cast<uint32_t>(acc);
  } else {
    float acc[1][1][4] = {};
#pragma unroll 1
    for (int i = s; i < s + steps; ++i) {
      skinny::Step<1> step;
      const int group = group_of(l, i);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        step.w[0][h] = *reinterpret_cast<const uint4*>(l.w + i * kStep + h * 8 * l.pitch);
        step.scale[0][h] = reinterpret_cast<const uint16_t*>(l.scales + h * 8 * l.scale_bytes)[group];
      }
      skinny::multiply<KIND, false, 1, 1>(acc, step, reinterpret_cast<const uint4*>(l.x + i * kStepX<KIND>), lane % 4, 8);
    }
    if (lane % 4 == 0) {
      sums[lane / 4] = __float_as_uint(acc[0][0][0]);
      sums[lane / 4 + 8] = __float_as_uint(acc[0][0][2]);
    }
  }
}

// What the block has of a matrix, from `stage` on, which moves behind it: sums of parts in `sums`, [strip][run][part][row].
// The sync of the team that has to follow is the caller's. A warp takes one part of every fourth stage.
template <Kind KIND>
__device__ __forceinline__ void products(const Ring& ring, const Matrix& m, const Share& share, Stage& stage,
                                         const char* x, uint32_t* sums) {
  constexpr int kStride = kWarps / kParts;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, part = warp % kParts;
  const int stages = share.strips<kRows<KIND>>() * m.runs;
  int at = warp / kParts, run = at;
  while (run >= m.runs) run -= m.runs;
  Stage mine = stage;
  mine.advance(ring, at);
#pragma unroll 1
  for (; at < stages; at += kStride, mine.advance(ring, kStride)) {
    const char* const from = ring.stages + mine.slot * ring.bytes;
    const int first = run * m.run_steps, steps = min(m.run_steps, m.steps - first);
    const int begin = steps * part / kParts, end = steps * (part + 1) / kParts;
    const Lane l{from + lane / 4 * m.pitch + lane % 4 * 16,
                 x + first * kStepX<KIND> + (kInteger<KIND> ? lane % 4 * (kStepX<KIND> / 4) : 0),
                 from + kRows<KIND> * m.pitch + lane / 4 * m.scale_bytes,
                 m.pitch,
                 m.scale_bytes,
                 m.group_steps,
                 first};
    wait(ring.full + 8 * mine.slot, mine.parity);
    multiply_part<KIND>(l, begin, end - begin, sums + (at * kParts + part) * kRows<KIND>, lane);
    __syncwarp();
    if (lane == 0) arrive(ring.empty + 8 * mine.slot);
    for (run += kStride; run >= m.runs;) run -= m.runs;
  }
  for (int left = stages; left > 0; left -= ring.count) stage.advance(ring, min(left, ring.count));
}

// The sum of row r of the block's share.
template <Kind KIND>
__device__ __forceinline__ float sum_of(const Matrix& m, const uint32_t* sums, int r) {
  using Acc = std::conditional_t<kInteger<KIND>, int, float>;
  const int parts = m.runs * kParts;
  const Acc* const from = reinterpret_cast<const Acc*>(sums) + r / kRows<KIND> * parts * kRows<KIND> + r % kRows<KIND>;
  Acc total = from[0];
  for (int i = 1; i < parts; ++i) total += from[i * kRows<KIND>];
  return static_cast<float>(total);
}

}  // namespace quamba::stack
