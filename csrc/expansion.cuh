// Two-level int4 weights as int8: by a kernel of their own (expand.cu), or by blocks that ride along in another's
// launch.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>

#include "expansion.h"
#include "linear.h"

namespace quamba {

// Eight int8 codes (n - 8) m, n the nibbles of a word: n m + 128 - 8 m stays within a byte for m up to 17 and n from 1,
// so four products are one multiplication.
__device__ __forceinline__ uint2 scale_codes(unsigned word, unsigned m) {
  const unsigned offset = 0x80808080u - m * 0x08080808u;
  const unsigned even = ((word & 0x0f0f0f0fu) * m + offset) ^ 0x80808080u;
  const unsigned odd = ((word >> 4 & 0x0f0f0f0fu) * m + offset) ^ 0x80808080u;
  return make_uint2(__byte_perm(even, odd, 0x5140), __byte_perm(even, odd, 0x7362));
}

struct Expansion {
  const uint2* packed;
  const unsigned char* multiplier;
  uint4* y;
  unsigned pieces, own;  // of 16 codes: in all, of a group
  unsigned inverse;      // 2^32 / own rounded up, where i / own is the upper half of i * inverse for all pieces; else 0
  unsigned large = ~0u;  // blocks that take all the pieces that a thread can; those after them take `few` a thread
  unsigned few = 0;

  // Blocks of so many threads, each of which can take so many pieces.
  unsigned blocks(int threads, int each) const {
    if (!pieces) return 0;
    const unsigned all = (pieces - 1) / (threads * each) + 1;
    return all <= large ? all : large + (pieces - large * threads * each - 1) / (threads * few) + 1;
  }

  // For such blocks beside a kernel that leaves them `idle` multiprocessors for so long that each takes `rounds` of
  // them: what is left then is cut so finely that all multiprocessors share it once the kernel ends.
  void leave_few(int threads, int each, long long idle, long long rounds, int multiprocessors) {
    constexpr unsigned kLeast = 4;
    const long long beside = idle * rounds, taken = beside * threads * each;
    if (!pieces || taken >= pieces) return;
    large = static_cast<unsigned>(beside);
    few = static_cast<unsigned>((pieces - taken - 1) / (static_cast<long long>(multiprocessors) * threads) + 1);
    few = std::min(std::max(few, kLeast), static_cast<unsigned>(each));
  }
};

// Whether this is an expansion that the kernels take.
inline bool expands(const QuambaExpansion& e) {
  auto whole = [](const void* data) { return reinterpret_cast<unsigned long long>(data) % 16 == 0; };
  return e.O > 0 && e.K > 0 && e.S > 0 && e.S % 16 == 0 && e.K % e.S == 0 && whole(e.w) && whole(e.y) &&
         static_cast<long long>(e.O) * e.K / 16 <= 0x7fffffffLL;
}

inline Expansion expansion_of(const QuambaExpansion& e) {
  if (!e.y) return {};
  const long long pieces = static_cast<long long>(e.O) * e.K / 16, own = e.S / 16;
  constexpr long long kRange = 1LL << 32;
  const unsigned inverse = own > 1 && pieces * own < kRange ? static_cast<unsigned>((kRange + own - 1) / own) : 0;
  return {static_cast<const uint2*>(e.w), static_cast<const unsigned char*>(e.multiplier), static_cast<uint4*>(e.y),
          static_cast<unsigned>(pieces), static_cast<unsigned>(own), inverse};
}

// By a kernel of its own: expand.cu.
int expand_alone(const QuambaExpansion& e, void* stream);

// The same, if there is anything, after a kernel that took nothing along and had this status.
inline int expand_after(int status, const QuambaExpansion& e, void* stream) {
  return status != QUAMBA_OK || !e.y ? status : expand_alone(e, stream);
}

// Up to Each pieces of every thread. The weights are constants, so they are read before ``wait`` and written after it.
template <int Each, class Wait>
__device__ __forceinline__ void expand(const Expansion& e, unsigned block, int thread, int threads, Wait wait) {
  constexpr int kSkip = 8;  // pieces after which it is seen whether there are more
  const unsigned small = block < e.large ? 0 : block - e.large, own = block < e.large ? Each : e.few;
  const unsigned begin = ((block - small) * Each + small * own) * threads, first = begin + thread;
  const unsigned end = min(e.pieces, begin + own * threads);
  uint2 words[Each];
  unsigned m[Each];
#pragma unroll
  for (int u = 0; u < Each; ++u) {
    if (u && u % kSkip == 0 && u >= own) break;
    if (const unsigned i = first + u * threads; i < end) {
      words[u] = __ldg(e.packed + i);
      m[u] = __ldg(e.multiplier + (e.inverse ? __umulhi(i, e.inverse) : i / e.own));
    }
  }
  wait();
#pragma unroll
  for (int u = 0; u < Each; ++u) {
    if (u && u % kSkip == 0 && u >= own) break;
    if (const unsigned i = first + u * threads; i < end) {
      const uint2 low = scale_codes(words[u].x, m[u]), high = scale_codes(words[u].y, m[u]);
      e.y[i] = make_uint4(low.x, low.y, high.x, high.y);
    }
  }
}

}  // namespace quamba
