// The recurrence of Mamba2 over the int8 states of many sequences, from what ssd_inputs.cu made of the projection.
//
// The state of a batch is one run of rows of N, in which B and C change with every group. A warp takes tiles of 32
// rows by itself, without a barrier of the block; all warps sweep the run together, for the memory's pages. A tile
// comes to shared memory by bulk copies of the copy engine, which cost one thread one instruction (elsewhere by
// cp.async), while the one before it is worked on. What belongs to a row is made by the lane of its number, before its
// tile and after it; in between, LANES lanes hold a row, 16 bytes each, two rows at a time, because their sums and
// maxima over the lanes then cost half: each half of the lanes ends with one of them.
//
// With old codes q, scale s and input b = dt x B a row becomes h = decay s q + b. What is kept is g = h / (decay s),
// so that an element takes one product; its codes are those of h. A row whose decay s is too small for that (or 0)
// forgets q.
//
// Budget, N = 128: 2 bytes of traffic an element, so 3 TB/s leave 19 instructions each on an H100, and 9.5 of those
// that its integer units take. Unpacking takes 2.3, the recurrence 1, y 0.3 (it is linear in the codes, so dp4a with
// those of C), the maximum 1, dither 2, rounding 2, packing 0.8: 9.4, of which integer units take 5, and what a pair
// of rows and a tile take beside their elements 4.
#include <algorithm>
#include <type_traits>

#include "conv_quad.cuh"
#include "decode_launch.cuh"
#include "ssd_stream.h"
#include "tma.cuh"

namespace quamba::decode {

constexpr int kStreamWarps = 4, kStreamBlocks = 4, kCount = 16, kTile = 32;
constexpr int kShare = 5;    // tiles of a warp at most: more waves of blocks keep the sweep together
constexpr int kLeast = 256;  // rows a multiprocessor from which on the launch of ssd_inputs pays

struct StreamParams {
  QuambaDecode q;
  SsdTerms terms;
  int tiles, group_tiles;  // of the batch, of a group
  unsigned head_magic;     // ceil(2^32 / P)
};

template <int N, bool Codes>
struct __align__(128) Tile {
  uint4 state[kTile * N / 16];
  uint4 B[N / (Codes ? 16 : 4)], C[N / (Codes ? 16 : 4)];
};

template <int N, bool Codes>
struct __align__(128) WarpMemory {
  Tile<N, Codes> tiles[2];
  uint2 rows[kTile];      // g of one B; the draw
  float2 results[kTile];  // max |g|; sum of q C, or of g C
  unsigned long long full[2];
};

// Combines two rows over LANES lanes at once: the lower half of the lanes leaves with that of `a`, the upper with b's.
template <int LANES, class T, class F>
__device__ __forceinline__ T fold(T a, T b, bool upper, F combine) {
  T v = combine(upper ? b : a, __shfl_xor_sync(~0u, upper ? a : b, LANES / 2));
#pragma unroll
  for (int step = LANES / 4; step; step /= 2) v = combine(v, __shfl_xor_sync(~0u, v, step));
  return v;
}

__device__ __forceinline__ void unpack_word(unsigned word, float* h) {
  word ^= kFlip;
#pragma unroll
  for (int j = 0; j < 4; ++j) h[j] = __uint_as_float(__byte_perm(word, 0x4b000000u, 0x7440 + j)) - 8388736.f;
}

// BYTES to shared memory: on Hopper by the copy engine, which counts them at `barrier`.
template <int BYTES>
__device__ __forceinline__ void fetch(void* to, const void* from, unsigned barrier, int lane) {
#if __CUDA_ARCH__ >= 900
  if (lane == 0)
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
            shared_address(to)),
        "l"(from), "n"(BYTES), "r"(barrier)
        : "memory");
#else
#pragma unroll
  for (int at = 0; at < BYTES; at += 512) {
    const int mine = at + lane * 16;
    if (mine < BYTES) copy_async(static_cast<char*>(to) + mine, static_cast<const char*>(from) + mine, true);
  }
#endif
}

