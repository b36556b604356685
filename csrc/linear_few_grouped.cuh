// Products of up to 8 tokens with int4 weights in 16 bits: of codes less 8, which are exact, by mma.sync; the sums over
// a group's columns are scaled in fp32. So a weight takes no instruction for its scale, and is not rounded. Before they
// are scaled sums reach 2^9 times the largest |x|, which is beyond fp32 only where x is bf16 and beyond 2^118.
//
// Columns are multiplied in an order of their own: of every 64 lane 4 g + t of a warp has 16 t to 16 t + 15, which are
// two words of a channel's codes and 32 bytes of x. Codes come out of a word in the order 0, 4, 1, 5, 2, 6, 3, 7.
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

// What one lane multiplies: two channels by 8 tokens. Channels are taken in an order in which the words that half a
// warp reads lie in all banks.
template <class Element>
struct Grouped {
  using Op = w4::Operand<Element>;
  const w4::Weights& w;
  unsigned bias[2];
  const int channel;      // the first of the two within the block, the other is 8 on
  const int scale_bytes;  // of a stage
  const unsigned x, words, scales, first_scale;

  // x, words, scales: of the first stage
  __device__ Grouped(const w4::Weights& w, unsigned x, unsigned words, unsigned scales, int scale_bytes, int column)
      : w(w), bias{w.constant, Op::second_bias(w.constant)},
        channel(threadIdx.x / 32 * 16 + (threadIdx.x & 4) / 4 + (threadIdx.x & 8) / 2 + (threadIdx.x & 16) / 8),
        scale_bytes(scale_bytes), x(x + token() * 128 + ((2 * t() ^ token()) << 4)),
        words(words + channel * 64 + (((channel / 2 & 3) ^ t() / 2) << 4) + t() % 2 * 8), scales(scales + channel * 4),
        first_scale(static_cast<unsigned>(column + channel) * w.groups) {
    asm("" : "+r"(bias[1]));  // or it is made anew at each use
  }

  __device__ __forceinline__ static unsigned t() { return threadIdx.x % 4; }
  __device__ __forceinline__ static unsigned token() { return threadIdx.x % 32 / 4; }

  __device__ __forceinline__ void load_scales(float (&scale)[2], int stage, int step, int half) const {
    const unsigned from = scales + stage * scale_bytes + half * kTileO * 4;
    const unsigned shift = w4::shift_in_word<unsigned short>(first_scale + w.group(step * kTileK + half * w4::kChunk));
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
      const unsigned codes = (words ^ half * 32) + stage * (kTileO * kTileK / 2);
      const unsigned columns = x + stage * (8 * kTileK * 2) + half * 1024;
      const uint2 word[2] = {load_pair(codes), load_pair(codes + 512)};
      float sum[2][4] = {};  // two, since a product waits for the one that it adds to
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint4 v = load_shared(columns ^ i * 16);
        unsigned a[2][4];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const unsigned eight = i ? word[h].y : word[h].x;
          a[0][h] = Op::template codes<0>(eight, bias);
          a[0][2 + h] = Op::template codes<1>(eight, bias);
          a[1][h] = Op::template codes<2>(eight, bias);
          a[1][2 + h] = Op::template codes<3>(eight, bias);
        }
        multiply(sum[i], a[0], __byte_perm(v.x, v.z, 0x5410), __byte_perm(v.x, v.z, 0x7632));
        multiply(sum[i], a[1], __byte_perm(v.y, v.w, 0x5410), __byte_perm(v.y, v.w, 0x7632));
      }
      if (half == 0 || scale_bytes > kTileO * 4) load_scales(scale, stage, step, half);
#pragma unroll
      for (int i = 0; i < 4; ++i) total[i] += scale[i / 2] * (sum[0][i] + sum[1][i]);
    }
  }
};

}  // namespace quamba::few
