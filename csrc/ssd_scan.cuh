// Mamba2's scan: h <- exp(dt A) h + dt x B^T, y = C h + D x, in chunks of tokens as matrix products (2405.21060, 6).
//
// A block takes a head over a segment of the sequence and keeps the state in the registers of its P / 16 warps, 16
// channels each, from chunk to chunk. Everything is computed as y^T and h, so that what a warp holds is always the left
// operand: h as it was accumulated, for h C^T, and x^T for x^T M^T and for the update x^T B. What all warps share lies
// in shared memory as the right operand: B, C and M = C B^T decayed, which the warps make by rows and hand over once.
//
// Where a sequence is cut, each segment but the last has a second block, which leaves behind what the segment makes of
// a state of zero; the outputs of later segments wait for it.
//
// Before that B and C become operands, once for all heads of a group, and dt decays and weights: ssd_scan_operands.cu.
//
// Numbers. Operands are fp16, sums fp32. fp16 holds int8 exactly, and inputs of 16 bits after a power of two that
// brings the largest of a chunk below 2^7. M and the state as operands of y have one term, which a 16-bit y cannot tell
// from the exact ones; powers of two keep them below 2^15, from bounds: fp16 has full precision for 29 binary places
// below that. What is added to the state has two terms, 22 bits: it stays for many tokens, and a prompt in pieces has
// to leave the state of the whole.
#pragma once

#include "launch.cuh"
#include "scan.h"
#include "softplus.cuh"
#include "ssd_scan_products.cuh"

namespace quamba::ssd {

struct Params {
  QuambaSsdScan a;
  int cuts;
  long long slots;            // chunks of all sequences, some of them empty
  const unsigned char* operands;  // [slots, G, 2]: B and C of a chunk as they lie in shared memory
  const int* exponents;       // [slots, G, 2]: of the powers of two that multiply them
  const float* steps;         // [slots, H, kRecord]
  int* flags;                 // [sequences, H, cuts - 1]: 1 where local and left are there
  // The same: states in the order of the threads; log2 of what is left of earlier ones. ssd_scan_sm90.cuh: local twice,
  // with those that segments keep for themselves; left with the exponent of the state's unit.
  float *local, *left;
};

// What the launches of a scan are given; false for what no kernel takes. ssd_scan.cu.
bool prepare(const QuambaSsdScan& a, Params& p);

constexpr int kHighest = 15;        // |M|, |h| <= 2^15
constexpr float kNothing = -200.f;  // log2 of zero

// Blocks of 2 P threads that a processor's registers hold.
constexpr int blocks_by_registers(int N, int P) { return N <= 128 && P <= 64 ? 192 / P : 128 / P; }

template <int N, int P>
constexpr int kChunk = N == 256 || (N == 128 && P == 128) ? 32 : 64;  // tokens

// What a head needs to know of dt, of a chunk: [Tokens] log2 of the decay up to a token, the same less log2 of its dt,
// its weight in the state that the chunk leaves; then log2 of the whole decay and of the sum of weights, the exponent
// of the largest dt.
template <int Tokens>
constexpr int kRecord = 3 * Tokens + 4;

// Bytes of B or C of a chunk.
template <int N, int Tokens>
constexpr int kOperand = Tokens * kPitch * (N > 64 ? N / 64 : 1);

// The chunks of a sequence lie one after the other among the slots, from here on.
__device__ __forceinline__ long long first_slot(const QuambaSsdScan& a, long long begin, int sequence, int tokens) {
  return a.cu_seqlens ? begin / tokens + sequence : sequence * ((a.T + tokens - 1) / tokens);
}

template <int N, int P, bool OUTPUT>
struct Layout {
  static constexpr int kTokens = kChunk<N, P>, kWarps = P / 16, kThreads = 32 * kWarps;
  static constexpr int kColumns = kOperand<N, kTokens>, kChannels = kTokens * kPitch * (P > 64 ? P / 64 : 1);
  static constexpr int kB = 0, kC = kB + 2 * kColumns, kM = OUTPUT ? kC + kColumns : kC;
  static constexpr int kX = OUTPUT ? kM + kTokens * kPitch : kC, kVectors = kX + kChannels;
  // floats: records of two chunks; of one what is made of them: as there, factors of h C^T, weights in two halves
  static constexpr int kSteps = 0, kReach = 2 * kRecord<kTokens>, kCarried = kReach + kTokens;
  static constexpr int kHigh = kCarried + kTokens, kLow = kHigh + kTokens / 2;
  static constexpr int kLargest = kLow + kTokens / 2, kState = kLargest + kWarps;
  static constexpr int kExponents = (kState + kWarps + 1) / 2 * 2, kFloats = kExponents + 4;
  static constexpr int kRaw = kVectors + (4 * kFloats + 15) / 16 * 16;
  static constexpr int kBlocks = blocks_by_registers(N, P);
};

// The pieces of 16 bytes of a chunk of x that a thread copies and, later, reads back and converts: those from its own
// number on, in steps of the block.
template <int Threads, int Rows, int Columns>
struct Stream {
  const unsigned char* from;  // the thread's first piece of the next chunk
  long long step;             // bytes from token to token
  unsigned char* raw;
  int type;

