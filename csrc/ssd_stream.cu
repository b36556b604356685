// The recurrence of Mamba2 over the int8 states of many sequences, from what ssd_inputs.cu made of the projection.
//
// The state of a batch is one run of rows of N, in which B and C change with every group. It is cut into tiles; a block,
// one of a single wave, takes one after the other from a counter, because equal shares took a sixth longer on some
// multiprocessors than on others. LANES threads hold a row, 16 bytes each, and walk down the tile, while the one that
// comes next is copied to where they have been, in a ring in shared memory that never drains. Two rows at a time, because
// their sums and maxima over the lanes, and what belongs to a row, then cost half: each half of the lanes ends with one of
// them.
//
// Budget, N = 128: 2 bytes of traffic an element, so 3 TB/s leave 19 instructions each on an H100. Unpacking takes 2.3,
// the recurrence 2 (all fp32), y 0.3 (it is linear in the codes, so dp4a with those of C), the maximum 1, rounding 2 and
// dither 2, packing 0.8: 10.3, and the rest of a row 3.
#include "conv_quad.cuh"
#include "decode_launch.cuh"
#include "ssd_stream.h"

namespace quamba::decode {

constexpr int kStreamThreads = 256, kStreamBlocks = 3, kCount = 16;
constexpr int kLeast = 256;  // rows a multiprocessor from which on the launch of ssd_inputs pays

struct StreamParams {
  QuambaDecode q;
  SsdTerms terms;
  int tiles, total, group_rows;  // rows of the batch, of a group
};

template <int N>
struct StreamConfig {
  static constexpr int kLanes = N / kCount, kPass = kStreamThreads / kLanes, kPair = 2 * kPass;
  static constexpr int kDepth = kPair > 64 ? 2 : 4;  // pairs of passes on their way
  static constexpr int kTile = kDepth * kPair;
  static_assert(kTile <= kStreamThreads && kLanes >= 4, "a thread brings a row's terms");
};

// Where a column lies in shared memory: the lanes of a row read four of theirs at a time, from neighbouring places.
template <int N>
__device__ __forceinline__ int spread(int column) {
  return column % kCount / 4 * 4 * StreamConfig<N>::kLanes + column / kCount * 4 + column % 4;
}

template <int N>
struct __align__(16) TileTerms {
  static constexpr int kTile = StreamConfig<N>::kTile;
  float4 heads[kTile];
  float2 rows[kTile];
  float scales[kTile];
  unsigned draws[kTile];
  float B[N];
  signed char C[N];
};

template <int N>
struct StreamShared {
  TileTerms<N> tiles[2];
  uint4 ring[2 * StreamConfig<N>::kDepth][kStreamThreads];
  unsigned columns[N];  // draws of the dither
  int upcoming[2];
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
  using Config = StreamConfig<N>;
  constexpr int kLanes = Config::kLanes, kPass = Config::kPass, kPair = Config::kPair, kDepth = Config::kDepth;
  constexpr int kTile = Config::kTile;
  extern __shared__ __align__(16) char memory[];
  auto& shared = *reinterpret_cast<StreamShared<N>*>(memory);
  const QuambaDecode& q = p.q;
  launch_dependents();

  const int row = threadIdx.x, own = threadIdx.x / kLanes, column = threadIdx.x % kLanes * kCount;
  const bool upper = threadIdx.x % kLanes >= kLanes / 2;
  // of two rows, a lane reports that of its half
  const int after = upper ? kPass : 0;
  const bool reports = threadIdx.x % (kLanes / 2) == 0;
  int8_t* const states = static_cast<int8_t*>(q.state) + own * N + column;
  int tile = blockIdx.x;
  for (int u = 0; u < 2 * kDepth; ++u)
    if (column % 32 == 0) prefetch_l2(states + (static_cast<long long>(tile) * kTile + u * kPass) * N);

