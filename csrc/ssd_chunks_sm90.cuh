// What heads of a group share in the SSD scan on Hopper, once B and C of a chunk lie in shared memory as operands.
#pragma once

#include "ssd_scan_sm90.cuh"

namespace quamba::ssd::hopper {

constexpr int kSharingThreads = 256;

// B and C of a group, which lie in ``shared`` times 2^-of_inputs, and their products, to place ``at`` of all. Not real:
// nothing of it is left. ``most``: shared memory that nobody uses.
__device__ __forceinline__ void share_products(const Params& p, long long at, const unsigned char* shared,
                                               float (&most)[kSharingThreads / 32], const int (&of_inputs)[2],
                                               bool real) {
  constexpr int kThreads = kSharingThreads;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  unsigned char* const to = const_cast<unsigned char*>(p.operands) + at * kSlotBytes;
  __syncthreads();
#pragma unroll
  for (int i = threadIdx.x; i < 2 * kOperands / 16; i += kThreads)
    if (real) reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(shared)[i];

  const uint32_t base = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  constexpr int kTurns = (kBlocks - 1) / (kThreads / 32) + 1;
  float sums[kTurns][8], largest = 0.f;
#pragma unroll
  for (int turn = 0; turn < kTurns; ++turn) {
    const int i = warp + turn * (kThreads / 32);
    if (i >= kBlocks) break;
#pragma unroll
    for (float& sum : sums[turn]) sum = 0.f;
#pragma unroll
    for (int k = 0; k < kN / 16; ++k) {
      uint32_t left[4], right[4];
      left_along<kTokens>(left, base + kOperands, 16 * block_row(i / 4, i % 4), k);
      right_along<kTokens>(right, base, 16 * block_column(i / 4, i % 4), k);
      multiply(sums[turn], left, right[0], right[1]);
      multiply(sums[turn] + 4, left, right[2], right[3]);
    }
#pragma unroll
    for (float sum : sums[turn]) largest = fmaxf(largest, fabsf(sum));
  }
  // products of integers, or of halves of which the largest are about as large as those
  auto greatest = [](float x, float y) { return fmaxf(x, y); };
  const int exponent = exponent_of(block_reduce(largest, most, greatest), 0) + 1 - kHighest;
  const float factor = power_of_two(-exponent);
#pragma unroll
  for (int turn = 0; turn < kTurns; ++turn) {
    const int i = warp + turn * (kThreads / 32);
    if (i >= kBlocks) break;
    uint32_t v[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) v[j] = pack_f16(sums[turn][2 * j] * factor, sums[turn][2 * j + 1] * factor);
    if (real)
      *reinterpret_cast<uint4*>(to + 2 * kOperands + i * kBlockBytes + 16 * lane) = make_uint4(v[0], v[1], v[2], v[3]);
  }
  if (real && threadIdx.x == 0)
    reinterpret_cast<int4*>(const_cast<int*>(p.exponents))[at] = make_int4(of_inputs[0], of_inputs[1], exponent, 0);
}

}  // namespace quamba::ssd::hopper
