// Products of up to 8 tokens with int4 weights in 16 bits: of codes less 8, which are exact, by mma.sync; the sums over
// a group's columns are scaled in fp32. So a weight takes no instruction for its scale, and is not rounded. Before they
// are scaled sums reach 2^9 times the largest |x|, which is beyond fp32 only where x is bf16 and beyond 2^118.
#pragma once

#include "linear_few_plan.h"
#include "mma.cuh"
#include "operand_w4.cuh"

namespace quamba::few {

__device__ __forceinline__ uint2 load_pair(unsigned from) {
  uint2 v;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(from));
  return v;
}

// What one lane multiplies: channels g and g + 8 of its warp's 16 by 8 tokens. kFold: parts of a step's columns, each of
// which a share of the warps has.
template <class Element, int kFold>
struct Grouped {
  using Op = w4::Operand<Element>;
  static constexpr int kXBytes = 8 * kTileK * 2;  // of a part
  const w4::Weights& w;
  unsigned bias[2];
  const int place;        // of channel g's row in a stage, behind those of the parts before
  const int part;
  const int scale_bytes;  // of a stage
  const unsigned x, words, scales, first_scale;

  // x, words, scales: of the first stage
  __device__ Grouped(const w4::Weights& w, unsigned x, unsigned words, unsigned scales, int scale_bytes, int column)
      : w(w), bias{w.constant, Op::second_bias(w.constant)}, place(threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4),
        part(kFold > 1 ? place / (kTileO / kFold) : 0), scale_bytes(scale_bytes),
        x(x + part * kXBytes + threadIdx.x % 8 * 128 + ((threadIdx.x % 32 / 8 ^ threadIdx.x % 8) << 4)),
        words(words + place * 64 + ((place / 2 & 3) << 4) + threadIdx.x % 4 * 4), scales(scales + place * 4),
        first_scale(static_cast<unsigned>(column + place - part * (kTileO / kFold)) * w.groups) {
    asm("" : "+r"(bias[1]));  // or it is made anew at each use
  }

  __device__ __forceinline__ void load_scales(float (&scale)[2], int stage, int step, int half) const {
    const unsigned from = scales + stage * scale_bytes + half * kTileO * 4;
    const int first = (step * kFold + part) * kTileK + half * w4::kChunk;
    const unsigned shift = w4::shift_in_word<unsigned short>(first_scale + w.group(first));
#pragma unroll
    for (int h = 0; h < 2; ++h)
      scale[h] = __half2float(__ushort_as_half(static_cast<unsigned short>(load_word(from + h * 32) >> shift)));
  }

  __device__ __forceinline__ static void multiply(float (&sum)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    if constexpr (std::is_same_v<Element, cutlass::half_t>)
      mma_f16(sum, a[0], a[1], a[2], a[3], b0, b1);
    else
      mma_bf16(sum, a[0], a[1], a[2], a[3], b0, b1);
  }

  // total += what the columns of a step add, tokens 2 t and 2 t + 1 of the first channel, then of the other.
  __device__ __forceinline__ void add_step(float (&total)[4], int stage, int step) const {
    float scale[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum[2][4] = {};  // two, since a product waits for the one that it adds to
#pragma unroll
      for (int i = 0; i < 2; ++i) {  // of 32 columns
        const unsigned from = (words ^ (half * 32 + i * 16)) + stage * (kTileO * kTileK / 2);
        const unsigned word[2] = {load_word(from), load_word(from + 512)};
        uint32_t columns[4];  // of every eight
        load_matrices(columns, (x ^ i * 64) + stage * (kFold * kXBytes) + half * 1024);
        unsigned a[2][4];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          a[0][h] = Op::template codes<0>(word[h], bias);
          a[0][2 + h] = Op::template codes<1>(word[h], bias);
          a[1][h] = Op::template codes<2>(word[h], bias);
          a[1][2 + h] = Op::template codes<3>(word[h], bias);
        }
        multiply(sum[i], a[0], columns[0], columns[1]);
        multiply(sum[i], a[1], columns[2], columns[3]);
      }
      if (half == 0 || scale_bytes > kTileO * 4) load_scales(scale, stage, step, half);
#pragma unroll
      for (int i = 0; i < 4; ++i) total[i] += scale[i / 2] * (sum[0][i] + sum[1][i]);
    }
  }
};

}  // namespace quamba::few
