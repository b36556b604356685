// The recurrence of Mamba2 over the int8 states of many sequences, from what ssd_inputs.cu made of the projection.
//
// The state of a batch is one run of rows of N, in which B and C change with every group. A block takes its share of the
// run, without regard to groups: LANES threads hold a row, 16 bytes each, and walk down with a ring of copies in flight, in
// shared memory, that never drains; what belongs to rows comes there a tile ahead. Two rows at a time, because their sums and
// maxima over the lanes, and what belongs to a row, then cost half: each half of the lanes ends with one of them.
//
// Budget, N = 128: 2 bytes of traffic an element, so 3 TB/s leave 19 instructions each on an H100. Unpacking takes 2.3,
// the recurrence 2 (all fp32), y 0.3 (it is linear in the codes, so dp4a with those of C), the maximum 1, rounding 2 and
// dither 2, packing 0.8: 10.3, and the rest of a row 3.
#include <algorithm>
#include <cstddef>
#include <cstdlib>

#include "conv_quad.cuh"
#include "decode_launch.cuh"
#include "ssd_stream.h"

namespace quamba::decode {

constexpr int kStreamThreads = 256, kStreamBlocks = 2, kCount = 16, kTile = 256;
constexpr int kDeepest = 4;  // pairs of passes on their way
constexpr int kShare = 640;  // rows of a block: in one wave of larger shares a sixth of the time was its tail
constexpr int kLeast = 256;  // rows a multiprocessor from which on the launch of ssd_inputs pays

struct StreamParams {
  QuambaDecode q;
  SsdTerms terms;
  int share, total, group_rows;  // rows of a block, of the batch, of a group
};

struct __align__(16) TileTerms {
  float4 heads[kTile];
  float2 rows[kTile];
  float scales[kTile];
  unsigned draws[kTile];
};

// Totals over LANES lanes of two rows at once: the lower half of the lanes leaves with that of `a`, the upper with b's.
template <int LANES, class F>
__device__ __forceinline__ float fold(float a, float b, bool upper, F combine) {
  float v = combine(upper ? b : a, __shfl_xor_sync(~0u, upper ? a : b, LANES / 2));
#pragma unroll
  for (int step = LANES / 4; step; step /= 2) v = combine(v, __shfl_xor_sync(~0u, v, step));
  return v;
}

template <int N>
__global__ void __launch_bounds__(kStreamThreads, kStreamBlocks) ssd_stream(const __grid_constant__ StreamParams p) {
  constexpr int kLanes = N / kCount, kPass = kStreamThreads / kLanes, kPair = 2 * kPass;
  constexpr int kDepth = kTile / kPair < kDeepest ? kTile / kPair : kDeepest;  // pairs of passes on their way
  static_assert(kTile % kPair == 0 && kLanes >= 4, "a tile is whole pairs of passes");
  __shared__ __align__(16) char tiles[2 * sizeof(TileTerms)];
  __shared__ uint4 ring[2 * kDepth][kStreamThreads];
  const QuambaDecode& q = p.q;
  launch_dependents();

  const int begin = blockIdx.x * p.share, rows = min(p.share, p.total - begin), row = threadIdx.x;
  const int own = threadIdx.x / kLanes, column = threadIdx.x % kLanes * kCount;
  const bool upper = threadIdx.x % kLanes >= kLanes / 2;
  int8_t* state = static_cast<int8_t*>(q.state) + static_cast<long long>(begin + own) * N + column;
  // of two rows, a lane reports that of its half
  const int after = upper ? kPass : 0;
  const bool reports = threadIdx.x % (kLanes / 2) == 0;
  float* scale_out = q.state_scale + begin + own + after;
  float* u_out = static_cast<float*>(q.workspace) + begin + own + after;
  for (int at = own; at < min(rows, kDepth * kPair); at += kPass)
    if (column % 32 == 0) prefetch_l2(state + (at - own) * N);

  wait_for_previous_kernel();
  const bool noisy = q.rng;
  const unsigned key = noisy ? dither_key(q.rng) : 0;
  const auto stage = [&](int tile) {
    const int at = tile * kTile + row;
    if (at >= rows) return;
    TileTerms& t = reinterpret_cast<TileTerms*>(tiles)[tile % 2];
    const int index = begin + at;
    copy_async(&t.heads[row], p.terms.heads + index / q.P, true);
    if (row % 2 == 0) copy_async(&t.rows[row], p.terms.rows + index, true);
    if (row % 4 == 0) copy_async(&t.scales[row], q.state_scale + index, true);
    t.draws[row] = noisy ? row_draw(key, static_cast<unsigned>(index)) : 0;
  };
  // A lane's piece of pass `pass` from the pointer on, of which `left` rows from its own on are there. The lane itself reads
  // it back.
  const auto fetch_pass = [&](uint4* place, int pass, int left) {
    if (pass * kPass < left) copy_async(place, state + pass * kPass * N, true);
  };
  stage(0);
#pragma unroll
  for (int u = 0; u < kDepth; ++u) {
    fetch_pass(&ring[2 * u][row], 2 * u, rows - own);
    fetch_pass(&ring[2 * u + 1][row], 2 * u + 1, rows - own);
    copy_async_commit();
  }
  unsigned dither[kCount], C[kCount / 4];
  float B[kCount], C_unit = 1.f, both = 0.f;  // both: of B and C
#pragma unroll
  for (int i = 0; i < kCount; ++i) dither[i] = noisy ? column_draw(key, static_cast<unsigned>(p.total) + column + i) : 0;
  int boundary = 0, slot = 0;  // rows from the boundary on have other B and C
  unsigned heads = 0, pairs = 0, words = 0;  // places of the lane's row in the tile

#pragma unroll 1
  for (int from = 0; from < rows; from += kPair) {
    copy_async_wait_but<kDepth - 1>();
    if (from % kTile == 0) {
      __syncthreads();  // this tile is there, and the one before has been read
      const int tile = from / kTile;
      stage(tile + 1);
      heads = tile % 2 * sizeof(TileTerms) + own * sizeof(float4);
      pairs = tile % 2 * sizeof(TileTerms) + own * sizeof(float2);
      words = tile % 2 * sizeof(TileTerms) + own * sizeof(float);
    }
    if (from >= boundary) {
      const int index = (begin + from) / p.group_rows;
      boundary = (index + 1) * p.group_rows - begin;
      const float4* const bs = reinterpret_cast<const float4*>(p.terms.B + static_cast<long long>(index) * N + column);
      const uint4 cs = __ldcg(reinterpret_cast<const uint4*>(p.terms.C + static_cast<long long>(index) * N + column));
      C_unit = constant(q.C_scale, q.C_count > 1 ? index % q.G : 0, 1.f);
      C[0] = cs.x, C[1] = cs.y, C[2] = cs.z, C[3] = cs.w;
      both = 0.f;
#pragma unroll
      for (int i = 0; i < kCount / 4; ++i) {
        const float4 b = __ldcg(bs + i);
        B[4 * i] = b.x, B[4 * i + 1] = b.y, B[4 * i + 2] = b.z, B[4 * i + 3] = b.w;
#pragma unroll
        for (int j = 0; j < 4; ++j) both = fmaf(B[4 * i + j], to_float(C[i] >> 8 * j, QUAMBA_I8), both);
      }
    }
    const auto head_of = [&](int pass) {
      return reinterpret_cast<const float4*>(tiles + heads + pass * kPass * sizeof(float4));
    };
    const auto terms_of = [&](int pass) {
      return reinterpret_cast<const float2*>(tiles + offsetof(TileTerms, rows) + pairs + pass * kPass * sizeof(float2));
    };
    const auto word_of = [&](int member, int pass) {
      return reinterpret_cast<const unsigned*>(tiles + member + words + pass * kPass * sizeof(float));
    };
    const int left = rows - from - own;
    uint4* const place = &ring[slot][row];
    float h[2][kCount], y[2], peak[2];
    unsigned draws[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const uint4 held = place[r * kStreamThreads];
      const float2 rates = *reinterpret_cast<const float2*>(head_of(r));
      const float decay = rates.x * *reinterpret_cast<const float*>(word_of(offsetof(TileTerms, scales), r));
      const float input = __fmul_rn(rates.y, terms_of(r)->x);
      draws[r] = *word_of(offsetof(TileTerms, draws), r);
      int dot = __dp4a(static_cast<int>(held.x), static_cast<int>(C[0]), 0);
      dot = __dp4a(static_cast<int>(held.y), static_cast<int>(C[1]), dot);
      dot = __dp4a(static_cast<int>(held.z), static_cast<int>(C[2]), dot);
      dot = __dp4a(static_cast<int>(held.w), static_cast<int>(C[3]), dot);
      y[r] = fmaf(decay, static_cast<float>(dot), input * both);
      const unsigned codes[4] = {held.x ^ kFlip, held.y ^ kFlip, held.z ^ kFlip, held.w ^ kFlip};
      unpack(codes, h[r]);
      float peaks[2] = {0.f, 0.f};
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        h[r][i] = fmaf(decay, h[r][i], input * B[i]);
        peaks[i % 2] = fmaxf(peaks[i % 2], fabsf(h[r][i]));
      }
      peak[r] = fmaxf(peaks[0], peaks[1]);
    }
    fetch_pass(place, 2 * kDepth, left);
    fetch_pass(place + kStreamThreads, 2 * kDepth + 1, left);
    copy_async_commit();
    slot = slot + 2 == 2 * kDepth ? 0 : slot + 2;
    const float most = fold<kLanes>(peak[0], peak[1], upper, [](float a, float b) { return fmaxf(a, b); });
    const float total = fold<kLanes>(y[0], y[1], upper, [](float a, float b) { return a + b; });
    const float mine = inverse_of(most, noisy), other = __shfl_xor_sync(~0u, mine, kLanes / 2);
    const float inverse[2] = {upper ? other : mine, upper ? mine : other};
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      Stored<int8_t, kCount> stored;
      round_row(h[r], inverse[r], noisy, draws[r], dither, stored);
      if (r * kPass < left) stored.store(state + r * kPass * N);
    }
    if (reports && after < left) {
      const float2 term = terms_of(0)[after];
      *scale_out = scale_of(most);
      *u_out = fmaf(total, C_unit, __fmul_rn(term.x, head_of(0)[after].z)) * term.y;
    }
    state += kPair * N, scale_out += kPair, u_out += kPair;
    heads += kPair * sizeof(float4), pairs += kPair * sizeof(float2), words += kPair * sizeof(float);
  }
}

