// Columns of int8 x in the order in which a lane finds int4 codes in a word of eight, so that it takes whole words of the
// weights (operand_w4.cuh): of every 32 columns lane t of four has 8 t to 8 t + 7.
#pragma once

#include "tma.cuh"

namespace quamba::few {

__device__ __forceinline__ void store_shared(unsigned to, const uint4& v) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}

// Put the 128 columns of a tile's first Rows rows in that order, by one warp: of every 32 the even ones come first, then
// the odd ones. TMA has laid rows out by its 128-byte swizzle. A lane takes 32 columns of every eighth row. seen(i, v):
// what it has of row 8 i + lane / 4, as it lay.
template <int Rows, class Seen>
__device__ __forceinline__ void order_columns(unsigned tile, Seen seen) {
  const unsigned lane = threadIdx.x % 32, row = lane / 4;
  const unsigned from = tile + row * 128 + ((lane % 4 * 2 ^ row) << 4);
#pragma unroll
  for (int i = 0; i < Rows / 8; ++i) {
    uint4 v[2];
#pragma unroll
    for (int t = 0; t < 2; ++t) v[t] = load_shared((from ^ t * 16) + i * 1024);
    seen(i, v);
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      const unsigned select = q ? 0x7531 : 0x6420;
      store_shared((from ^ q * 16) + i * 1024,
                   make_uint4(__byte_perm(v[0].x, v[0].y, select), __byte_perm(v[0].z, v[0].w, select),
                              __byte_perm(v[1].x, v[1].y, select), __byte_perm(v[1].z, v[1].w, select)));
    }
  }
}

}  // namespace quamba::few