  wait_for_previous_kernel();
  const bool noisy = q.rng;
  const unsigned key = noisy ? dither_key(q.rng) : 0;
  int grabbed = 0;
  if (threadIdx.x == 0) shared.upcoming[0] = gridDim.x + atomicAdd(p.terms.next, 1);
  const auto stage = [&](int tile, TileTerms<N>& t) {
    const int first = tile * kTile, index = first + row;
    if (row < kTile) {
      copy_async(&t.heads[row], p.terms.heads + index / q.P, true);
      if (row % 2 == 0) copy_async(&t.rows[row], p.terms.rows + index, true);
      if (row % 4 == 0) copy_async(&t.scales[row], q.state_scale + index, true);
      t.draws[row] = noisy ? draw(key, static_cast<unsigned>(index)) : 0;
    }
    const long long columns = static_cast<long long>(first / p.group_rows) * N;
    if (row < N / 4) copy_async(t.B + spread<N>(4 * row), p.terms.B + columns + 4 * row, true);
    if (row < N / 16) copy_async(t.C + 16 * row, p.terms.C + columns + 16 * row, true);
  };
  // A lane's pieces of a pair of passes, which it reads back itself.
  const auto fetch_pair = [&](int pair, const int8_t* from) {
    copy_async(&shared.ring[2 * pair][row], from, true);
    copy_async(&shared.ring[2 * pair + 1][row], from + kPass * N, true);
  };
  stage(tile, shared.tiles[0]);
#pragma unroll
  for (int u = 0; u < kDepth; ++u) {
    fetch_pair(u, states + (static_cast<long long>(tile) * kTile + u * kPair) * N);
    copy_async_commit();
  }
  if (noisy && row < N) shared.columns[spread<N>(row)] = draw(key, static_cast<unsigned>(p.total) + row);

#pragma unroll 1
  for (int turn = 0; tile < p.tiles; turn ^= 1) {
    copy_async_wait_but<kDepth - 1>();
    __syncthreads();  // this tile is there, and the one before has been read
    const int next = shared.upcoming[turn];
    if (next < p.tiles) {
      stage(next, shared.tiles[turn ^ 1]);
      if (threadIdx.x == 0) grabbed = gridDim.x + atomicAdd(p.terms.next, 1);
    }
    const TileTerms<N>& terms = shared.tiles[turn];
    const uint4 C = *reinterpret_cast<const uint4*>(terms.C + column);
    float both = 0.f;  // of B and C
    {
      const unsigned words[4] = {C.x, C.y, C.z, C.w};
#pragma unroll
      for (int i = 0; i < kCount; ++i) both = fmaf(terms.B[spread<N>(column + i)], to_float(words[i / 4] >> i % 4 * 8, QUAMBA_I8), both);
    }
    const long long first = static_cast<long long>(tile) * kTile;
    int8_t* state = states + first * N;
    const int8_t* coming = states + static_cast<long long>(next) * kTile * N;
    uint4* place = &shared.ring[0][row];
    int at = own;  // the lane's first row, in the tile

#pragma unroll 1
    for (int pair = 0; pair < kDepth; ++pair) {
      if (pair) copy_async_wait_but<kDepth - 1>();
      float h[2][kCount], y[2], peak[2];
      unsigned draws[2];
      const float* B = terms.B + spread<N>(column);
      asm volatile("" : "+l"(B));  // read again for every pair: in registers there would be room for fewer warps
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const uint4 held = place[r * kStreamThreads];
        const float2 rates = *reinterpret_cast<const float2*>(&terms.heads[at + r * kPass]);
        const float decay = rates.x * terms.scales[at + r * kPass], input = __fmul_rn(rates.y, terms.rows[at + r * kPass].x);
        draws[r] = terms.draws[at + r * kPass];
        int dot = __dp4a(static_cast<int>(held.x), static_cast<int>(C.x), 0);
        dot = __dp4a(static_cast<int>(held.y), static_cast<int>(C.y), dot);
        dot = __dp4a(static_cast<int>(held.z), static_cast<int>(C.z), dot);
        dot = __dp4a(static_cast<int>(held.w), static_cast<int>(C.w), dot);
        y[r] = fmaf(decay, static_cast<float>(dot), input * both);
        const unsigned codes[4] = {held.x ^ kFlip, held.y ^ kFlip, held.z ^ kFlip, held.w ^ kFlip};
        unpack(codes, h[r]);
        float peaks[2] = {0.f, 0.f};
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          h[r][i] = fmaf(decay, h[r][i], input * B[i / 4 * 4 * kLanes + i % 4]);
          peaks[i % 2] = fmaxf(peaks[i % 2], fabsf(h[r][i]));
        }
        peak[r] = fmaxf(peaks[0], peaks[1]);
      }
      if (next < p.tiles) fetch_pair(pair, coming);
      copy_async_commit();
      const float most = fold<kLanes>(peak[0], peak[1], upper, [](float a, float b) { return fmaxf(a, b); });
      const float total = fold<kLanes>(y[0], y[1], upper, [](float a, float b) { return a + b; });
      const float one = inverse_of(most, noisy), other = __shfl_xor_sync(~0u, one, kLanes / 2);
      const float inverse[2] = {upper ? other : one, upper ? one : other};
      const unsigned* columns = shared.columns + spread<N>(column);
      asm volatile("" : "+l"(columns));
      unsigned dither[kCount];
#pragma unroll
      for (int i = 0; i < kCount; ++i) dither[i] = columns[i / 4 * 4 * kLanes + i % 4];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        Stored<int8_t, kCount> stored;
        round_row(h[r], inverse[r], noisy, draws[r], dither, stored);
        stored.store(state + r * kPass * N);
      }
      if (reports) {
        const int mine = at + after, index = tile * kTile + mine;
        const float2 term = terms.rows[mine], shares = *reinterpret_cast<const float2*>(&terms.heads[mine].z);  // D, C
        q.state_scale[index] = scale_of(most);
        static_cast<float*>(q.workspace)[index] = fmaf(total, shares.y, __fmul_rn(term.x, shares.x)) * term.y;
      }
      state += kPair * N, coming += kPair * N, at += kPair, place += 2 * kStreamThreads;
    }
    if (threadIdx.x == 0) shared.upcoming[turn ^ 1] = next < p.tiles ? grabbed : next;
    tile = next;
  }
}