// Codes: B and C in codes, else in floats.
template <int N, bool Codes, bool Noisy>
__global__ void __launch_bounds__(32 * kStreamWarps, kStreamBlocks)
    ssd_stream(const __grid_constant__ StreamParams p) {
  constexpr int kLanes = N / kCount, kPass = 32 / kLanes, kPairs = kTile / kPass / 2;
  using Shared = Tile<N, Codes>;
  static_assert(kLanes >= 4, "a row lies in four lanes at least");
  static_assert(sizeof(Shared) == sizeof(Shared::state) + 2 * sizeof(Shared::B), "as its barrier counts");
  extern __shared__ __align__(128) char shared[];
  const QuambaDecode& q = p.q;
  launch_dependents();

  const int lane = threadIdx.x % 32, own = lane / kLanes, column = lane % kLanes * kCount;
  const bool upper = lane % kLanes >= kLanes / 2, reports = lane % (kLanes / 2) == 0;
  const int warps = gridDim.x * kStreamWarps, first = blockIdx.x * kStreamWarps + threadIdx.x / 32;
  if (first >= p.tiles) return;
  WarpMemory<N, Codes>& m = reinterpret_cast<WarpMemory<N, Codes>*>(shared)[threadIdx.x / 32];
  const auto barrier = [&](int stage) { return shared_address(&m.full[stage]); };
  const auto fetch_state = [&](int stage, int tile) {
#if __CUDA_ARCH__ >= 900
    if (lane == 0) arrive_expecting(barrier(stage), sizeof(Shared));
#endif
    const int8_t* const from = static_cast<const int8_t*>(q.state) + static_cast<long long>(tile) * kTile * N;
    fetch<sizeof(Shared::state)>(m.tiles[stage].state, from, barrier(stage), lane);
  };
  const auto fetch_terms = [&](int stage, int tile) {
    const long long at = static_cast<long long>(tile / p.group_tiles) * static_cast<int>(sizeof(Shared::B));
    fetch<sizeof(Shared::B)>(m.tiles[stage].B, static_cast<const char*>(p.terms.B) + at, barrier(stage), lane);
    fetch<sizeof(Shared::C)>(m.tiles[stage].C, static_cast<const char*>(p.terms.C) + at, barrier(stage), lane);
  };
#if __CUDA_ARCH__ >= 900
  if (lane == 0) {
    init_barrier(barrier(0), 1);
    init_barrier(barrier(1), 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncwarp();
#endif
  // ahead of the wait: ssd_inputs lets this kernel start once what wrote the state before has ended
  fetch_state(0, first);
  const float B_one = constant(q.B_scale, 0, 1.f), C_one = constant(q.C_scale, 0, 1.f);

  wait_for_previous_kernel();
  fetch_terms(0, first);
  const unsigned key = Noisy ? dither_key(q.rng) : 0;
  unsigned dither[kCount];
#pragma unroll
  for (int i = 0; i < kCount / 4; ++i) {
    uint4 four = make_uint4(0, 0, 0, 0);
    if (Noisy) four = __ldcg(reinterpret_cast<const uint4*>(p.terms.dither + column) + i);
    dither[4 * i] = four.x, dither[4 * i + 1] = four.y, dither[4 * i + 2] = four.z, dither[4 * i + 3] = four.w;
  }
  // what the lane's row of a tile brings, as it lies
  float2 row{};
  float4 head{};
  float scale = 0.f;
  const auto look_up = [&](int tile) {
    const unsigned index = tile * kTile + lane;
    row = __ldcg(p.terms.rows + index);
    head = __ldcg(p.terms.heads + __umulhi(index, p.head_magic));
    scale = __ldcg(q.state_scale + index);
  };
  look_up(first);

  int stage = 0;
  unsigned parity = 0;
#pragma unroll 1
  for (int tile = first; tile < p.tiles; tile += warps) {
    float B_unit = B_one, C_unit = C_one;
    if (q.B_count > 1 || q.C_count > 1) {
      const int g = tile / p.group_tiles % q.G;
      B_unit = constant(q.B_scale, q.B_count > 1 ? g : 0, 1.f);
      C_unit = constant(q.C_scale, q.C_count > 1 ? g : 0, 1.f);
    }
    const float input = __fmul_rn(head.y, row.x) * B_unit, skip = __fmul_rn(row.x, head.z), gate = row.y;
    float decay = head.x * scale, rate = quotient(input, decay);
    // without an input, what is no normal number is left of nothing
    const bool forgets = input == 0.f ? decay < 0x1p-126f : !(fabsf(rate) < 0x1p80f);
    if (forgets) decay = fabsf(input), rate = input > 0.f ? 1.f : -1.f;
    if (input == 0.f) rate = 0.f;
    m.rows[lane] = make_uint2(__float_as_uint(rate),
                              Noisy ? row_draw(key, static_cast<unsigned>(tile * kTile + lane)) : 0);
    const int next = tile + warps;
    if (next < p.tiles) look_up(next);

    Shared& held_tile = m.tiles[stage];
#if __CUDA_ARCH__ >= 900
    wait(barrier(stage), parity);
#else
    copy_async_wait();
#endif
    __syncwarp();
    if (next < p.tiles) {
      fetch_state(stage ^ 1, next);
      fetch_terms(stage ^ 1, next);
    }
    if (__any_sync(~0u, forgets)) {
      if (forgets)
        for (int i = 0; i < N / 16; ++i) held_tile.state[lane * (N / 16) + i] = make_uint4(0, 0, 0, 0);
#if __CUDA_ARCH__ >= 900
      asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
      __syncwarp();
    }
    unsigned C[Codes ? kCount / 4 : 1];
    float B[kCount], Cs[Codes ? 1 : kCount], both = 0.f;  // both: B C of codes
    if constexpr (Codes) {
      const uint4 b = held_tile.B[column / kCount], c = held_tile.C[column / kCount];
      unpack_word(b.x, B), unpack_word(b.y, B + 4), unpack_word(b.z, B + 8), unpack_word(b.w, B + 12);
      C[0] = c.x, C[1] = c.y, C[2] = c.z, C[3] = c.w;
      int sum = __dp4a(static_cast<int>(b.x), static_cast<int>(c.x), 0);
      sum = __dp4a(static_cast<int>(b.y), static_cast<int>(c.y), sum);
      sum = __dp4a(static_cast<int>(b.z), static_cast<int>(c.z), sum);
      sum = __dp4a(static_cast<int>(b.w), static_cast<int>(c.w), sum);
#pragma unroll
      for (int step = kLanes / 2; step; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
      both = static_cast<float>(sum);
    } else {
#pragma unroll
      for (int i = 0; i < kCount / 4; ++i) {
        const float4 b = reinterpret_cast<const float4*>(held_tile.B)[column / 4 + i];
        const float4 c = reinterpret_cast<const float4*>(held_tile.C)[column / 4 + i];
        B[4 * i] = b.x, B[4 * i + 1] = b.y, B[4 * i + 2] = b.z, B[4 * i + 3] = b.w;
        Cs[4 * i] = c.x, Cs[4 * i + 1] = c.y, Cs[4 * i + 2] = c.z, Cs[4 * i + 3] = c.w;
      }
    }

    int8_t* out = static_cast<int8_t*>(q.state) + static_cast<long long>(tile) * kTile * N + lane * 16;
    const uint4* from = held_tile.state + lane;
    const uint2* terms = m.rows + own;
    float2* to = m.results + own + (upper ? kPass : 0);
#pragma unroll 1
    for (int pair = 0; pair < kPairs; ++pair) {
      float g[2][kCount], peak[2];
      std::conditional_t<Codes, int, float> dot[2];
      unsigned shift[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const uint4 held = from[r * 32];
        const uint2 term = terms[r * kPass];
        const float rate = __uint_as_float(term.x);
        shift[r] = term.y;
        unpack_word(held.x, g[r]), unpack_word(held.y, g[r] + 4);
        unpack_word(held.z, g[r] + 8), unpack_word(held.w, g[r] + 12);
        float peaks[2] = {0.f, 0.f};
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          g[r][i] = fmaf(rate, B[i], g[r][i]);
          peaks[i % 2] = fmaxf(peaks[i % 2], fabsf(g[r][i]));
        }
        peak[r] = fmaxf(peaks[0], peaks[1]);
        if constexpr (Codes) {
          dot[r] = __dp4a(static_cast<int>(held.x), static_cast<int>(C[0]), 0);
          dot[r] = __dp4a(static_cast<int>(held.y), static_cast<int>(C[1]), dot[r]);
          dot[r] = __dp4a(static_cast<int>(held.z), static_cast<int>(C[2]), dot[r]);
          dot[r] = __dp4a(static_cast<int>(held.w), static_cast<int>(C[3]), dot[r]);
        } else {
          dot[r] = 0.f;
#pragma unroll
          for (int i = 0; i < kCount; ++i) dot[r] = fmaf(g[r][i], Cs[i], dot[r]);
        }
      }
      const float most = fold<kLanes>(peak[0], peak[1], upper, [](float a, float b) { return fmaxf(a, b); });
      const float total = static_cast<float>(fold<kLanes>(dot[0], dot[1], upper, [](auto a, auto b) { return a + b; }));
      if (reports) *to = make_float2(most, total);
      const float mine = inverse_of(most, Noisy), other = __shfl_xor_sync(~0u, mine, kLanes / 2);
      const float inverse[2] = {upper ? other : mine, upper ? mine : other};
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        Stored<int8_t, kCount> stored;
        round_row(g[r], inverse[r], Noisy, shift[r], dither, stored);
        stored.store(out + r * 512);
      }
      out += 1024, from += 64, terms += 2 * kPass, to += 2 * kPass;
    }
    __syncwarp();
    const float2 result = m.results[lane];
    const long long index = static_cast<long long>(tile) * kTile + lane;
    const float y = Codes ? fmaf(decay, result.y, input * both) * C_unit : decay * result.y;
    q.state_scale[index] = scale_of(result.x * decay);
    static_cast<float*>(q.workspace)[index] = (y + skip) * gate;
    parity ^= stage, stage ^= 1;
  }
}

bool can_stream(const QuambaDecode& q, int sms) {
  const auto aligned = [](const void* p, int bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; };
  const long long total = static_cast<long long>(q.batch) * q.H * q.P;
  return q.state_type == QUAMBA_I8 && (q.C_scale ? has_quads(q) : has_half_quads(q)) &&
         (q.N == 64 || q.N == 128 || q.N == 256) && aligned(q.z, 8) && aligned(q.B, 8) &&
         aligned(q.C, 8) && aligned(q.x_scale, 16) && aligned(q.z_scale, 16) &&
         q.z_stride % 4 == 0 && q.bc_stride % 4 == 0 && q.P % 4 == 0 && q.H / q.G * q.P % kTile == 0 &&
         q.workspace_bytes >= ssd_terms(q).bytes && total >= kLeast * sms && total * q.P < 1ll << 32;
}

template <int N, bool Codes, bool Noisy>
cudaError_t launch_share(const QuambaDecode& q, const SsdTerms& terms, int sms, void* stream) {
  constexpr int kShared = kStreamWarps * sizeof(WarpMemory<N, Codes>);
  const int tiles = q.batch * q.H * q.P / kTile, slots = std::min(kStreamBlocks, 227 * 1024 / (kShared + 1024)) * sms;
  const auto each = [&](int waves) { return (tiles - 1) / (slots * kStreamWarps * waves) + 1; };  // tiles of a warp
  const int share = each((each(1) - 1) / kShare + 1), blocks = (tiles - 1) / (share * kStreamWarps) + 1;
  const unsigned magic = static_cast<unsigned>(((1ull << 32) + q.P - 1) / q.P);
  const StreamParams params{q, terms, tiles, q.H / q.G * q.P / kTile, magic};
  return launch(ssd_stream<N, Codes, Noisy>, params, dim3(blocks), 32 * kStreamWarps, kShared, stream);
}

template <int N>
cudaError_t launch_kind(const QuambaDecode& q, const SsdTerms& terms, int sms, void* stream) {
  const auto kernel = q.C_scale ? (q.rng ? launch_share<N, true, true> : launch_share<N, true, false>)
                                : (q.rng ? launch_share<N, false, true> : launch_share<N, false, false>);
  return kernel(q, terms, sms, stream);
}

int launch_stream(const QuambaDecode& q, int sms, void* stream) {
  const SsdTerms terms = ssd_terms(q);
  const cudaError_t error = launch_inputs(q, terms, stream);
  if (error != cudaSuccess) return error;
  if (q.N == 64) return launch_kind<64>(q, terms, sms, stream);
  if (q.N == 128) return launch_kind<128>(q, terms, sms, stream);
  return launch_kind<256>(q, terms, sms, stream);
}

}  // namespace quamba::decode
