// The four products of a chunk of the SSD scan: by warps with mma.sync, or by groups of four with wgmma on sm_90a.
//
// With wgmma a product is only begun: its operands must stay as they are, and its sums are there, after wait<..>().
#pragma once

#include "ssd_scan_tile.cuh"

namespace quamba::ssd {

#if QUAMBA_SM >= 90
constexpr bool kHopper = true;
#else
constexpr bool kHopper = false;
#endif

// What writes of this thread to shared memory need before wgmma of others may read them, behind a barrier.
__device__ __forceinline__ void publish() {
#if QUAMBA_SM >= 90
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

__device__ __forceinline__ void begin() {
#if QUAMBA_SM >= 90
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void commit() {
#if QUAMBA_SM >= 90
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

#if QUAMBA_SM >= 90

// A descriptor of panels: bytes between panels (along the rows of a product across them), 1024 between 8 rows.
__device__ __forceinline__ uint64_t described(uint32_t at, uint32_t panel) {
  return static_cast<uint64_t>(at >> 4) | static_cast<uint64_t>(panel >> 4) << 16 | 64ull << 32 | 1ull << 62;
}

// The same so many bytes further on.
__device__ __forceinline__ uint64_t moved(uint64_t d, int bytes) {
  return (d & 0xffffffff00000000ull) | (static_cast<uint32_t>(d) + static_cast<uint32_t>(bytes >> 4));
}

#define QUAMBA_SUMS4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define QUAMBA_SUMS8(i) QUAMBA_SUMS4(i), QUAMBA_SUMS4(i + 4)
#define QUAMBA_SUMS16(i) QUAMBA_SUMS8(i), QUAMBA_SUMS8(i + 8)
#define QUAMBA_SUMS32(i) QUAMBA_SUMS16(i), QUAMBA_SUMS16(i + 16)
#define QUAMBA_D8 "%0,%1,%2,%3,%4,%5,%6,%7"
#define QUAMBA_D16 QUAMBA_D8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define QUAMBA_D32 QUAMBA_D16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define QUAMBA_D64                                                                                          \
  QUAMBA_D32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55," \
             "%56,%57,%58,%59,%60,%61,%62,%63"
#define QUAMBA_WGMMA(n, sums, operands, ...) \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.f16.f16 {" sums "}, " operands : __VA_ARGS__)

// d [64 x Columns] += (Fresh: =) a (16 x 16 of each warp) times a right operand of 16 x Columns.
template <int Columns, bool Across, bool Fresh = false>
__device__ __forceinline__ void multiply_group(float* d, const uint32_t (&a)[4], uint64_t b) {
#define QUAMBA_IN "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(Fresh ? 0 : 1), "n"(Across ? 1 : 0)
  if constexpr (Columns == 16)
    QUAMBA_WGMMA(16, QUAMBA_D8, "{%8,%9,%10,%11}, %12, %13, 1, 1, %14;", QUAMBA_SUMS8(0) : QUAMBA_IN);
  if constexpr (Columns == 32)
    QUAMBA_WGMMA(32, QUAMBA_D16, "{%16,%17,%18,%19}, %20, %21, 1, 1, %22;", QUAMBA_SUMS16(0) : QUAMBA_IN);
  if constexpr (Columns == 64)
    QUAMBA_WGMMA(64, QUAMBA_D32, "{%32,%33,%34,%35}, %36, %37, 1, 1, %38;", QUAMBA_SUMS32(0) : QUAMBA_IN);
  if constexpr (Columns == 128)
    QUAMBA_WGMMA(128, QUAMBA_D64, "{%64,%65,%66,%67}, %68, %69, 1, 1, %70;", QUAMBA_SUMS32(0), QUAMBA_SUMS32(32)
                 : QUAMBA_IN);
#undef QUAMBA_IN
}

// d [64 x 64] += (Fresh: =) 64 rows of one operand times 64 of another, along 16 columns.
template <bool Fresh>
__device__ __forceinline__ void multiply_shared(float* d, uint64_t a, uint64_t b) {
  QUAMBA_WGMMA(64, QUAMBA_D32, "%32, %33, %34, 1, 1, 0, 0;", QUAMBA_SUMS32(0) : "l"(a), "l"(b), "n"(Fresh ? 0 : 1));
}

#endif

// The products of a block with Warps warps and chunks of Tokens. y and m: [Tokens / 8][4], h: [N / 8][4], flat.
template <int Tokens, int N, int Warps>
struct Products {
  static constexpr bool kGroups = kHopper && Warps % 4 == 0;
  static constexpr int kBlocks = Tokens / 16;

  // Until at most Left of the groups of products are under way; the sums of the others may be read.
  template <int Left, int Count>
  static __device__ __forceinline__ void wait(float (&sums)[Count]) {
#if QUAMBA_SM >= 90
    if constexpr (kGroups) {
      asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Left) : "memory");
#pragma unroll
      for (int i = 0; i < Count; ++i) asm volatile("" : "+f"(sums[i])::"memory");
    }
#endif
  }

  // m = rows 16 block .. of C B^T, up to the diagonal (or all of them).
  static __device__ __forceinline__ void mix(float (&m)[8 * kBlocks], uint32_t c, uint32_t b, int block) {
    if constexpr (kGroups && Tokens == 64) {
#if QUAMBA_SM >= 90
      begin();
#pragma unroll
      for (int k = 0; k < N / 16; ++k) {
        const uint32_t at = k / 4 * (Tokens * kPitch) + k % 4 * 32;
        if (k == 0)
          multiply_shared<true>(m, described(c + at, 16), described(b + at, 16));
        else
          multiply_shared<false>(m, described(c + at, 16), described(b + at, 16));
      }
      commit();
#endif
    } else {
#pragma unroll
      for (int i = 0; i < 8 * kBlocks; ++i) m[i] = 0.f;
#pragma unroll
      for (int k = 0; k < N / 16; ++k) {
        uint32_t left[4], right[4];
        left_along<Tokens>(left, c, 16 * block, k);
#pragma unroll
        for (int s = 0; s < kBlocks; ++s)
          if (s <= block) {
            right_along<Tokens>(right, b, 16 * s, k);
            multiply(m + 8 * s, left, right[0], right[1]);
            multiply(m + 8 * s + 4, left, right[2], right[3]);
          }
      }
    }
  }

  // y = h C^T, with h [N / 16][4] as left operands.
  static __device__ __forceinline__ void carry(float (&y)[8 * kBlocks], const uint32_t (&h)[N / 16][4], uint32_t c) {
    if constexpr (kGroups) {
#if QUAMBA_SM >= 90
      const uint64_t right = described(c, 16);
      begin();
#pragma unroll
      for (int k = 0; k < N / 16; ++k)
        if (k == 0)
          multiply_group<Tokens, false, true>(y, h[k], right);
        else
          multiply_group<Tokens, false>(y, h[k], moved(right, k / 4 * (Tokens * kPitch) + k % 4 * 32));
      commit();
#endif
    } else {
#pragma unroll
      for (int i = 0; i < 8 * kBlocks; ++i) y[i] = 0.f;
#pragma unroll
      for (int k = 0; k < N / 16; ++k)
#pragma unroll
        for (int q = 0; q < kBlocks; ++q) {
          uint32_t right[4];
          right_along<Tokens>(right, c, 16 * q, k);
          multiply(y + 8 * q, h[k], right[0], right[1]);
          multiply(y + 8 * q + 4, h[k], right[2], right[3]);
        }
    }
  }

  // y += x^T M^T. Tokens see themselves and earlier ones; groups of warps multiply the zeros too, since sums of one
  // shape follow each other without a wait.
  static __device__ __forceinline__ void apply(float (&y)[8 * kBlocks], const uint32_t (&x)[kBlocks][4], uint32_t m) {
    if constexpr (kGroups) {
#if QUAMBA_SM >= 90
      const uint64_t right = described(m, 16);
      begin();
#pragma unroll
      for (int s = 0; s < kBlocks; ++s) multiply_group<Tokens, false>(y, x[s], moved(right, 32 * s));
      commit();
#endif
    } else {
#pragma unroll
      for (int s = 0; s < kBlocks; ++s)
#pragma unroll
        for (int q = s; q < kBlocks; ++q) {
          uint32_t right[4];
          right_along<Tokens>(right, m, 16 * q, s);
          multiply(y + 8 * q, x[s], right[0], right[1]);
          multiply(y + 8 * q + 4, x[s], right[2], right[3]);
        }
    }
  }

  // h += (high + low)^T B, or without low
  template <bool Both = true>
  static __device__ __forceinline__ void update(float (&h)[N / 2], const uint32_t (&high)[kBlocks][4],
                                                const uint32_t (&low)[kBlocks][4], uint32_t b) {
    if constexpr (kGroups) {
#if QUAMBA_SM >= 90
      constexpr int kColumns = N < 128 ? N : 128;
      const uint64_t first = described(b, Tokens * kPitch);
      begin();
#pragma unroll
      for (int s = 0; s < kBlocks; ++s)
#pragma unroll
        for (int n = 0; n < N; n += kColumns) {
          const uint64_t right = moved(first, n / 64 * (Tokens * kPitch) + 16 * s * kPitch);
          multiply_group<kColumns, true>(h + n / 2, high[s], right);
          if constexpr (Both) multiply_group<kColumns, true>(h + n / 2, low[s], right);
        }
      commit();
#endif
    } else {
      static_assert(Both);
      constexpr int kPairs = N < 32 ? 1 : 2;  // products in a row have different sums
#pragma unroll
      for (int s = 0; s < kBlocks; ++s)
#pragma unroll
        for (int n = 0; n < N / 16; n += kPairs) {
          uint32_t right[kPairs][4];
#pragma unroll
          for (int i = 0; i < kPairs; ++i) right_across<Tokens>(right[i], b, 16 * s, n + i);
#pragma unroll
          for (int i = 0; i < 4 * kPairs; ++i)
            multiply(h + 8 * n + i % (2 * kPairs) * 4, i < 2 * kPairs ? high[s] : low[s],
                     right[i / 2 % kPairs][i % 2 * 2], right[i / 2 % kPairs][i % 2 * 2 + 1]);
        }
    }
  }
};

}  // namespace quamba::ssd
