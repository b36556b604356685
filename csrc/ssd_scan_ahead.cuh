// What a block of ssd_scan_sm90.cuh holds in shared memory, and the warps that fill it ahead of those that multiply.
#pragma once

#include "ssd_scan_sm90.cuh"

namespace quamba::ssd::hopper {

// Codes: x is int8.
template <bool Codes>
struct Layout {
  static constexpr int kRaw = kTokens * kP * (Codes ? 1 : 2);  // of x
  // floats of a head and stage: its record, the exponents of B, C and C B^T, the maxima of four warps of x
  static constexpr int kExponents = kHeadRecord, kLargest = kExponents + 4, kFloats = kLargest + 4;
  static constexpr int kM = kStages * kSlotBytes, kX = kM + kStages * kMost * kPanel;
  static constexpr int kY = kX + kStages * kMost * kRaw, kVectors = kY + (Codes ? kMost * kPanel : 0);
  static constexpr int kStates = kVectors + 4 * kStages * kMost * kFloats;  // of a head: maxima of four warps
  static constexpr int kBarriers = kStates + kMost * 16, kBytes = kBarriers + 8 * kStages * (2 + kMost);
};
static_assert(Layout<false>::kBytes <= 227 * 1024 && Layout<true>::kBytes <= 227 * 1024);

__device__ __forceinline__ void store_matrices(uint32_t at, const uint32_t (&v)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(at), "r"(v[0]), "r"(v[1]),
               "r"(v[2]), "r"(v[3])
               : "memory");
}

__device__ __forceinline__ void copy_bulk(uint32_t to, const void* from, int bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(barrier)
               : "memory");
}

// A chunk of x of one head, by a group of four warps.
template <bool Codes>
struct Chunk {
  static constexpr int kPieces = kP * (Codes ? 1 : 2) / 16, kEach = kTokens * kPieces / 128;

  static __device__ __forceinline__ int place(int row, int piece) {
    return Codes ? row * kP + ((piece ^ (row >> 1 & 3)) << 4) : row * kPitch + ((piece ^ (row & 7)) << 4);
  }

  static __device__ __forceinline__ void fetch(unsigned char* raw, const unsigned char* from, long long step,
                                               int left) {
    const int thread = threadIdx.x % 128;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int row = (thread + 128 * i) / kPieces, piece = thread % kPieces;
      copy_async(raw + place(row, piece), from + (row < left ? row * step : 0) + 16 * piece, row < left);
    }
  }

  // The largest |element| of what this thread fetched, of 16 bits.
  static __device__ __forceinline__ float largest(const unsigned char* raw, int type) {
    const int thread = threadIdx.x % 128;
    float most = 0.f;
#pragma unroll
    for (int i = 0; i < kEach; ++i)
      most = fmaxf(most, largest_of(*reinterpret_cast<const uint4*>(
                                        raw + place((thread + 128 * i) / kPieces, thread % kPieces)), type));
    return most;
  }

  // x^T of the warp's 16 channels, times 2^-exponent. Of codes a word of two tokens holds neighbouring channels: rows
  // quad and quad + 8 of the operand are channels 2 quad and 2 quad + 1.
  static __device__ __forceinline__ void left(uint32_t (&x)[kTokens / 16][4], uint32_t raw, int warp, int type,
                                              int exponent) {
    const int lane = threadIdx.x % 32;
    if constexpr (Codes) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        uint32_t words[4];
        load_matrices_across(words, raw + place(32 * i + lane, warp));
#pragma unroll
        for (int g = 0; g < 4; ++g) {
          const uint32_t word = words[g] ^ 0x80808080u;
          constexpr uint32_t kBias = 0x64806480u;
          uint32_t* const to = x[2 * i + g / 2] + g % 2 * 2;
          to[0] = sub_f16x2(__byte_perm(word, 0x64646464u, 0x4240), kBias);
          to[1] = sub_f16x2(__byte_perm(word, 0x64646464u, 0x4341), kBias);
        }
      }
    } else {
      const float factor = power_of_two(-exponent);
      const uint32_t both = pack_f16(factor, factor);
#pragma unroll
      for (int s = 0; s < kTokens / 16; ++s) {
        left_across<kTokens>(x[s], raw, 16 * s, warp);
#pragma unroll
        for (uint32_t& v : x[s]) v = type == QUAMBA_BF16 ? brains_to_halves(v, factor) : times_f16(v, both);
      }
    }
  }
};

__device__ __forceinline__ int channel_of(bool codes, int warp, int quad, int r) {
  return 16 * warp + (codes ? 2 * quad + r : quad + 8 * r);
}

// How the chunks of a sequence are shared out among its segments. The outputs of segment i are those of chunks begin(i) to
// begin(i + 1). What stands before the last one's outputs is divided once more, so that all segments make as much of the
// states: segment i takes piece(i) to piece(i + 1), within which its outputs begin.
struct Shares {
  int cuts, chunks;
  unsigned inverse;  // 2^32 / cuts, rounded up: divides what is below 2^27

