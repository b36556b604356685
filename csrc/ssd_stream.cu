// The recurrence of Mamba2 over the int8 states of many sequences, from what in_proj gives.
//
// A block keeps one sequence and group, makes what its rows need (ssd_inputs.cuh) while the first of its states come,
// and then its warps go through them without a barrier: a warp takes tiles of 32 rows by itself. Blocks of a group take
// turns of a piece each, a tile a warp, so that all of them sweep the states together, for the memory's pages. A tile
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
// of rows and a tile take beside their elements 2.
#include <algorithm>
#include <type_traits>

#include "decode_launch.cuh"
#include "ssd_inputs.cuh"
#include "ssd_stream.h"
#include "tma.cuh"

namespace quamba::decode {

constexpr int kStreamWarps = 4, kStreamBlocks = 4, kCount = 16, kTile = 32, kPiece = kStreamWarps * kTile;
constexpr int kStreamThreads = 32 * kStreamWarps;
constexpr int kShare = 5;    // tiles of a warp at most: more waves of blocks keep the sweep together
constexpr int kLeast = 256;  // rows a multiprocessor from which on this pays
constexpr int kAskers = 64;  // blocks that may ask for states ahead

struct StreamParams {
  QuambaDecode q;
  int share;            // pieces of a block
  int asks, ask_every;  // tiles that an asker asks for at most, cycles from one to the next
};

template <int N>
struct __align__(128) WarpMemory {
  uint4 tiles[2][kTile * N / 16];
  uint2 rows[kTile];      // g of one B; the draw
  float2 results[kTile];  // max |g|; sum of q C, or of g C
  unsigned long long full[2];
};

template <int N, bool Codes>
struct __align__(128) BlockMemory {
  WarpMemory<N> warps[kStreamWarps];
  uint4 B[N / (Codes ? 16 : 4)], C[N / (Codes ? 16 : 4)];
  unsigned dither[N];
  unsigned long long over, unused;  // over: the wait for the previous kernel
  Row rows[kPiece];  // of each piece; `input` for a code 1 of B
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

#if __CUDA_ARCH__ >= 900
// What a thread of a block that finds room while in_proj still runs does until then, since in_proj uses little of the
// memory: it asks for states that all blocks read after their first, a tile at a time and at even distances, because in
// a burst they would be in the way of in_proj's weights. They come to stay, or the weights would push them out again.
template <int N>
__device__ __forceinline__ void ask_ahead(const StreamParams& p, int asker, int group_rows, unsigned over) {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  const unsigned start = static_cast<unsigned>(clock());
  const int parts = gridDim.x, blocks = parts * gridDim.y * gridDim.z;
  unsigned due = 0;
  int left = p.asks;
  for (int piece = 1; piece < p.share; ++piece)
    for (int other = asker; other < blocks; other += kAskers)
      for (int w = 0; w < kStreamWarps; ++w) {
        const int row = (piece * parts + other % parts) * kPiece + w * kTile;
        if (row >= group_rows) break;
        while (static_cast<unsigned>(clock()) - start < due && !passed(over, 0)) __nanosleep(40);
        if (passed(over, 0) || left-- == 0) return;
        const int8_t* const from =
            static_cast<const int8_t*>(p.q.state) + (static_cast<long long>(other / parts) * group_rows + row) * N;
        asm volatile("cp.async.bulk.prefetch.L2.global.L2::cache_hint [%0], %1, %2;" ::"l"(from), "n"(kTile * N),
                     "l"(policy)
                     : "memory");
        due += p.ask_every;
      }
}
#endif

// Codes: convolution, x, B and C in codes, else in 16-bit floats.
template <int N, bool Codes, bool Noisy>
__global__ void __launch_bounds__(kStreamThreads, kStreamBlocks) ssd_stream(const __grid_constant__ StreamParams p) {
  constexpr int kLanes = N / kCount, kPass = 32 / kLanes, kPairs = kTile / kPass / 2;
  static_assert(kLanes >= 4, "a row lies in four lanes at least");
  extern __shared__ __align__(128) char shared[];
  const QuambaDecode& q = p.q;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, own = lane / kLanes, column = lane % kLanes * kCount;
  const bool upper = lane % kLanes >= kLanes / 2, reports = lane % (kLanes / 2) == 0;
  const int group_rows = q.H / q.G * q.P;
  const Pieces pieces{static_cast<int>(blockIdx.z), static_cast<int>(blockIdx.y), static_cast<int>(blockIdx.x),
                      static_cast<int>(gridDim.x), group_rows, kPiece, p.share};
  // the warp's tiles: rows of the batch `first` and every `step` on
  const int in_group = pieces.row(warp * kTile), step = pieces.parts * kPiece;
  const int tiles = in_group < group_rows ? min(p.share, (group_rows - 1 - in_group) / step + 1) : 0;
  const int first = (pieces.batch * q.G + pieces.group) * group_rows + in_group;
  auto& block = reinterpret_cast<BlockMemory<N, Codes>&>(shared);
  WarpMemory<N>& m = block.warps[warp];
  const int flat = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned over = shared_address(&block.over);
  const auto barrier = [&](int stage) { return shared_address(&m.full[stage]); };
  const auto place = [&](int tile) {
    return static_cast<int8_t*>(q.state) + static_cast<long long>(first + tile * step) * N;
  };
  const auto fetch_state = [&](int tile) {
    if (tile >= tiles) return;
#if __CUDA_ARCH__ >= 900
    if (lane == 0) arrive_expecting(barrier(tile % 2), kTile * N);
#endif
    fetch<kTile * N>(m.tiles[tile % 2], place(tile), barrier(tile % 2), lane);
  };

  const int quads = N / 2 + p.share * kPiece / 4;
  const float B_unit = constant(q.B_scale, q.B_count > 1 ? pieces.group : 0, 1.f);
  const float C_unit = constant(q.C_scale, q.C_count > 1 ? pieces.group : 0, 1.f);
  float scale = 0.f;
  unsigned key = 0;
#pragma unroll 1
  for (int from = 0; from < quads; from += 2 * kStreamThreads) {  // two quads of a thread at a time
    InputQuad<N, Codes> a(q, pieces, from + threadIdx.x), b(q, pieces, from + kStreamThreads + threadIdx.x);
    a.read_constants(q), b.read_constants(q);
    if (from == 0) {
      a.ask(q, pieces), b.ask(q, pieces);
#if __CUDA_ARCH__ >= 900
      if (lane == 0) {
        init_barrier(barrier(0), 1);
        init_barrier(barrier(1), 1);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        if (tiles) prefetch_bulk(place(0), kTile * N);
      }
      __syncwarp();
      if (flat < kAskers) {
        if (threadIdx.x == 0) init_barrier(over, 1);
        __syncthreads();
        if (threadIdx.x == kStreamThreads - 32) ask_ahead<N>(p, flat, group_rows, over);
        __syncwarp();
      }
#endif
      // not a state earlier: the launches before may have let this one start while the step before still writes
      wait_for_previous_kernel();
#if __CUDA_ARCH__ >= 900
      if (flat < kAskers && threadIdx.x == 0) arrive(over);
#endif
    }
    a.read(q, pieces), b.read(q, pieces);
    if (from == 0) {
      // behind what is made now, and the next not before it is: states of all blocks at once would be in its way
      fetch_state(0);
      if (tiles) scale = __ldcg(q.state_scale + first + lane);
      if (Noisy) key = dither_key(q.rng);
    }
    a.make(q, pieces, B_unit, block.rows, block.B, block.C);
    b.make(q, pieces, B_unit, block.rows, block.B, block.C);
  }
  if (Noisy)
    for (int n = threadIdx.x; n < N; n += kStreamThreads)
      block.dither[n] = column_draw(key, static_cast<unsigned>(q.batch) * (q.H * q.P) + n);
  __syncthreads();
  launch_dependents();  // not earlier: decode_finish shifts what has been read here at once
  fetch_state(1);

  unsigned dither[kCount], C[Codes ? kCount / 4 : 1];
  float B[kCount], Cs[Codes ? 1 : kCount], both = 0.f;  // both: B C of codes
#pragma unroll
  for (int i = 0; i < kCount; ++i) dither[i] = Noisy ? block.dither[column + i] : 0;
  if constexpr (Codes) {
    const uint4 b = block.B[column / kCount], c = block.C[column / kCount];
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
    for (int i = 0; i < kCount; ++i) {
      B[i] = reinterpret_cast<const float*>(block.B)[column + i];
      Cs[i] = reinterpret_cast<const float*>(block.C)[column + i];
    }
  }

#pragma unroll 1
  for (int tile = 0; tile < tiles; ++tile) {
    const int index = first + tile * step + lane;
    const Row row = block.rows[tile * kPiece + warp * kTile + lane];
    const float input = row.input;
    float decay = row.decay * scale, rate = quotient(input, decay);
    // without an input, what is no normal number is left of nothing
    const bool forgets = input == 0.f ? decay < 0x1p-126f : !(fabsf(rate) < 0x1p80f);
    if (forgets) decay = fabsf(input), rate = input > 0.f ? 1.f : -1.f;
    if (input == 0.f) rate = 0.f;
    m.rows[lane] = make_uint2(__float_as_uint(rate), Noisy ? row_draw(key, static_cast<unsigned>(index)) : 0);
    if (tile + 1 < tiles) scale = __ldcg(q.state_scale + index + step);

    uint4* const held_tile = m.tiles[tile % 2];
#if __CUDA_ARCH__ >= 900
    wait(barrier(tile % 2), tile / 2 % 2);
#else
    copy_async_wait();
#endif
    __syncwarp();
    if (tile) fetch_state(tile + 1);
    if (__any_sync(~0u, forgets)) {
      if (forgets)
        for (int i = 0; i < N / 16; ++i) held_tile[lane * (N / 16) + i] = make_uint4(0, 0, 0, 0);
#if __CUDA_ARCH__ >= 900
      asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
      __syncwarp();
    }

    int8_t* out = place(tile) + lane * 16;
    const uint4* from = held_tile + lane;
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
    const float y = Codes ? fmaf(decay, result.y, input * both) * C_unit : decay * result.y;
    q.state_scale[index] = scale_of(result.x * decay);
    static_cast<float*>(q.workspace)[index] = (y + row.skip) * row.gate;
  }
}

bool can_stream(const QuambaDecode& q, int sms) {
  const auto aligned = [](const void* p, int bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; };
  const long long total = static_cast<long long>(q.batch) * q.H * q.P;
  return q.state_type == QUAMBA_I8 && (q.C_scale ? has_quads(q) : has_half_quads(q)) &&
         (q.N == 64 || q.N == 128 || q.N == 256) && aligned(q.z, 8) && aligned(q.B, 8) &&
         aligned(q.C, 8) && aligned(q.x_scale, 16) && aligned(q.z_scale, 16) &&
         q.z_stride % 4 == 0 && q.bc_stride % 4 == 0 && q.P % 4 == 0 && q.H / q.G * q.P % kTile == 0 &&
         q.batch <= 65535 && q.G <= 65535 && total >= kLeast * sms && total < 1ll << 31;
}

template <int N, bool Codes, bool Noisy>
cudaError_t launch_share(const QuambaDecode& q, int sms, void* stream) {
  using Memory = BlockMemory<N, Codes>;
  constexpr int kRows = sizeof(Memory::rows), kOthers = sizeof(Memory) - kRows;
  const int slots = sms * std::min(kStreamBlocks, 227 * 1024 / (kOthers + kShare * kRows + 1024));
  const int group_pieces = (q.H / q.G * q.P - 1) / kPiece + 1;
  const auto each = [&](int waves) { return (q.batch * q.G * group_pieces - 1) / (slots * waves) + 1; };
  const int share = std::min(each((each(1) - 1) / kShare + 1), group_pieces), parts = (group_pieces - 1) / share + 1;
  // at a pace at which all states would come in so many cycles, fewer the more there are; up to two fifths of L2
  int l2 = 0;
  const cudaError_t error = device_attribute(cudaDevAttrL2CacheSize, l2);
  if (error != cudaSuccess) return error;
  constexpr int kTileBytes = kTile * N, kFastest = 5 * N / 2;
  const int tiles = q.batch * q.H * q.P / kTile, asks = l2 / 5 * 2 / (kAskers * kTileBytes);
  const int all = std::max(140000, 260000 - static_cast<int>(static_cast<long long>(tiles) * kTileBytes / 1024));
  const StreamParams params{q, share, asks, std::max(kFastest, all / ((tiles - 1) / kAskers + 1))};
  return launch(ssd_stream<N, Codes, Noisy>, params, dim3(parts, q.G, q.batch), kStreamThreads,
                kOthers + share * kRows, stream);
}

template <int N>
cudaError_t launch_kind(const QuambaDecode& q, int sms, void* stream) {
  const auto kernel = q.C_scale ? (q.rng ? launch_share<N, true, true> : launch_share<N, true, false>)
                                : (q.rng ? launch_share<N, false, true> : launch_share<N, false, false>);
  return kernel(q, sms, stream);
}

int launch_stream(const QuambaDecode& q, int sms, void* stream) {
  if (q.N == 64) return launch_kind<64>(q, sms, stream);
  if (q.N == 128) return launch_kind<128>(q, sms, stream);
  return launch_kind<256>(q, sms, stream);
}

}  // namespace quamba::decode