  // of the first token
  __device__ __forceinline__ Stream(const unsigned char* start, long long step, unsigned char* raw, int type)
      : step(step), raw(raw), type(type) {
    const int pieces = Columns * size_of(type) / 16, log = 31 - __clz(pieces);
    from = start + (threadIdx.x >> log) * step + 16 * (threadIdx.x & (pieces - 1));
  }

  template <int Size, class F>  // of an element; f(number, row, piece of the row, rows from the thread's first)
  __device__ __forceinline__ void each_piece(F f) const {
    constexpr int kPieces = Columns * Size / 16, kTotal = Rows * kPieces;
    constexpr int kAtOnce = kTotal / Threads < 4 ? 1 + kTotal / Threads : 4;
#pragma unroll kAtOnce
    for (int i = 0; i < kTotal; i += Threads) {
      const int at = i + threadIdx.x;
      if (kTotal % Threads == 0 || at < kTotal) f(at, at / kPieces, at % kPieces, i / kPieces);
    }
  }

  __device__ __forceinline__ void fetch(int left) {
    auto copy = [&](int at, int row, int, int apart) {
      copy_async(raw + 16 * at, row < left ? from + apart * step : from, row < left);
    };
    if (type == QUAMBA_I8)
      each_piece<1>(copy);
    else
      each_piece<2>(copy);
    from += Rows * step;
  }

  // The largest |element| that this thread has copied, of 16 bits.
  __device__ __forceinline__ float largest() const {
    float most = 0.f;
    each_piece<2>([&](int at, int, int, int) {
      most = fmaxf(most, largest_of(*reinterpret_cast<const uint4*>(raw + 16 * at), type));
    });
    return most;
  }

  __device__ __forceinline__ void convert(unsigned char* operand, float factor) const {
    if (type == QUAMBA_I8)
      each_piece<1>([&](int at, int row, int piece, int) {
        store_codes<Rows>(operand, row, piece, *reinterpret_cast<const uint4*>(raw + 16 * at));
      });
    else
      each_piece<2>([&](int at, int row, int piece, int) {
        *reinterpret_cast<uint4*>(operand + place_in<Rows>(row, piece / 2, piece % 2)) =
            scaled_halves(*reinterpret_cast<const uint4*>(raw + 16 * at), type, factor);
      });
  }
};

__device__ __forceinline__ float load_float(const void* data, int type, long long at) {
  if (type == QUAMBA_F32) return __ldcg(static_cast<const float*>(data) + at);
  const unsigned short v = __ldcg(static_cast<const unsigned short*>(data) + at);
  return type == QUAMBA_F16 ? __half2float(reinterpret_cast<const __half&>(v)) : __uint_as_float(v << 16);
}

__device__ __forceinline__ void arrive(int* flag) {
  asm volatile("st.release.gpu.global.s32 [%0], 1;" ::"l"(flag) : "memory");
}

__device__ __forceinline__ bool arrived(const int* flag) {
  int v;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(v) : "l"(flag) : "memory");
  return v != 0;
}