  __device__ __forceinline__ int divided(int v) const { return cuts > 1 ? __umulhi(v, inverse) : v; }
  __device__ __forceinline__ int begin(int i) const { return divided(i * chunks + cuts - 1); }
  __device__ __forceinline__ int piece(int i) const {
    if (i == cuts) return begin(cuts - 1);
    return min(max(divided(i * begin(cuts - 1)), i ? begin(i - 1) : 0), begin(i));
  }
};

// What all warps of a block know of their segment. Its piece begins `own` chunks before its outputs and has `ahead`.
struct Segment {
  long long batch, first, slot;
  int tokens, group, head, heads, index, sequence;  // head: the first of the block's
  int own, ahead;
  int rest;  // tokens of the sequence from `first` on, less than none where its last chunk is not full and lies before it
};

__device__ __forceinline__ Segment segment_of(const QuambaSsdScan& a, int cuts, int sequence, int index) {
  long long begin = 0, end = a.T, batch = sequence;
  if (a.cu_seqlens) {
    batch = 0;
    begin = min(max(static_cast<long long>(__ldg(a.cu_seqlens + sequence)), 0LL), a.T);
    end = max(min(static_cast<long long>(__ldg(a.cu_seqlens + sequence + 1)), a.T), begin);
  }
  const Shares shares{cuts, static_cast<int>((end - begin + kTokens - 1) / kTokens), 0xffffffffu / cuts + 1};
  const int from = shares.begin(index), chunks = shares.begin(index + 1) - from, piece = shares.piece(index);
  const long long first = begin + static_cast<long long>(from) * kTokens;
  const int tokens = static_cast<int>(max(min(static_cast<long long>(chunks) * kTokens, end - first), 0LL));
  const int ahead = cuts > 1 ? shares.piece(index + 1) - piece : 0;
  const int rest = static_cast<int>(min(end - first, 1LL << 30));
  return {batch, first, first_slot(a, begin, sequence, kTokens) + from, tokens, 0, 0, 0, index, sequence, from - piece,
          ahead, rest};
}

constexpr int kTells = 2 + kMost;  // and the one after it: the named barriers of what the heads leave behind

// Barriers: a stage has been filled by the copy engine; has been read by all heads; holds all that a head needs.
template <bool Codes>
struct Barriers {
  uint32_t base;
  __device__ __forceinline__ uint32_t filled(int stage) const { return base + 8 * stage; }
  __device__ __forceinline__ uint32_t read(int stage) const { return base + 8 * (kStages + stage); }
  __device__ __forceinline__ uint32_t made(int stage, int head) const {
    return base + 8 * (kStages * (2 + head) + stage);
  }
};

