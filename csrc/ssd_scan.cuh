// Mamba2's scan: h <- exp(dt A) h + dt x B^T, y = C h + D x, in chunks of tokens as matrix products (2405.21060, 6).
//
// A block takes a head over a segment of the sequence and keeps the state in the registers of its P / 16 warps, 16
// channels each, from chunk to chunk. Everything is computed as y^T and h, so that what a warp holds is always the left
// operand: h as it was accumulated, for h C^T, and x^T for x^T M^T and for the update x^T B. What all warps share lies in
// shared memory as the right operand: B, C and M = C B^T decayed, which the warps make by rows and hand over once.
//
// Where a sequence is cut, a launch before this one leaves behind what each segment adds to a state of zero.
//
// Numbers. Operands are fp16, which holds int8 exactly; sums are fp32. What is not exact in fp16 is scaled by powers of
// two first: a row of M and a row of the state by its largest element, bf16 inputs by the largest of their chunk. So
// nothing overflows, and what is lost lies 2^-29 below the largest. M and the state as operands of y have one term, which
// a 16-bit y cannot tell from the exact ones. What is added to the state has two, 22 bits: it stays for many tokens, and
// a prompt in pieces has to leave the state of the whole.
#pragma once

#include "launch.cuh"
#include "scan.h"
#include "softplus.cuh"
#include "ssd_scan_products.cuh"

#ifndef SSD_BLOCKS
#define SSD_BLOCKS (N <= 128 && P <= 64 ? (OUTPUT ? 256 : 384) / (2 * P) : 1)
#endif
namespace quamba::ssd {

struct Params {
  QuambaSsdScan a;
  int cuts;
  float *local, *left;  // [sequences, H, cuts - 1]: states in the order of the threads; log2 of what is left of earlier
};

constexpr int kLeastInput = -12, kLeastRow = -30, kLeastStep = -40;  // exponents below which nothing is scaled up

template <int N, int P, bool OUTPUT>
struct Layout {
  static constexpr int kTokens = N == 256 || (N == 128 && P == 128) ? 32 : 64;  // of a chunk
  static constexpr int kWarps = P / 16, kThreads = 32 * kWarps;
  static constexpr int kColumns = kTokens * kPitch * (N > 64 ? N / 64 : 1), kChannels = kTokens * kPitch * (P > 64 ? P / 64 : 1);
  static constexpr int kB = 0, kC = kB + kColumns, kM = OUTPUT ? kC + kColumns : kC, kX = OUTPUT ? kM + kTokens * kPitch : kC;
  static constexpr int kVectors = kX + kChannels;
  // floats: log2 decay, the same less log2 dt, weights (all of two chunks), factors of carried and of all; then some
  static constexpr int kDecay = 0, kReach = 2 * kTokens, kWeight = 4 * kTokens, kCarried = 6 * kTokens, kRow = 7 * kTokens;
  static constexpr int kEnd = 8 * kTokens, kLargest = kEnd + 4, kFloats = kLargest + 3 * kWarps;
  static constexpr int kRaw = kVectors + (4 * kFloats + 15) / 16 * 16;
  static constexpr int raw(int size_x, int size_b, int size_c) {
    return kTokens * (P * size_x + N * size_b + (OUTPUT ? N * size_c : 0));
  }
};

// The pieces of 16 bytes of a chunk of x, B or C that a thread copies and, later, reads back and converts: those from its
// own number on, in steps of the block.
template <int Threads, int Rows, int Columns>
struct Stream {
  const unsigned char* from;  // of the first token of the next chunk
  long long step;             // bytes from token to token
  unsigned char* raw;
  int type;

  template <int Size, class F>  // of an element
  __device__ __forceinline__ void each_piece(F f) const {
    constexpr int kPieces = Columns * Size / 16, kTotal = Rows * kPieces, kAtOnce = kTotal / Threads < 4 ? 1 + kTotal / Threads : 4;
#pragma unroll kAtOnce
    for (int i = 0; i < kTotal; i += Threads) {
      const int at = i + threadIdx.x;
      if (kTotal % Threads == 0 || at < kTotal) f(at, at / kPieces, at % kPieces);
    }
  }

  template <class F>
  __device__ __forceinline__ void each_piece(F f) const {
    if (type == QUAMBA_I8)
      each_piece<1>(f);
    else
      each_piece<2>(f);
  }