// 8 bytes from global to shared memory.
__device__ __forceinline__ void copy_async_pair(void* shared, const void* p) {
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(to), "l"(p) : "memory");
}

// log2 of a sum, of logarithms.
__device__ __forceinline__ float together(float v, float w) {
  const float most = fmaxf(v, w);
  return most + log2_approximate(1.f + exp2_approximate(fminf(v, w) - most));
}

// A segment of a head: its outputs, or what it leaves behind of a state of zero.
template <int N, int P, bool OUTPUT>
__device__ __forceinline__ void scan_segment(const Params& p, unsigned char* shared, int head, int segment,
                                             int sequence) {
  using At = Layout<N, P, OUTPUT>;
  constexpr int kTokens = At::kTokens, kWarps = At::kWarps, kThreads = At::kThreads;
  constexpr int kBlocks = kTokens / 16;  // of tokens
  using Multiply = Products<kTokens, N, kWarps>;
  float* vectors = reinterpret_cast<float*>(shared + At::kVectors);
  const QuambaSsdScan& a = p.a;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, quad = lane / 4, pair = 2 * (lane % 4);
  const int group = head / (a.H / a.G);
  long long begin = 0, end = a.T, batch = sequence;
  if (a.cu_seqlens) {
    batch = 0;
    begin = min(max(static_cast<long long>(__ldg(a.cu_seqlens + sequence)), 0LL), a.T);
    end = max(min(static_cast<long long>(__ldg(a.cu_seqlens + sequence + 1)), a.T), begin);
  }
  const long long chunks = (end - begin + kTokens - 1) / kTokens, size = (chunks + p.cuts - 1) / p.cuts * kTokens;
  const long long first = begin + segment * size;
  const int tokens = static_cast<int>(max(min(size, end - first), 0LL));

  Stream<kThreads, kTokens, P> X{
      static_cast<const unsigned char*>(a.x) +
          (batch * a.x_batch + first * a.x_token + head * a.x_head) * size_of(a.x_dtype),
      a.x_token * size_of(a.x_dtype), shared + At::kRaw, a.x_dtype};
  // B, and C after it, of the chunk that is fetched next
  const long long slot = first_slot(a, begin, sequence, kTokens) + segment * (size / kTokens);
  const unsigned char* operand = p.operands + (slot * a.G + group) * 2 * At::kColumns + 16 * threadIdx.x;
  const int* exponents = p.exponents + (slot * a.G + group) * 2;
  const float* steps = p.steps + (slot * a.H + head) * kRecord<kTokens> + 4 * threadIdx.x;
  auto fetch = [&](int t, int buffer) {
    if (t >= tokens) return;
#pragma unroll
    for (int i = 0; i < At::kColumns; i += 16 * kThreads)
      copy_async(shared + At::kB + buffer * At::kColumns + i + 16 * threadIdx.x, operand + i, true);
    X.fetch(tokens - t);
    if (threadIdx.x == 0) copy_async_pair(vectors + At::kExponents + 2 * buffer, exponents);
#pragma unroll
    for (int i = 0; i < kRecord<kTokens> / 4; i += kThreads)
      if (i + threadIdx.x < kRecord<kTokens> / 4)
        copy_async(vectors + At::kSteps + buffer * kRecord<kTokens> + 4 * (i + threadIdx.x), steps + 4 * i, true);
  };
  auto fetch_c = [&](int t) {
    if (t >= tokens) return;
#pragma unroll
    for (int i = 0; i < At::kColumns; i += 16 * kThreads)
      copy_async(shared + At::kC + i + 16 * threadIdx.x, operand + At::kColumns + i, true);
  };
  auto measure = [&](int place, float most) {  // the largest in this warp
    const unsigned v = __reduce_max_sync(~0u, __float_as_uint(most));
    if (lane == 0) vectors[place + warp] = __uint_as_float(v);
  };
  auto measured = [&](int place) {
    float most = vectors[place];
#pragma unroll
    for (int i = 1; i < kWarps; ++i) most = fmaxf(most, vectors[place + i]);
    return most;
  };
  const bool codes = a.x_dtype == QUAMBA_I8;
  auto exponent = [&] { return codes ? 0 : scale_of(measured(At::kLargest)); };

  auto advance = [&] {
    operand += 2LL * a.G * At::kColumns, exponents += 2 * a.G, steps += static_cast<long long>(a.H) * kRecord<kTokens>;
  };
  fetch(0, 0);
  if constexpr (OUTPUT) fetch_c(0);
  copy_async_commit();
  advance();

  // The state of rows quad and quad + 8 of the warp's 16, to be multiplied by own[] and 2^unit.
  const int channel = warp * 16 + quad;
  const float b_scale = a.b_scale ? __ldg(a.b_scale + group) : 1.f;
  const float c_scale = a.c_scale ? __ldg(a.c_scale + group) : 1.f;
  float own[2], skip[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float x_scale = a.x_scale ? __ldg(a.x_scale + head * P + channel + 8 * r) : 1.f;
    own[r] = fabsf(x_scale * b_scale) < 1e-30f ? 1e-30f : x_scale * b_scale;  // it divides a state
    skip[r] = OUTPUT ? x_scale * load_float(a.D, a.D_dtype, head) : 0.f;
  }
  float h[N / 2];
  const long long owner = static_cast<long long>(sequence) * a.H + head;
  const long long state_at = (owner * P + channel) * N + pair;
#pragma unroll
  for (int i = 0; i < N / 2; ++i) h[i] = 0.f;
  if constexpr (OUTPUT) {
    if (a.state) {
      const float inverse[2] = {1.f / own[0], 1.f / own[1]};
#pragma unroll
      for (int j = 0; j < N / 8; ++j)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const float2 v = __ldcg(reinterpret_cast<const float2*>(a.state + state_at + 8 * r * N + 8 * j));
          h[4 * j + 2 * r] = v.x * inverse[r], h[4 * j + 2 * r + 1] = v.y * inverse[r];
        }
    }
    if (segment > 0) {
      if (threadIdx.x < segment)
        while (!arrived(p.flags + owner * (p.cuts - 1) + threadIdx.x)) __nanosleep(100);
      __syncthreads();
    }
    for (int i = 0; i < segment; ++i) {
      const long long from = owner * (p.cuts - 1) + i;
      const float factor = exp2_approximate(__ldcg(p.left + from));
#pragma unroll
      for (int j = 0; j < N / 8; ++j) {
        const float4 v =
            __ldcg(reinterpret_cast<const float4*>(p.local) + (from * (N / 8) + j) * kThreads + threadIdx.x);
        h[4 * j] = __fmaf_rn(h[4 * j], factor, v.x), h[4 * j + 1] = __fmaf_rn(h[4 * j + 1], factor, v.y);
        h[4 * j + 2] = __fmaf_rn(h[4 * j + 2], factor, v.z), h[4 * j + 3] = __fmaf_rn(h[4 * j + 3], factor, v.w);
      }
    }
  }

  if constexpr (OUTPUT && Multiply::kGroups)  // above the diagonal M stays zero
    for (int i = threadIdx.x; i < kTokens * kPitch / 16; i += kThreads)
      reinterpret_cast<uint4*>(shared + At::kM)[i] = make_uint4(0, 0, 0, 0);
  unsigned short* out = static_cast<unsigned short*>(a.y) +
                        ((batch * a.T + first + lane / 2) * a.H + head) * P + 16 * warp + lane % 2 * 8;
  const long long out_step = 16LL * a.H * P;
  const uint32_t base = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  copy_async_wait();
  if (!codes) measure(At::kLargest, X.largest());
  // Of h: its unit (h is what the registers hold times 2^unit), and what the latest chunk did to it; all as log2.
  float unit = 0.f, unit_before = 0.f, latest = 0.f, added = kNothing, kept = 0.f;
  if constexpr (OUTPUT) {
    float most = 0.f;
#pragma unroll
    for (int i = 0; i < N / 2; ++i) most = fmaxf(most, fabsf(h[i]));
    measure(At::kState, most);
  }
  __syncthreads();
  if constexpr (OUTPUT) {
    const int e = exponent_of(measured(At::kState), -100) + 1 - kHighest;
#pragma unroll
    for (int i = 0; i < N / 2; ++i) h[i] *= power_of_two(-e);
    unit = static_cast<float>(e);
  }
  int buffer = 0;
