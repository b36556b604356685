// Columns of x in the order in which a lane finds int4 codes in a word of eight, so that it takes whole words of the
// weights (operand_w4.cuh): of every 32 columns lane t of four has 8 t to 8 t + 7.
#pragma once

#include "mma.cuh"
#include "tma.cuh"

namespace quamba::few {

__device__ __forceinline__ void store_shared(unsigned to, const uint4& v) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}

// Put the columns of a tile's first Rows rows in that order, by one warp. TMA has laid them out in rows of 128 bytes,
// 64 columns of 16 bits of all TileM rows before the next 64, by its 128-byte swizzle. A lane takes 32 columns of every
// eighth row. In 8 bits the even ones come first, then the odd ones; in 16 bits columns 8 t + q and 8 t + q + 4 become
// 8 q + 2 t and 8 q + 2 t + 1. seen(i, v): what a lane has of row 8 i + lane / 4 (8 bits) or lane % 8 (16 bits), as it
// lay.
template <int Bytes, int Rows, int TileM, class Seen>
__device__ __forceinline__ void order_columns(unsigned tile, Seen seen) {
  constexpr int kQuads = 2 * Bytes;  // 16 bytes of 32 columns
  const unsigned lane = threadIdx.x % 32;
  const unsigned row = Bytes == 1 ? lane / 4 : lane % 8, part = Bytes == 1 ? lane % 4 : lane / 8;
  const unsigned box = Bytes == 1 ? 0 : part / 2 * (TileM * 128);
  const unsigned from = tile + box + row * 128 + ((part * kQuads % 8 ^ row) << 4);
#pragma unroll
  for (int i = 0; i < Rows / 8; ++i) {
    uint4 v[kQuads];
#pragma unroll
    for (int t = 0; t < kQuads; ++t) v[t] = load_shared((from ^ t * 16) + i * 1024);
    seen(i, v);
#pragma unroll
    for (int q = 0; q < kQuads; ++q) {
      const unsigned select = Bytes == 1 ? (q ? 0x7531 : 0x6420) : q % 2 ? 0x7632 : 0x5410;
      const auto low = [&](const uint4& a) { return __byte_perm(a.x, Bytes == 1 ? a.y : a.z, select); };
      const auto high = [&](const uint4& a) { return __byte_perm(Bytes == 1 ? a.z : a.y, a.w, select); };
      uint4 to;
      if constexpr (Bytes == 1)
        to = make_uint4(low(v[0]), high(v[0]), low(v[1]), high(v[1]));
      else if (q < 2)
        to = make_uint4(low(v[0]), low(v[1]), low(v[2]), low(v[3]));
      else
        to = make_uint4(high(v[0]), high(v[1]), high(v[2]), high(v[3]));
      store_shared((from ^ q * 16) + i * 1024, to);
    }
  }
}

}  // namespace quamba::few