  __device__ __forceinline__ void fetch(int left) {
    each_piece([&](int at, int row, int piece) {
      copy_async(raw + 16 * at, from + row * step * (row < left) + 16 * piece, row < left);
    });
    from += Rows * step;
  }

  // The largest |element| that this thread has copied, of bf16.
  __device__ __forceinline__ float largest() const {
    __nv_bfloat162 most = __float2bfloat162_rn(0.f);
    each_piece<2>([&](int at, int, int) {
      const uint4 v = *reinterpret_cast<const uint4*>(raw + 16 * at);
      for (uint32_t word : {v.x, v.y, v.z, v.w}) most = __hmax2(most, __habs2(reinterpret_cast<__nv_bfloat162&>(word)));
    });
    return fmaxf(__low2float(most), __high2float(most));
  }

  __device__ __forceinline__ void convert(unsigned char* operand, float factor) const {
    if (type == QUAMBA_I8) {
      each_piece<1>([&](int at, int row, int piece) {
        const uint4 v = *reinterpret_cast<const uint4*>(raw + 16 * at);
        const uint2 one = codes_to_halves(v.x), two = codes_to_halves(v.y);
        const uint2 three = codes_to_halves(v.z), four = codes_to_halves(v.w);
        const uint4 low = make_uint4(one.x, one.y, two.x, two.y), high = make_uint4(three.x, three.y, four.x, four.y);
        const bool turn = piece & 4;  // so that pieces four apart do not meet in a bank
        *reinterpret_cast<uint4*>(operand + place_in<Rows>(row, piece, turn)) = turn ? high : low;
        *reinterpret_cast<uint4*>(operand + place_in<Rows>(row, piece, !turn)) = turn ? low : high;
      });
    } else if (type == QUAMBA_F16) {
      each_piece<2>([&](int at, int row, int piece) {
        *reinterpret_cast<uint4*>(operand + place_in<Rows>(row, piece / 2, piece % 2)) =
            *reinterpret_cast<const uint4*>(raw + 16 * at);
      });
    } else {
      each_piece<2>([&](int at, int row, int piece) {
        const uint4 v = *reinterpret_cast<const uint4*>(raw + 16 * at);
        *reinterpret_cast<uint4*>(operand + place_in<Rows>(row, piece / 2, piece % 2)) =
            make_uint4(brains_to_halves(v.x, factor), brains_to_halves(v.y, factor), brains_to_halves(v.z, factor),
                       brains_to_halves(v.w, factor));
      });
    }
  }
};

__device__ __forceinline__ float load_float(const void* data, int type, long long at) {
  if (type == QUAMBA_F32) return __ldcg(static_cast<const float*>(data) + at);
  const unsigned short v = __ldcg(static_cast<const unsigned short*>(data) + at);
  return type == QUAMBA_F16 ? __half2float(reinterpret_cast<const __half&>(v)) : __uint_as_float(v << 16);
}

template <int N, int P, bool OUTPUT>
__global__ void __launch_bounds__(Layout<N, P, OUTPUT>::kThreads, SSD_BLOCKS)
    ssd_scan(const __grid_constant__ Params p) {
  using At = Layout<N, P, OUTPUT>;
  constexpr int kTokens = At::kTokens, kWarps = At::kWarps, kThreads = At::kThreads;
  constexpr int kBlocks = kTokens / 16;  // of tokens
  using Multiply = Products<kTokens, N, kWarps>;
  extern __shared__ __align__(1024) unsigned char shared[];
  float* vectors = reinterpret_cast<float*>(shared + At::kVectors);
  const QuambaSsdScan& a = p.a;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, quad = lane / 4, pair = 2 * (lane % 4);
  launch_dependents();
  wait_for_previous_kernel();

  const int count = OUTPUT ? p.cuts : p.cuts - 1;
  const int head = blockIdx.x % a.H, segment = blockIdx.x / a.H % count, sequence = blockIdx.x / a.H / count;
  const int group = head / (a.H / a.G);
  long long begin = 0, end = a.T, batch = sequence;
  if (a.cu_seqlens) {
    batch = 0;
    begin = min(max(static_cast<long long>(__ldg(a.cu_seqlens + sequence)), 0LL), a.T);
    end = max(min(static_cast<long long>(__ldg(a.cu_seqlens + sequence + 1)), a.T), begin);
  }
  const long long chunks = (end - begin + kTokens - 1) / kTokens, size = (chunks + p.cuts - 1) / p.cuts * kTokens;
  const long long first = begin + segment * size, stop = min(first + size, end);

  auto bytes = [](const void* data, int type, long long at) {
    return static_cast<const unsigned char*>(data) + at * size_of(type);
  };
  unsigned char* raw = shared + At::kRaw;
  Stream<kThreads, kTokens, N> B{bytes(a.b, a.b_dtype, batch * a.b_batch + first * a.b_token + group * a.b_group),
                                 a.b_token * size_of(a.b_dtype), raw, a.b_dtype};
  raw += kTokens * N * size_of(a.b_dtype);
  Stream<kThreads, kTokens, P> X{bytes(a.x, a.x_dtype, batch * a.x_batch + first * a.x_token + head * a.x_head),
                                 a.x_token * size_of(a.x_dtype), raw, a.x_dtype};
  raw += kTokens * P * size_of(a.x_dtype);
  Stream<kThreads, kTokens, N> C{bytes(a.c, a.c_dtype, batch * a.c_batch + first * a.c_token + group * a.c_group),
                                 a.c_token * size_of(a.c_dtype), raw, a.c_dtype};
  auto fetch = [&](long long t) {
    const int left = static_cast<int>(min(stop - t, static_cast<long long>(kTokens)));
    if (left <= 0) return;
    B.fetch(left);
    X.fetch(left);
    if constexpr (OUTPUT) C.fetch(left);
  };
  const bool measured = a.x_dtype == QUAMBA_BF16 || a.b_dtype == QUAMBA_BF16 || (OUTPUT && a.c_dtype == QUAMBA_BF16);
  auto measure = [&] {  // the largest of what this warp has copied, of each input of bf16
    const float most[3] = {a.x_dtype == QUAMBA_BF16 ? X.largest() : 0.f, a.b_dtype == QUAMBA_BF16 ? B.largest() : 0.f,
                           OUTPUT && a.c_dtype == QUAMBA_BF16 ? C.largest() : 0.f};
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      const unsigned v = __reduce_max_sync(~0u, __float_as_uint(most[i]));
      if (lane == 0) vectors[At::kLargest + i * kWarps + warp] = __uint_as_float(v);
    }
  };
  auto exponent = [&](int which, int type) {  // of the factor that brings an input into the range of fp16
    if (type != QUAMBA_BF16) return 0;
    float most = 0.f;
    for (int i = 0; i < kWarps; ++i) most = fmaxf(most, vectors[At::kLargest + which * kWarps + i]);
    return max(exponent_of(most, -127) - 14, kLeastInput);
  };