#pragma unroll 1
  for (int t = 0; t < tokens; t += kTokens, buffer ^= 1) {
    const int ex = exponent();
    const int2 exponents_of = *reinterpret_cast<const int2*>(vectors + At::kExponents + 2 * buffer);
    const int eb = exponents_of.x, ec = exponents_of.y;
    const float* record = vectors + At::kSteps + buffer * kRecord<kTokens>;
    const float4 sums = *reinterpret_cast<const float4*>(record + 3 * kTokens);
    const float total = sums.x, inputs = static_cast<float>(ex + eb);
    // |C B^T dt| < 2^m 2^kHighest
    const float m = sums.z + static_cast<float>(1 + 2 * kBits + (31 - __clz(N)) - kHighest);
    // where h is no operand only what is added must not overflow
    float now = kNothing;
    if constexpr (OUTPUT)
      now = together(fmaxf(log2_approximate(measured(At::kState)) + unit_before, kNothing) + latest, added);
    latest = total, added = fmaxf(inputs + 2 * kBits + sums.y, kNothing);
    const float bound = OUTPUT ? together(now + total, added) : added;
    const float next = ceilf(fmaxf(bound, -60.f)) - kHighest;
    const float stays = exp2_approximate(total + unit - next), scale = exp2_approximate(inputs - next);
    const float factor = exp2_approximate(inputs + m + static_cast<float>(ec));
#pragma unroll
    for (int i = 0; i < kTokens; i += kThreads) {
      const int q = i + threadIdx.x;
      if (kTokens % kThreads != 0 && q >= kTokens) break;
      if constexpr (OUTPUT) {
        vectors[At::kReach + q] = record[kTokens + q] + m;
        vectors[At::kCarried + q] = exp2_approximate(record[q] + unit - inputs - m);
      }
      const float v = record[2 * kTokens + q] * scale;
      const __half high = __float2half_rn(v);
      reinterpret_cast<__half*>(vectors + At::kHigh)[q] = high;
      reinterpret_cast<__half*>(vectors + At::kLow)[q] = __float2half_rn(v - __half2float(high));
    }
    unit_before = unit, unit = next, kept += total;
    X.convert(shared + At::kX, power_of_two(-ex));
    publish();
    __syncthreads();
    fetch(t + kTokens, buffer ^ 1);
    copy_async_commit();
    const uint32_t at_b = base + At::kB + buffer * At::kColumns;

    float y[8 * kBlocks];
    if constexpr (OUTPUT) {
      // M[q][s] = C[q] B[s] exp(decay from s to q) dt[s], from its products, of a block of 16 rows
      const float *decay = record, *reach = vectors + At::kReach;
      auto decayed = [&](float(&m)[8 * kBlocks], int block) {
        const int row = 16 * block + quad;
        const float from[2] = {decay[row], decay[row + 8]};
#pragma unroll
        for (int j = 0; j < 2 * kBlocks; ++j) {
          if (j / 2 > block) continue;
          const float2 to = *reinterpret_cast<const float2*>(reach + 8 * j + pair);
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            float low = m[4 * j + 2 * r] * exp2_approximate(from[r] - to.x);
            float high = m[4 * j + 2 * r + 1] * exp2_approximate(from[r] - to.y);
            if (j / 2 == block) {  // nobody sees what comes later
              const int at = row + 8 * r - 8 * j - pair;
              low = at >= 0 ? low : 0.f, high = at >= 1 ? high : 0.f;
            }
            *reinterpret_cast<uint32_t*>(shared + At::kM + place<kTokens>(row + 8 * r, 8 * j + pair)) =
                pack_f16(low, high);
          }
        }
      };
      constexpr bool kBegun = Multiply::kGroups && kTokens == 64;  // the product of the mix runs while h is made ready
      float m[8 * kBlocks];
      if constexpr (kBegun) Multiply::mix(m, base + At::kC, at_b, warp % 4);

      uint32_t left[N / 16][4];
      __half2 most = __float2half2_rn(0.f);
#pragma unroll
      for (int i = 0; i < N / 4; ++i) {
        left[i / 4][i % 4] = pack_f16(h[2 * i], h[2 * i + 1]);
        most = __hmax2(most, __habs2(reinterpret_cast<__half2&>(left[i / 4][i % 4])));
      }
      measure(At::kState, fmaxf(__low2float(most), __high2float(most)));

      if constexpr (kBegun) {
        Multiply::template wait<0>(m);
        if (warp < 4) decayed(m, warp);
      } else {
        for (int block = warp; block < kBlocks; block += kWarps) {
          Multiply::mix(m, base + At::kC, at_b, block);
          decayed(m, block);
        }
      }
      publish();
      Multiply::carry(y, left, base + At::kC);
      Multiply::template wait<0>(y);
      __syncthreads();
      fetch_c(t + kTokens);
      copy_async_commit();
#pragma unroll
      for (int j = 0; j < 2 * kBlocks; ++j) {
        const float2 carried = *reinterpret_cast<const float2*>(vectors + At::kCarried + 8 * j + pair);
#pragma unroll
        for (int r = 0; r < 2; ++r) y[4 * j + 2 * r] *= carried.x, y[4 * j + 2 * r + 1] *= carried.y;
      }
    }
    advance();

    uint32_t x[kBlocks][4];