bool can_stream(const QuambaDecode& q, int sms) {
  if (q.state_type != QUAMBA_I8 || !has_quads(q) || !q.C_scale || (q.N != 64 && q.N != 128 && q.N != 256)) return false;
  const auto aligned = [](const void* p, int bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; };
  const int tile = q.N == 64 ? StreamConfig<64>::kTile : q.N == 128 ? StreamConfig<128>::kTile : StreamConfig<256>::kTile;
  return aligned(q.z, 8) && aligned(q.B, 8) && aligned(q.C, 8) && aligned(q.x_scale, 16) && aligned(q.z_scale, 16) &&
         aligned(q.state_scale, 16) && q.z_stride % 4 == 0 && q.bc_stride % 4 == 0 && q.P % 4 == 0 &&
         q.H / q.G * q.P % tile == 0 && q.workspace_bytes >= ssd_terms(q).bytes && q.batch * q.H * q.P >= kLeast * sms;
}

template <int N>
cudaError_t launch_tiles(const QuambaDecode& q, const SsdTerms& terms, int sms, void* stream) {
  const int total = q.batch * q.H * q.P, tiles = total / StreamConfig<N>::kTile, slots = kStreamBlocks * sms;
  const StreamParams params{q, terms, tiles, total, q.H / q.G * q.P};
  return launch(ssd_stream<N>, params, dim3(tiles < slots ? tiles : slots), kStreamThreads, sizeof(StreamShared<N>),
                stream);
}

int launch_stream(const QuambaDecode& q, int sms, void* stream) {
  const SsdTerms terms = ssd_terms(q);
  const cudaError_t error = launch_inputs(q, terms, stream);
  if (error != cudaSuccess) return error;
  if (q.N == 64) return launch_tiles<64>(q, terms, sms, stream);
  if (q.N == 128) return launch_tiles<128>(q, terms, sms, stream);
  return launch_tiles<256>(q, terms, sms, stream);
}

}  // namespace quamba::decode
