// x for weights whose nibbles are not put in order: a block's share of x in shared memory, columns exchanged.
//
// Within 128 columns lane t of four owns 32 t to 32 t + 31 of a channel, four words; word i is one slice of 32 columns
// (int8) or two of 16. So a slice takes eight columns from each quarter of the 128, in the order that Operand::spread
// makes of a word. Rows are 128 bytes, their 16-byte pieces exchanged by row: the swizzle that wgmma reads.
#pragma once

#include "mma.cuh"
#include "tma.cuh"

namespace quamba::few {

template <int Size>
struct Exchange;

template <>
struct Exchange<1> {
  using Eight = uint2;  // columns of one word
  static constexpr int kPieces = 2;
  __device__ __forceinline__ static Eight load(const void* p) { return __ldcg(static_cast<const uint2*>(p)); }
  __device__ __forceinline__ static unsigned part(const Eight& v, int piece) {
    return __byte_perm(v.x, v.y, piece ? 0x7531 : 0x6420);
  }
};

template <>
struct Exchange<2> {
  using Eight = uint4;
  static constexpr int kPieces = 4;
  __device__ __forceinline__ static Eight load(const void* p) { return __ldcg(static_cast<const uint4*>(p)); }
  __device__ __forceinline__ static unsigned part(const Eight& v, int piece) {
    return __byte_perm(piece < 2 ? v.x : v.y, piece < 2 ? v.z : v.w, piece % 2 ? 0x7632 : 0x5410);
  }
};

// Steps [step, last) of 128 columns of TileM rows from ``row`` on, by Threads threads; zeros outside of x [M, K].
template <int Size, int TileM, int Threads>
__device__ __forceinline__ void exchange_x(unsigned to, const void* x, int M, int K, int row, int step, int last) {
  using E = Exchange<Size>;
  constexpr int kBatch = 4 / Size, kStepBytes = TileM * 128 * Size;
  const int count = TileM * 4 * (last - step), width = 4 * (last - step);
  for (int first = threadIdx.x; first < count; first += kBatch * Threads) {
    typename E::Eight v[kBatch][4];
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      const int at = first + u * Threads, r = at / width, in_row = at - r * width;
      const int column = (step + in_row / 4) * 128 + in_row % 4 * 8;
      const char* from = static_cast<const char*>(x) + (static_cast<long long>(row + r) * K + column) * Size;
#pragma unroll
      for (int t = 0; t < 4; ++t) {
        v[u][t] = {};
        if (at < count && row + r < M && column + 32 * t < K) v[u][t] = E::load(from + 32 * t * Size);
      }
    }
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      const int at = first + u * Threads, r = at / width, in_row = at - r * width, i = in_row % 4;
      if (at >= count) break;
#pragma unroll
      for (int p = 0; p < E::kPieces; ++p) {
        const int piece = i * E::kPieces + p;  // of a row's 8 or 16
        const unsigned there = to + in_row / 4 * kStepBytes + piece / 8 * TileM * 128 + r * 128 + ((piece ^ r) & 7) * 16;
        asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(there), "r"(E::part(v[u][0], p)),
                     "r"(E::part(v[u][1], p)), "r"(E::part(v[u][2], p)), "r"(E::part(v[u][3], p))
                     : "memory");
      }
    }
  }
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");  // wgmma reads it
}

}  // namespace quamba::few