#pragma unroll
    for (int s = 0; s < kBlocks; ++s) left_across<kTokens>(x[s], base + At::kX, 16 * s, warp);
    if constexpr (OUTPUT) Multiply::apply(y, x, base + At::kM);

    // h <- exp(decay of the chunk) h + x^T (weights) B
#pragma unroll
    for (int i = 0; i < N / 2; ++i) h[i] *= stays;
    if constexpr (OUTPUT) {  // y^T turned, over the warp's own x
      Multiply::template wait<0>(y);
      const float all[2] = {own[0] * c_scale * factor, own[1] * c_scale * factor};
      const float direct[2] = {skip[0] * power_of_two(ex), skip[1] * power_of_two(ex)};
      __syncwarp();
#pragma unroll
      for (int j = 0; j < 2 * kBlocks; ++j) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const float2 v = unpack_f16(x[j / 2][j % 2 * 2 + r]);
          const float one = __fmaf_rn(y[4 * j + 2 * r], all[r], v.x * direct[r]);
          const float two = __fmaf_rn(y[4 * j + 2 * r + 1], all[r], v.y * direct[r]);
          const uint32_t packed = a.y_dtype == QUAMBA_F16 ? pack_f16(one, two) : pack_bf16(one, two);
          *reinterpret_cast<uint32_t*>(shared + At::kX + place<kTokens>(8 * j + quad, 16 * warp + 8 * r + pair)) =
              turned(packed);
        }
      }
      __syncwarp();
    }
    uint32_t high[kBlocks][4], low[kBlocks][4];