// The four warps that work ahead of those of the heads. Of a sequence that is cut those of the piece come first, for the
// state that it leaves, then those of the outputs.
template <bool Codes>
__device__ __forceinline__ void produce(const Params& p, const Segment& s, unsigned char* shared) {
  using At = Layout<Codes>;
  const QuambaSsdScan& a = p.a;
  const int first = s.ahead, all = first + (s.tokens + kTokens - 1) / kTokens;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, quad = lane / 4, pair = 2 * (lane % 4);
  const uint32_t base = shared_address(shared);
  const Barriers<Codes> barriers{base + At::kBarriers};
  float* const vectors = reinterpret_cast<float*>(shared + At::kVectors);
  const int x_size = size_of(a.x_dtype);
  const long long x_step = a.x_token * x_size, x_head = a.x_head * x_size, slot_step = 1LL * a.G * kSlotBytes;
  const unsigned char* x_from = static_cast<const unsigned char*>(a.x) +
                                (s.batch * a.x_batch + s.first * a.x_token) * x_size + s.head * x_head;
  const unsigned char* slots = p.operands + (s.slot * a.G + s.group) * kSlotBytes;
  // of a record and the exponents after it, 16 bytes a thread
  const bool copies_exponents = thread == kHeadRecord / 4;
  const float* steps = copies_exponents ? reinterpret_cast<const float*>(p.exponents + (s.slot * a.G + s.group) * 4)
                                        : p.steps + (s.slot * a.H + s.head) * kHeadRecord + 4 * thread;
  const long long vector_step = copies_exponents ? 4 * a.G : 1LL * a.H * kHeadRecord;
  const long long vector_head = copies_exponents ? 0 : kHeadRecord;
  auto fetch = [&](int turn, int stage) {
    if (turn < all) {
      const int chunk = turn < first ? turn - s.own : turn - first, left = s.rest - chunk * kTokens;
      if (turn >= kStages) quamba::wait(barriers.read(stage), (turn / kStages - 1) & 1);
      if (thread == 0) {
        const int bytes = turn < first ? kOperands : kSlotBytes;
        arrive_expecting(barriers.filled(stage), bytes);
        copy_bulk(base + stage * kSlotBytes, slots + chunk * slot_step, bytes, barriers.filled(stage));
      }
#pragma unroll
      for (int head = 0; head < kMost; ++head) {
        if (head >= s.heads) break;
        const int place = stage * kMost + head;
        Chunk<Codes>::fetch(shared + At::kX + place * At::kRaw, x_from + head * x_head + chunk * (kTokens * x_step),
                            x_step, left);
        const float* const vector = steps + chunk * vector_step + head * vector_head;
        if (thread <= kHeadRecord / 4) copy_async(vectors + place * At::kFloats + 4 * thread, vector, true);
      }
    }
    copy_async_commit();
  };
  // What the heads left behind is told to others here, since it takes long and the heads have more to do.
  const bool tells = p.cuts > 1 && s.index < p.cuts - 1 && warp >= 2 && warp - 2 < s.heads;
  auto tell = [&] {
    if (!tells) return;
    sync_threads(kTells + warp - 2, 128 + 32);
    const long long owner = static_cast<long long>(s.sequence) * a.H + s.head + warp - 2;
    if (lane == 0) quamba::ssd::arrive(p.flags + owner * (p.cuts - 1) + s.index);
  };
  wait_for_previous_kernel();
  fetch(0, 0);
  // above the diagonal M stays zero
  for (int i = thread; i < kStages * kMost * kPanel / 16; i += 128)
    reinterpret_cast<uint4*>(shared + At::kM)[i] = make_uint4(0, 0, 0, 0);

  // Blocks of M that this warp makes, as bytes from what they are made of and to where they lie.
  int row_at[3], column_at[3], block_at[3];
#pragma unroll
  for (int turn = 0; turn < 3; ++turn) {
    const int row = 16 * block_row(turn, warp), column = 16 * block_column(turn, warp);
    row_at[turn] = row + quad, column_at[turn] = kTokens + column + pair;
    const int at_row = row + (lane & 15), piece = column / 8 + (lane >> 4);
    block_at[turn] = at_row * kPitch + ((piece ^ (at_row & 7)) << 4);
  }
#pragma unroll 1
  for (int turn = 0, stage = 0; turn < all; ++turn) {
    const int next = stage == kStages - 1 ? 0 : stage + 1;
    fetch(turn + 1, next);
    if (turn == first + 1) tell();
    copy_async_wait_but<1>();
    if constexpr (!Codes) {
#pragma unroll 1
      for (int head = 0; head < s.heads; ++head) {
        const int place = stage * kMost + head;
        const float most = Chunk<Codes>::largest(shared + At::kX + place * At::kRaw, a.x_dtype);
        const unsigned v = __reduce_max_sync(~0u, __float_as_uint(most));
        if (lane == 0) vectors[place * At::kFloats + At::kLargest + warp] = __uint_as_float(v);
      }
    }
    if (turn >= first) {  // M[q][s] = C[q] B[s] exp(decay from s to q) dt[s]
      sync_threads(1 + kMost, 128);
      quamba::wait(barriers.filled(stage), turn / kStages & 1);
      const uint32_t products_at = base + stage * kSlotBytes + 2 * kOperands + warp * kBlockBytes + 16 * lane;
      auto make = [&](uint32_t(&v)[4], const float* record, float unit, int block) {
        const uint4 products = load_shared(products_at + 4 * block * kBlockBytes);
        const float from[2] = {record[row_at[block]] - unit, record[row_at[block] + 8] - unit};
        const float2 to[2] = {*reinterpret_cast<const float2*>(record + column_at[block]),
                              *reinterpret_cast<const float2*>(record + column_at[block] + 8)};
        const uint32_t both[4] = {products.x, products.y, products.z, products.w};
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const int j = k / 2, r = k % 2;
          const float2 product = unpack_f16(both[k]);
          float low = product.x * exp2_approximate(from[r] - to[j].x);
          float high = product.y * exp2_approximate(from[r] - to[j].y);
          if (block == 0) {  // nobody sees what comes later
            const int ahead = quad + 8 * r - 8 * j - pair;
            low = ahead >= 0 ? low : 0.f, high = ahead >= 1 ? high : 0.f;
          }
          v[k] = pack_f16(low, high);
        }
      };
      uint32_t v[kMost][3][4];
#pragma unroll
      for (int head = 0; head < kMost; ++head) {  // of a head that is not there too, from whatever lies there
        const float* const record = vectors + (stage * kMost + head) * At::kFloats;
        const float unit = record[3 * kTokens + 2] + 1.f;
        make(v[head][0], record, unit, 0), make(v[head][1], record, unit, 1);
        if (warp < 2) make(v[head][2], record, unit, 2);
      }
#pragma unroll
      for (int head = 0; head < kMost; ++head) {
        const uint32_t to = base + At::kM + (stage * kMost + head) * kPanel;
        store_matrices(to + block_at[0], v[head][0]), store_matrices(to + block_at[1], v[head][1]);
        if (warp < 2) store_matrices(to + block_at[2], v[head][2]);
      }
      publish();
    }
#pragma unroll
    for (int head = 0; head < kMost; ++head)
      if (head < s.heads) quamba::arrive(barriers.made(stage, head));
    stage = next;
  }
  if (all <= first + 1) tell();
}

}  // namespace quamba::ssd::hopper