  // dt of a chunk, by the first warp: kTokens / 32 tokens a lane
  constexpr int kEach = kTokens / 32;
  const float rate = kLog2e * __ldg(a.A + head), bias = a.dt_bias ? load_float(a.dt_bias, a.dt_bias_dtype, head) : 0.f;
  float steps[kEach];
  auto fetch_steps = [&](long long t) {
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      const long long at = t + lane * kEach + e;
      steps[e] = at < stop ? load_float(a.dt, a.dt_dtype, batch * a.dt_batch + at * a.dt_token + head) : 0.f;
    }
  };
  auto spread_steps = [&](long long t, int buffer) {
    float decay[kEach], sum = 0.f;
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      // beyond the last token dt = 0 leaves the state alone
      const float dt = fminf(fmaxf(softplus(steps[e] + bias), a.lowest), a.highest);
      steps[e] = t + lane * kEach + e < stop ? dt : 0.f;
      decay[e] = sum = __fmaf_rn(steps[e], rate, sum);
    }
    float before = sum, after = sum;  // both from their own end, so that neither is a difference of long sums
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const float v = __shfl_up_sync(~0u, before, step), w = __shfl_down_sync(~0u, after, step);
      if (lane >= step) before += v;
      if (lane < 32 - step) after += w;
    }
    const float total = __shfl_sync(~0u, before, 31);
    before = __shfl_up_sync(~0u, before, 1), after = __shfl_down_sync(~0u, after, 1);
    if (lane == 0) before = 0.f;
    if (lane == 31) after = 0.f;
    float most = 0.f, weight[kEach];