#pragma unroll
    for (int s = 0; s < kBlocks; ++s)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int at = 8 * s + 4 * half + lane % 4;
        const uint32_t one = reinterpret_cast<const uint32_t*>(vectors + At::kHigh)[at];
        const uint32_t two = reinterpret_cast<const uint32_t*>(vectors + At::kLow)[at];
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          high[s][i] = times_f16(x[s][i], one);
          low[s][i] = fma_f16x2(x[s][i], two, fma_f16x2(x[s][i], one, high[s][i] ^ 0x80008000u));
        }
      }
    Multiply::update(h, high, low, at_b);
    if constexpr (OUTPUT) {  // and out
#pragma unroll
      for (int i = 0; i < kBlocks; ++i)
        if (t + 16 * i + lane / 2 < tokens)
          *reinterpret_cast<uint4*>(out + i * out_step) = *reinterpret_cast<const uint4*>(
              shared + At::kX + place<kTokens>(16 * i + lane / 2, 16 * warp + lane % 2 * 8));
      out += kBlocks * out_step;
    }
    Multiply::template wait<0>(h);
    copy_async_wait();
    if (!codes) measure(At::kLargest, X.largest());
    __syncthreads();
  }

  const float scale = exp2_approximate(unit);
  if constexpr (OUTPUT) {
    if (segment != p.cuts - 1) return;
#pragma unroll
    for (int j = 0; j < N / 8; ++j)
#pragma unroll
      for (int r = 0; r < 2; ++r)
        *reinterpret_cast<float2*>(a.last + state_at + 8 * r * N + 8 * j) =
            make_float2(h[4 * j + 2 * r] * scale * own[r], h[4 * j + 2 * r + 1] * scale * own[r]);
  } else {
    const long long to = owner * (p.cuts - 1) + segment;
#pragma unroll
    for (int j = 0; j < N / 8; ++j)
      reinterpret_cast<float4*>(p.local)[(to * (N / 8) + j) * kThreads + threadIdx.x] =
          make_float4(h[4 * j] * scale, h[4 * j + 1] * scale, h[4 * j + 2] * scale, h[4 * j + 3] * scale);
    if (threadIdx.x == 0) p.left[to] = kept;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) arrive(p.flags + to);
  }
}