bool can_stream(const QuambaDecode& q, int sms) {
  if (q.state_type != QUAMBA_I8 || !has_quads(q) || !q.C_scale || (q.N != 64 && q.N != 128 && q.N != 256)) return false;
  const auto aligned = [](const void* p, int bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; };
  const int two_passes = 2 * kStreamThreads * kCount / q.N, total = q.batch * q.H * q.P;
  return aligned(q.z, 8) && aligned(q.B, 8) && aligned(q.C, 8) && aligned(q.x_scale, 16) &&
         aligned(q.z_scale, 16) && aligned(q.state_scale, 16) &&
         q.z_stride % 4 == 0 && q.bc_stride % 4 == 0 && q.P % 4 == 0 && q.H / q.G * q.P % two_passes == 0 &&
         q.workspace_bytes >= ssd_terms(q).bytes && total >= kLeast * sms;
}

template <int N>
cudaError_t launch_share(const QuambaDecode& q, const SsdTerms& terms, int sms, void* stream) {
  constexpr int kStep = 2 * kStreamThreads * kCount / N;
  const int total = q.batch * q.H * q.P, slots = kStreamBlocks * sms;
  // whole waves: every block the same share of the rows, about kShare, in pairs of passes
  int waves = std::max(1, (total + slots * (kShare / 2)) / (slots * kShare));
#ifdef QUAMBA_TUNE
  if (const char* text = std::getenv("QUAMBA_DECODE_WAVES")) waves = std::atoi(text);
#endif
  const int blocks = waves * slots, share = ((total + blocks - 1) / blocks + kStep - 1) / kStep * kStep;
  const StreamParams params{q, terms, share, total, q.H / q.G * q.P};
  return launch(ssd_stream<N>, params, dim3((total + share - 1) / share), kStreamThreads, 0, stream);
}

int launch_stream(const QuambaDecode& q, int sms, void* stream) {
  const SsdTerms terms = ssd_terms(q);
  const cudaError_t error = launch_inputs(q, terms, stream);
  if (error != cudaSuccess) return error;
  if (q.N == 64) return launch_share<64>(q, terms, sms, stream);
  if (q.N == 128) return launch_share<128>(q, terms, sms, stream);
  return launch_share<256>(q, terms, sms, stream);
}

}  // namespace quamba::decode