#pragma unroll
    for (int e = kEach - 1; e >= 0; --e) {
      decay[e] += before;
      weight[e] = steps[e] * exp2_approximate(after);
      after = __fmaf_rn(steps[e], rate, after);
      most = fmaxf(most, weight[e]);
    }
    const int unit =
        exponent_of(__uint_as_float(__reduce_max_sync(~0u, __float_as_uint(most))), kLeastStep) + 1;
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      const int at = buffer * kTokens + lane * kEach + e;
      vectors[At::kDecay + at] = decay[e];
      vectors[At::kReach + at] = decay[e] - log2_approximate(steps[e]);
      vectors[At::kWeight + at] = weight[e] * power_of_two(-unit);
    }
    if (lane == 0) vectors[At::kEnd + 2 * buffer] = total, vectors[At::kEnd + 2 * buffer + 1] = static_cast<float>(unit);
  };

  fetch(first);
  copy_async_commit();
  if (warp == 0) fetch_steps(first);

  // The state of rows quad and quad + 8 of the warp's 16, in codes: to be multiplied by own[] and 2^unit.
  const int channel = warp * 16 + quad;
  const float b_scale = a.b_scale ? __ldg(a.b_scale + group) : 1.f, c_scale = a.c_scale ? __ldg(a.c_scale + group) : 1.f;
  float own[2], skip[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float x_scale = a.x_scale ? __ldg(a.x_scale + head * P + channel + 8 * r) : 1.f;
    own[r] = fabsf(x_scale * b_scale) < 1e-30f ? 1e-30f : x_scale * b_scale;  // it divides a state
    skip[r] = OUTPUT ? x_scale * load_float(a.D, a.D_dtype, head) : 0.f;
  }
  float h[N / 2];
  float unit = 0.f, kept = 0.f;  // log2
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
    for (int i = 0; i < segment; ++i) {
      const long long from = owner * (p.cuts - 1) + i;
      const float factor = exp2_approximate(__ldcg(p.left + from));
#pragma unroll
      for (int j = 0; j < N / 8; ++j) {
        const float4 v = __ldcg(reinterpret_cast<const float4*>(p.local) + (from * (N / 8) + j) * kThreads + threadIdx.x);
        h[4 * j] = __fmaf_rn(h[4 * j], factor, v.x), h[4 * j + 1] = __fmaf_rn(h[4 * j + 1], factor, v.y);
        h[4 * j + 2] = __fmaf_rn(h[4 * j + 2], factor, v.z), h[4 * j + 3] = __fmaf_rn(h[4 * j + 3], factor, v.w);
      }
    }
  }

  if constexpr (OUTPUT && Multiply::kGroups)  // above the diagonal M stays zero
    for (int i = threadIdx.x; i < kTokens * kPitch / 16; i += kThreads)
      reinterpret_cast<uint4*>(shared + At::kM)[i] = make_uint4(0, 0, 0, 0);
  const uint32_t base = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  copy_async_wait();
  if (measured) {
    measure();
    __syncthreads();
  }
  if (warp == 0) spread_steps(first, 0);
  int buffer = 0;