// First the blocks that leave states behind, then those of the outputs, segment by segment: a block waits only for some
// that begin before it.
template <int N, int P>
__global__ void __launch_bounds__(Layout<N, P, true>::kThreads, Layout<N, P, true>::kBlocks)
    ssd_scan(const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) unsigned char shared[];
  launch_dependents();
  wait_for_previous_kernel();
  const int heads = p.a.H, owners = heads * p.a.sequences;
  const int owner = blockIdx.x % owners, job = blockIdx.x / owners;
  if (job < p.cuts - 1)
    scan_segment<N, P, false>(p, shared, owner % heads, job, owner / heads);
  else
    scan_segment<N, P, true>(p, shared, owner % heads, job - (p.cuts - 1), owner / heads);
}

int launch_32(const Params& p, void* stream);  // N of 16 and 32
int launch_64(const Params& p, void* stream);
int launch_128(const Params& p, void* stream);
int launch_256(const Params& p, void* stream);
int launch_operands(const Params& p, int tokens, void* stream);

template <int N, int P>
int launch_as(const Params& p, void* stream) {
  using At = Layout<N, P, true>;
  const long long grid = static_cast<long long>(p.a.H) * p.a.sequences * (2 * p.cuts - 1);
  if (grid > 0x7fffffffLL) return QUAMBA_UNSUPPORTED;
  const int shared = At::kRaw + At::kTokens * P * size_of(p.a.x_dtype);
  cudaError_t error = cudaFuncSetAttribute(ssd_scan<N, P>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (error != cudaSuccess) return error;
  return launch(ssd_scan<N, P>, p, dim3(static_cast<unsigned>(grid)), At::kThreads, stream, shared);
}

template <int N>
int launch_states(const Params& p, void* stream) {
  switch (p.a.P) {
    case 16: return launch_as<N, 16>(p, stream);
    case 32: return launch_as<N, 32>(p, stream);
    case 64: return launch_as<N, 64>(p, stream);
    case 128: return launch_as<N, 128>(p, stream);
    default: return QUAMBA_UNSUPPORTED;
  }
}

}  // namespace quamba::ssd
