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

// What a lane has of a stage: its bytes of the part's first step, of its first row.
struct Lane {
  const char *w, *x, *scales;
  int row_bytes, scale_bytes;  // to the eighth row below
};

// 16 times the int4 codes of a word's high nibbles.
__device__ __forceinline__ int codes_of(uint32_t word) {
  uint32_t codes;  // (word & mask) ^ sign: one instruction where the constants lie in registers
  asm("lop3.b32 %0, %1, %2, %3, 0x6a;" : "=r"(codes) : "r"(word), "r"(0xf0f0f0f0u), "r"(0x80808080u));
  return static_cast<int>(codes);
}

template <Kind KIND>
struct Operands {
  uint4 w, x[KIND == Kind::kW4A8 ? 2 : 1];
  int multiplier;

  __device__ __forceinline__ void load(const Lane& l, int s) {
    w = *reinterpret_cast<const uint4*>(l.w + s * kStep);
    const uint4* const from = reinterpret_cast<const uint4*>(l.x + s * kStepX<KIND>);
    x[0] = from[0];
    if constexpr (KIND == Kind::kW4A8) {
      x[1] = from[1];
      multiplier = reinterpret_cast<const uint8_t*>(l.scales)[s];
    }
  }

  __device__ __forceinline__ int product() const {
    const auto add = [](uint32_t a, uint32_t b, int sum) { return __dp4a(static_cast<int>(a), static_cast<int>(b), sum); };
    if constexpr (KIND == Kind::kW8A8) {
      return add(w.x, x[0].x, add(w.y, x[0].y, 0)) + add(w.z, x[0].z, add(w.w, x[0].w, 0));
    } else {
      // two chains, each of which waits half as long for itself
      int even = add(codes_of(w.x << 4), x[0].x, 0), odd = add(codes_of(w.x), x[0].y, 0);
      even = add(codes_of(w.y << 4), x[0].z, even), odd = add(codes_of(w.y), x[0].w, odd);
      even = add(codes_of(w.z << 4), x[1].x, even), odd = add(codes_of(w.z), x[1].y, odd);
      even = add(codes_of(w.w << 4), x[1].z, even), odd = add(codes_of(w.w), x[1].w, odd);
      return ((even + odd) >> 4) * multiplier;
    }
  }
};

template <Kind KIND, int STEPS>
__device__ __forceinline__ int multiply_steps(const Lane& l) {
  Operands<KIND> o[STEPS];
#pragma unroll
  for (int s = 0; s < STEPS; ++s) o[s].load(l, s);
  int sum = 0;
#pragma unroll
  for (int s = 0; s < STEPS; ++s) sum += o[s].product();
  return sum;
}

// Sums of a stage's rows over the steps of a part, written by one lane a row.
template <Kind KIND>
__device__ __forceinline__ void multiply_part(const Lane& l, int steps, uint32_t* sums, int lane) {
  if constexpr (kInteger<KIND>) {
    int acc = 0, done = 0;
    if (steps == kMostSteps) {
      acc = multiply_steps<KIND, kMostSteps>(l);
    } else {
#pragma unroll 1
      for (Lane rest = l; done < steps; ++done, rest.w += kStep, rest.x += kStepX<KIND>, ++rest.scales)
        acc += multiply_steps<KIND, 1>(rest);
    }
    acc += __shfl_xor_sync(~0u, acc, 1);
    acc += __shfl_xor_sync(~0u, acc, 2);
    if (lane % 4 == 0) sums[lane / 4] = static_cast<uint32_t>(acc);
  } else {
    float acc[1][1][4] = {};
#pragma unroll 1
    for (int s = 0; s < steps; ++s) {
      skinny::Step<1> step;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        step.w[0][h] = *reinterpret_cast<const uint4*>(l.w + s * kStep + h * l.row_bytes);
        step.scale[0][h] = reinterpret_cast<const uint16_t*>(l.scales + h * l.scale_bytes)[s];
      }
      skinny::multiply<KIND, false, 1, 1>(acc, step, reinterpret_cast<const uint4*>(l.x + s * kStepX<KIND>), lane % 4, 8);
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
  constexpr int kStride = kWarps / kParts, kScale = KIND == Kind::kW4A8 ? 1 : 2;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, part = warp % kParts;
  const int stages = share.strips<kRows<KIND>>() * m.runs;
  const int begin = m.run_steps * part / kParts, steps = m.run_steps * (part + 1) / kParts - begin;
  const char* const w = ring.stages + lane / 4 * m.pitch + lane % 4 * 16 + begin * kStep;
  const char* const scales = ring.stages + kRows<KIND> * m.pitch + lane / 4 * m.scale_bytes + begin * kScale;
  const char* const own_x = x + begin * kStepX<KIND> + (kInteger<KIND> ? lane % 4 * (kStepX<KIND> / 4) : 0);
  int at = warp / kParts, run = at;
  while (run >= m.runs) run -= m.runs;
  Stage mine = stage;
  mine.advance(ring, at);
#pragma unroll 1
  for (; at < stages; at += kStride, mine.advance(ring, kStride)) {
    const int slot = mine.slot * ring.bytes, before = run * m.run_steps;
    const Lane l{w + slot, own_x + before * kStepX<KIND>, scales + slot + before * kScale, 8 * m.pitch, 8 * m.scale_bytes};
    wait(ring.full + 8 * mine.slot, mine.parity);
    multiply_part<KIND>(l, steps, sums + (at * kParts + part) * kRows<KIND>, lane);
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