#pragma unroll 1
  for (long long t = first; t < stop; t += kTokens, buffer ^= 1) {
    const int ex = exponent(0, a.x_dtype), eb = exponent(1, a.b_dtype), ec = OUTPUT ? exponent(2, a.c_dtype) : 0;
    B.convert(shared + At::kB, power_of_two(-eb));
    X.convert(shared + At::kX, power_of_two(-ex));
    if constexpr (OUTPUT) C.convert(shared + At::kC, power_of_two(-ec));
    publish();
    __syncthreads();
    fetch(t + kTokens);
    copy_async_commit();
    if (warp == 0) fetch_steps(t + kTokens);

    float y[8 * kBlocks];
    float back[2];  // to what h as an operand is scaled
    if constexpr (OUTPUT) {
      // M[q][s] = C[q] B[s] exp(decay from s to q) dt[s], from its products, of a block of 16 rows
      const float* decay = vectors + At::kDecay + buffer * kTokens;
      const float* reach = vectors + At::kReach + buffer * kTokens;
      auto decayed = [&](float(&m)[8 * kBlocks], int block) {
        const int row = 16 * block + quad;
        const float from[2] = {decay[row], decay[row + 8]};
        float most[2] = {0.f, 0.f};
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
            m[4 * j + 2 * r] = low, m[4 * j + 2 * r + 1] = high;
            most[r] = fmaxf(most[r], fmaxf(fabsf(low), fabsf(high)));
          }
        }
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int e = exponent_of(row_max(most[r]), kLeastRow) - 14;
          const float factor = power_of_two(-e);
#pragma unroll
          for (int j = 0; j < 2 * kBlocks; ++j)
            if (j / 2 <= block)
              *reinterpret_cast<uint32_t*>(shared + At::kM + place<kTokens>(row + 8 * r, 8 * j + pair)) =
                  pack_f16(m[4 * j + 2 * r] * factor, m[4 * j + 2 * r + 1] * factor);
          if (lane % 4 == 0) {
            vectors[At::kCarried + row + 8 * r] = exp2_approximate(from[r] - static_cast<float>(e + eb + ex));
            vectors[At::kRow + row + 8 * r] = power_of_two(e + eb + ex + ec);
          }
        }
      };
      constexpr bool kBegun = Multiply::kGroups && kTokens == 64;  // the product of the mix runs while h is made ready
      float m[8 * kBlocks];
      if constexpr (kBegun) Multiply::mix(m, base + At::kC, base + At::kB, warp % 4);

      uint32_t left[N / 16][4];
      float most[2] = {0.f, 0.f}, factor[2];
#pragma unroll
      for (int i = 0; i < N / 2; ++i) most[i / 2 % 2] = fmaxf(most[i / 2 % 2], fabsf(h[i]));
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int e = exponent_of(row_max(most[r]), -100) - 14;
        factor[r] = power_of_two(-e), back[r] = exp2_approximate(unit + static_cast<float>(e));
      }
#pragma unroll
      for (int i = 0; i < N / 4; ++i) left[i / 4][i % 4] = pack_f16(h[2 * i] * factor[i % 2], h[2 * i + 1] * factor[i % 2]);

      if constexpr (kBegun) {
        Multiply::template wait<0>(m);
        if (warp < 4) decayed(m, warp);
      } else {
        for (int block = warp; block < kBlocks; block += kWarps) {
          Multiply::mix(m, base + At::kC, base + At::kB, block);
          decayed(m, block);
        }
      }
      publish();
      Multiply::carry(y, left, base + At::kC);
      if (warp == 0) spread_steps(t + kTokens, buffer ^ 1);
      Multiply::template wait<0>(y);
      __syncthreads();
#pragma unroll
      for (int j = 0; j < 2 * kBlocks; ++j) {
        const float2 carried = *reinterpret_cast<const float2*>(vectors + At::kCarried + 8 * j + pair);
#pragma unroll
        for (int r = 0; r < 2; ++r) y[4 * j + 2 * r] *= back[r] * carried.x, y[4 * j + 2 * r + 1] *= back[r] * carried.y;
      }
    } else if (warp == 0) {
      spread_steps(t + kTokens, buffer ^ 1);
    }

    uint32_t x[kBlocks][4];
#pragma unroll
    for (int s = 0; s < kBlocks; ++s) left_across<kTokens>(x[s], base + At::kX, 16 * s, warp);
    if constexpr (OUTPUT) Multiply::apply(y, x, base + At::kM);

    // h <- exp(decay of the chunk) h + x^T (weights) B
    int top = 7;  // |x| < 2^top in this warp
    if (a.x_dtype != QUAMBA_I8) {
      __half2 most = __float2half2_rn(0.f);
#pragma unroll
      for (int i = 0; i < 4 * kBlocks; ++i) most = __hmax2(most, __habs2(reinterpret_cast<__half2&>(x[i / 4][i % 4])));
      const float largest = fmaxf(__low2float(most), __high2float(most));
      top = exponent_of(__uint_as_float(__reduce_max_sync(~0u, __float_as_uint(largest))), kLeastInput) + 1;
    }
    const float total = vectors[At::kEnd + 2 * buffer];
    const float next = vectors[At::kEnd + 2 * buffer + 1] + static_cast<float>(ex + eb + top);
    const float stays = exp2_approximate(total + unit - next), shrink = power_of_two(-top);
    unit = next, kept += total;
    uint32_t high[kBlocks][4], low[kBlocks][4];
#pragma unroll
    for (int s = 0; s < kBlocks; ++s)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float2 weight = *reinterpret_cast<const float2*>(vectors + At::kWeight + buffer * kTokens + 16 * s + 8 * half + pair);
        weight.x *= shrink, weight.y *= shrink;
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          const float2 v = unpack_f16(x[s][i]);
          const float one = v.x * weight.x, two = v.y * weight.y;
          high[s][i] = pack_f16(one, two);
          const float2 taken = unpack_f16(high[s][i]);
          low[s][i] = pack_f16(one - taken.x, two - taken.y);
        }
      }
#pragma unroll
    for (int i = 0; i < N / 2; ++i) h[i] *= stays;
    if constexpr (OUTPUT) Multiply::template wait<0>(y);
    Multiply::update(h, high, low, base + At::kB);

    if constexpr (OUTPUT) {  // y^T turned, over the warp's own x, and out
      const float all[2] = {own[0] * c_scale, own[1] * c_scale};
      const float direct[2] = {skip[0] * power_of_two(ex), skip[1] * power_of_two(ex)};
      __syncwarp();
#pragma unroll
      for (int j = 0; j < 2 * kBlocks; ++j) {
        const float2 row = *reinterpret_cast<const float2*>(vectors + At::kRow + 8 * j + pair);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const float2 v = unpack_f16(x[j / 2][j % 2 * 2 + r]);
          const float one = __fmaf_rn(y[4 * j + 2 * r] * row.x, all[r], v.x * direct[r]);
          const float two = __fmaf_rn(y[4 * j + 2 * r + 1] * row.y, all[r], v.y * direct[r]);
          const uint32_t packed = a.y_dtype == QUAMBA_F16 ? pack_f16(one, two) : pack_bf16(one, two);
          *reinterpret_cast<uint32_t*>(shared + At::kX + place<kTokens>(8 * j + quad, 16 * warp + 8 * r + pair)) =
              turned(packed);
        }
      }
      __syncwarp();
      unsigned short* out = static_cast<unsigned short*>(a.y);
#pragma unroll
      for (int i = 0; i < kBlocks; ++i) {
        const int row = 16 * i + lane / 2, column = 16 * warp + lane % 2 * 8;
        if (t + row < stop)
          *reinterpret_cast<uint4*>(out + ((batch * a.T + t + row) * a.H + head) * P + column) =
              *reinterpret_cast<const uint4*>(shared + At::kX + place<kTokens>(row, column));
      }
    }
    Multiply::template wait<0>(h);
    copy_async_wait();
    if (measured) measure();
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
  }
}

int launch_32(const Params& p, bool output, void* stream);   // N of 16 and 32
int launch_64(const Params& p, bool output, void* stream);
int launch_128(const Params& p, bool output, void* stream);
int launch_256(const Params& p, bool output, void* stream);

template <int N, int P, bool OUTPUT>
int launch_as(const Params& p, void* stream) {
  using At = Layout<N, P, OUTPUT>;
  const QuambaSsdScan& a = p.a;
  const long long grid = static_cast<long long>(a.H) * a.sequences * (OUTPUT ? p.cuts : p.cuts - 1);
  if (grid > 0x7fffffffLL) return QUAMBA_UNSUPPORTED;
  const int shared = At::kRaw + At::raw(size_of(a.x_dtype), size_of(a.b_dtype), size_of(a.c_dtype));
  cudaError_t error =
      cudaFuncSetAttribute(ssd_scan<N, P, OUTPUT>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (error != cudaSuccess) return error;
  return launch(ssd_scan<N, P, OUTPUT>, p, dim3(static_cast<unsigned>(grid)), At::kThreads, stream, shared);
}

template <int N, int P>
int launch_as(const Params& p, bool output, void* stream) {
  return output ? launch_as<N, P, true>(p, stream) : launch_as<N, P, false>(p, stream);
}

template <int N>
int launch_states(const Params& p, bool output, void* stream) {
  switch (p.a.P) {
    case 16: return launch_as<N, 16>(p, output, stream);
    case 32: return launch_as<N, 32>(p, output, stream);
    case 64: return launch_as<N, 64>(p, output, stream);
    case 128: return launch_as<N, 128>(p, output, stream);
    default: return QUAMBA_UNSUPPORTED;
  }
}

}  // namespace quamba::ssd
