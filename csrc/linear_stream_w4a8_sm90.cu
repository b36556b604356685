// A linear over one to eight tokens on Hopper, as a link in a chain of kernels that start ahead of their predecessors.
//
// What such a step takes is not the product but waiting: for the predecessor, for x, for sums. So everything that can
// be had before the wait is in shared memory by then. A block owns neighbouring strips of 16 output channels. One warp
// has the bulk copy engine bring them, row by row, into a ring of stages, and asks L2 for what comes next; the other
// warps share K and multiply all strips of a round from shared memory, then add up once. There is one block a
// multiprocessor and no more than half of its shared memory in a block, so that the next linear's weights arrive
// beside this one's.
//
// With a prologue the block makes its own input from what an earlier kernel left: norm and codes. That every block does so
// costs less than a kernel in between.
#include "finish.cuh"
#include "launch.cuh"
#include "linear_skinny_launch.cuh"
#include "linear_stream.h"
#include "quads.cuh"
#include "tma.cuh"

namespace quamba::stream {

using namespace quamba::skinny;

constexpr Kind kKind = Kind::kW4A8;
constexpr int kWarps = 10, kMaxTokens = 8, kMaxStages = 16, kStripRows = 16;
constexpr int kRunBytes = 1280;  // of the longest run of a row in a stage, at most
constexpr int kPieces = kXPieces<kKind>, kPiece = 16;  // of a lane's x in a step; bytes, and elements, of one
constexpr int kOctet = 8, kMostHeld = 4;  // elements that a thread makes at a time; how often, at most
constexpr int kPrologueTokens = 2;
constexpr int kPrefetched = 6;   // stages beyond the ring that L2 is asked for
// A multiprocessor's registers hold 11 warps of one linear beside 13 of the next, but not 13 twice. Before CUDA 12.4 there is
// no saying so, and blocks may share a multiprocessor while others are free.
#if CUDART_VERSION >= 12040
constexpr int kIdleWarps = 2;
#define QUAMBA_STREAM_BOUND __maxnreg__(80)
#else
constexpr int kIdleWarps = 0;
#define QUAMBA_STREAM_BOUND __launch_bounds__(32 * (kWarps + 1), 2)
#endif

struct Params {
  QuambaStream s;
  int row_bytes, groups, scale_bytes;  // of a row of w and of its group scales
  unsigned group_magic;
  int strips, runs, run_steps, steps;  // steps of 64 bytes: of a run of a row in a stage, of a row
  int warps, idle, stages, round;  // idle: warps that take room alone; round: strips that are added up together
  int pitch, odd, stage_bytes;  // between even rows in a stage, from an even to the odd row, of a stage
  int x_slots, x_plane, x_bytes, token_pitch, sums_bytes, sums, shared_bytes;
};

__device__ __forceinline__ void bulk_prefetch(const void* from, int bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global.L2::cache_hint [%0], %1, %2;" ::"l"(from), "r"(bytes), "l"(evict_first())
               : "memory");
}

// Where 16 bytes of x lie: piece `at` of a token, in the order of K.
__device__ __forceinline__ int place_of_x(const Params& p, int token, int at) {
  const int step = at / (4 * kPieces), t = at / kPieces % 4, piece = at % kPieces;
  return step * kPieces * p.x_slots * 4 + piece * p.x_plane + ((token * 4 + t) ^ (piece * (8 / kPieces) % 8));
}

// x as it comes, from global to shared memory.
__device__ __forceinline__ void copy_input(uint4* x, const Params& p) {
  const int pieces = p.steps * 4 * kPieces, inside = p.s.linear.K / kPiece;
  const uint4* from = static_cast<const uint4*>(p.s.linear.x);
  constexpr int kBatch = 4;
  const int count = p.s.linear.M * pieces;
  for (int i0 = threadIdx.x; i0 < count; i0 += kBatch * blockDim.x) {
    uint4 v[kBatch];
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      const int i = i0 + u * blockDim.x, token = i / pieces, at = i - token * pieces;
      v[u] = i < count && at < inside ? __ldcg(from + static_cast<int64_t>(token) * inside + at) : uint4{};
    }
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      const int i = i0 + u * blockDim.x, token = i / pieces, at = i - token * pieces;
      if (i < count) x[place_of_x(p, token, at)] = v[u];
    }
  }
}

template <class F>
__device__ __forceinline__ Octet both(F f, const Octet& a, const Octet& b) {
  return {each(f, a.low, b.low), each(f, a.high, b.high)};
}

// Octet `at` of a norm's weight, from L1 if it is there.
__device__ __forceinline__ RawOctet constant_octet(const void* data, int type, int at) {
  const uint4* const from = static_cast<const uint4*>(data);
  if (type == QUAMBA_F32) return {constant_quad(from + 2 * at), constant_quad(from + 2 * at + 1)};
  return {constant_quad(from + at), make_uint4(0, 0, 0, 0)};
}

// x made by this block, token after token, in registers: a thread has octets threadIdx.x, + blockDim.x, ...
// gain: of the same octets; partial: a float a warp, twice.
template <int HELD>
__device__ __forceinline__ void make_input(uint4* x, float* x_scales, float* partial, const RawOctet (&gain)[HELD],
                                           float in_scale, const Params& p, bool real) {
  const QuambaStream& s = p.s;
  const int octets = s.linear.K / kOctet, places = p.steps * kPieces * 4 * (kPiece / kOctet), type = s.linear.x_dtype;
  const bool wide = type == QUAMBA_F32;
#pragma unroll 1
  for (int token = 0; token < s.linear.M; ++token) {
    const uint4* const from = static_cast<const uint4*>(s.linear.x) + static_cast<int64_t>(token) * octets * (wide ? 2 : 1);
    RawOctet raw[HELD] = {};
#pragma unroll
    for (int h = 0; h < HELD; ++h) {
      const int at = threadIdx.x + h * blockDim.x;
      if (!real || at >= octets) continue;
      raw[h].low = __ldcg(from + (wide ? 2 * at : at));
      if (wide) raw[h].high = __ldcg(from + 2 * at + 1);
    }
    Octet v[HELD];
    float sum = 0.f;
#pragma unroll
    for (int h = 0; h < HELD; ++h) {
      v[h] = octet_of(raw[h], type);
      for (const float4& q : {v[h].low, v[h].high}) sum += (q.x * q.x + q.y * q.y) + (q.z * q.z + q.w * q.w);
    }
    if (token) __syncthreads();  // `partial` has been read
    sum = block_reduce(sum, partial, [](float a, float b) { return a + b; });
    const float inverse = rsqrtf(sum / static_cast<float>(s.linear.K) + s.eps);
    const auto times = [](float a, float b) { return __fmul_rn(a, b); };
    const Octet inverses{make_float4(inverse, inverse, inverse, inverse), make_float4(inverse, inverse, inverse, inverse)};
#pragma unroll
    for (int h = 0; h < HELD; ++h) {
      v[h] = both(times, v[h], inverses);
      if (s.norm_weight) v[h] = both(times, v[h], octet_of(gain[h], s.norm_weight_dtype));
    }
    float scale = in_scale;
    if (!s.in_scale) {
      float peak = 0.f;
#pragma unroll
      for (int h = 0; h < HELD; ++h)
        for (const float4& q : {v[h].low, v[h].high})
          peak = fmaxf(peak, fmaxf(fmaxf(fabsf(q.x), fabsf(q.y)), fmaxf(fabsf(q.z), fabsf(q.w))));
      peak = block_reduce(peak, partial + kWarps + 1, [](float a, float b) { return fmaxf(a, b); });
      scale = peak > 0.f ? __fdiv_rn(peak, 127.f) : 1.f;
    }
    if (threadIdx.x == 0) x_scales[token] = scale;
    const float near = __frcp_rn(scale);
    const auto code = [&](float a, float) { return round_code(a, scale, near); };
#pragma unroll
    for (int h = 0; h < HELD; ++h) {
      const int at = threadIdx.x + h * blockDim.x;
      if (at >= places) continue;  // beyond K: zeros
      const Octet codes = both(code, v[h], v[h]);
      reinterpret_cast<uint2*>(x + place_of_x(p, token, at / 2))[at % 2] =
          make_uint2(to_raw(codes.low, QUAMBA_I8).x, to_raw(codes.high, QUAMBA_I8).x);
    }
  }
}

// HELD: octets of x that a thread makes of a token; 0: x comes as codes.
template <int HELD>
__global__ void QUAMBA_STREAM_BOUND linear_stream(const __grid_constant__ Params p) {
  extern __shared__ __align__(128) char shared[];
  const QuambaLinear& q = p.s.linear;
  launch_dependents();
  const int lane = threadIdx.x % 32, warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
  const int begin = static_cast<int>(static_cast<int64_t>(p.strips) * blockIdx.x / gridDim.x);
  const int end = static_cast<int>(static_cast<int64_t>(p.strips) * (blockIdx.x + 1) / gridDim.x);
  const int units = (end - begin) * p.runs;  // a strip's run of K; of two strips in turn, run after run

  const uint32_t full = shared_address(shared), empty = full + 8 * kMaxStages;
  float* const x_scales = reinterpret_cast<float*>(shared + 16 * kMaxStages);
  char* const stages = shared + 16 * kMaxStages + 64;
  uint4* const x = reinterpret_cast<uint4*>(stages + p.stages * p.stage_bytes);
  // sums, before them the prologue's, and what the epilogue needs of the channels
  uint32_t* const sums = reinterpret_cast<uint32_t*>(reinterpret_cast<char*>(x) + p.x_bytes);
  Channel* const channels = reinterpret_cast<Channel*>(reinterpret_cast<char*>(sums) + p.sums * p.sums_bytes);

  // A unit's weights and its strip's scales: what is copied, and what L2 is asked for.
  const auto visit = [&](int unit, auto copy) {
    const int pair = unit / (2 * p.runs), in_pair = unit - pair * 2 * p.runs;
    const bool twins = begin + 2 * pair + 1 < end;
    const int strip = begin + 2 * pair + (twins ? in_pair & 1 : 0);
    const int first = (twins ? in_pair >> 1 : in_pair) * p.run_steps * kStepBytes;
    const int rows = min(kStripRows, q.O - strip * kStripRows), bytes = min(p.run_steps * kStepBytes, p.row_bytes - first);
    if (lane < rows)
      copy(lane / 2 * p.pitch + lane % 2 * p.odd,
           static_cast<const char*>(q.w) + static_cast<int64_t>(strip * kStripRows + lane) * p.row_bytes + first, bytes);
    if (lane == kStripRows)
      copy(kStripRows / 2 * p.pitch,
           static_cast<const char*>(q.w_multiplier) +
               static_cast<int64_t>(strip) * kStripRows * p.scale_bytes,
           rows * p.scale_bytes);
    return rows * (bytes + p.scale_bytes);
  };
  const auto fill = [&](int unit, int stage) {
    const uint32_t barrier = full + 8 * stage;
    char* const to = stages + stage * p.stage_bytes;
    const int total = visit(unit, [](int, const void*, int) {});
    if (lane == 0) arrive_expecting(barrier, total);
    __syncwarp();
    visit(unit, [&](int at, const void* from, int bytes) { bulk_copy(shared_address(to + at), from, bytes, barrier); });
  };

  if (warp == p.warps) {
    if (lane == 0) {
      for (int s = 0; s < p.stages; ++s) init_barrier(full + 8 * s, 1), init_barrier(empty + 8 * s, p.warps);
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncwarp();
    for (int u = 0; u < min(units, p.stages); ++u) fill(u, u);
    for (int u = p.stages; u < min(units, p.stages + kPrefetched); ++u)
      visit(u, [](int, const void* from, int bytes) { bulk_prefetch(from, bytes); });
  }
  // what the epilogue needs of a channel, for a thread's own row of the round
  const int count = 32 * p.warps;
  const auto channel_of = [&](int strip) {
    const int at = strip * kStripRows + threadIdx.x;
    return threadIdx.x < min(p.round, end - strip) * kStripRows ? channel_at<kKind>(q, at) : Channel{};
  };
  Channel channel = warp < p.warps ? channel_of(begin) : Channel{};

  float in_scale = 1.f;
  RawOctet gain[HELD ? HELD : 1] = {};
  if constexpr (HELD > 0) {
    if (p.s.in_scale) in_scale = __uint_as_float(constant_word(p.s.in_scale));
#pragma unroll
    for (int h = 0; h < HELD; ++h) {
      const int at = threadIdx.x + h * blockDim.x;
      if (p.s.norm_weight && at * kOctet < q.K) gain[h] = constant_octet(p.s.norm_weight, p.s.norm_weight_dtype, at);
    }
  }
  if constexpr (HELD > 0) {
    // First on zeros, so that the instructions have been fetched when the turn comes: the weights of a layer drive them out
    // of the caches in between.
#pragma unroll 1
    for (int real = 0; real < 2; ++real) {
      if (real) wait_for_previous_kernel();
      make_input<HELD>(x, x_scales, reinterpret_cast<float*>(sums), gain, in_scale, p, real);
      __syncthreads();
    }
  } else {
    wait_for_previous_kernel();
    if (threadIdx.x < q.M) x_scales[threadIdx.x] = __ldcg(q.x_scale + (q.x_scale_count > 1 ? threadIdx.x : 0));
    copy_input(x, p);
    __syncthreads();
  }
  if (warp > p.warps) return;

  if (warp == p.warps) {
    for (int u = p.stages; u < units; ++u) {
      wait(empty + 8 * (u % p.stages), (u / p.stages - 1) & 1);
      fill(u, u % p.stages);
      const int ahead = u + kPrefetched;
      if (ahead < units) visit(ahead, [](int, const void* from, int bytes) { bulk_prefetch(from, bytes); });
    }
    return;
  }

  const int tokens = q.M, slot = min(lane / 4, tokens - 1) * 4 + lane % 4, step_pieces = kPieces * p.x_slots * 4;
  const int slice = p.round * tokens * p.token_pitch;  // of a warp's sums
  int stage = 0, parity = 0;
  uint32_t phase = 0;
  for (int strip = begin; strip < end; strip += p.round, parity ^= 1) {
    uint32_t* const mine = sums + parity * (p.sums_bytes / 4) + warp * slice;
    const int last = min(strip + p.round, end);
    if (strip != begin) channel = channel_of(strip);
    // what the thread adds to its first result is on its way while it multiplies
    const int rows = (last - strip) * kStripRows, first_n = strip * kStripRows + threadIdx.x % rows;
    float early = -0.0f;
    if (q.residual && threadIdx.x < rows * tokens && first_n < q.O)
      early = load_float(q.residual, static_cast<int64_t>(threadIdx.x / rows) * q.O + first_n, q.residual_dtype);
    const auto multiply_strips = [&](auto strips, int at) {
      constexpr int R = decltype(strips)::value;
      int acc[R][1][4] = {};
#pragma unroll 1
      for (int run = 0; run < p.runs; ++run) {
        const char *w[R], *scale[R];
        uint32_t left[R];
#pragma unroll
        for (int r = 0; r < R; ++r) {
          wait(full + 8 * stage, phase);
          left[r] = empty + 8 * stage;
          const char* const from = stages + stage * p.stage_bytes;
          w[r] = from + lane / 8 * p.pitch + lane / 4 % 2 * p.odd + lane % 4 * 16;
          scale[r] = from + kStripRows / 2 * p.pitch + lane / 4 * p.scale_bytes;
          if (++stage == p.stages) stage = 0, phase ^= 1;
        }
        const int steps = min(p.run_steps, p.steps - run * p.run_steps);
#pragma unroll 2
        for (int s = warp; s < steps; s += p.warps) {
          const int whole = run * p.run_steps + s;
          Step<R> step;
          const unsigned group = min(whole * 4 * p.group_magic >> kMagicBits, p.groups - 1u);
#pragma unroll
          for (int r = 0; r < R; ++r)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              step.w[r][h] = *reinterpret_cast<const uint4*>(w[r] + s * kStepBytes + h * 4 * p.pitch);
              const char* const of = scale[r] + h * 8 * p.scale_bytes;
              step.scale[r][h] = reinterpret_cast<const uint8_t*>(of)[group];
            }
          multiply<kKind, false, R, 1>(acc, step, x + whole * step_pieces, slot, p.x_plane);
        }
        __syncwarp();
#pragma unroll
        for (int r = 0; r < R; ++r)
          if (lane == r) arrive(left[r]);
      }
#pragma unroll
      for (int r = 0; r < R; ++r)
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const int token = lane % 4 * 2 + c % 2;
          if (token < tokens)
            reinterpret_cast<int*>(mine)[((at + r - strip) * tokens + token) * p.token_pitch + lane / 4 + c / 2 * 8] =
                acc[r][0][c];
        }
    };
    int at = strip;
#pragma unroll 1
    for (; at + 1 < last; at += 2) multiply_strips(std::integral_constant<int, 2>{}, at);
    if (at < last) multiply_strips(std::integral_constant<int, 1>{}, at);
    if (threadIdx.x < rows) channels[threadIdx.x + parity * p.round * kStripRows] = channel;
    sync_threads(1, count);
    const uint32_t* const from = sums + parity * (p.sums_bytes / 4);
    for (int i = threadIdx.x; i < rows * tokens; i += count) {
      const int token = i / rows, r = i - token * rows, n = strip * kStripRows + r;
      if (n >= q.O) continue;
      const int64_t to = static_cast<int64_t>(token) * q.O + n;
      const float residual =
          q.residual && i != threadIdx.x ? load_float(q.residual, to, q.residual_dtype) : early;
      const float v = static_cast<float>(
          sum<int>(from + (r / kStripRows * tokens + token) * p.token_pitch + r % kStripRows, p.warps, slice));
      finish<kKind>(q, channels[r + parity * p.round * kStripRows], v, x_scales[token], residual, to);
    }
  }
}

// The sizes that follow, a block taking up to `most` strips; false where the problem does not fit.
bool plan(Params& p, const Device& d, int most) {
  const QuambaLinear& q = p.s.linear;
  p.row_bytes = q.K / 2, p.steps = (p.row_bytes + kStepBytes - 1) / kStepBytes;
  p.groups = p.scale_bytes = q.K / q.S;
  const unsigned per_group = q.S / 32;
  p.group_magic = ((1u << skinny::kMagicBits) + per_group - 1) / per_group;
  if (q.O % kStripRows && q.O % kStripRows * p.scale_bytes % 16) return false;  // a copy is a multiple of 16 bytes
  p.runs = (p.row_bytes + kRunBytes - 1) / kRunBytes;
  p.run_steps = (p.steps + p.runs - 1) / p.runs;
  p.runs = (p.steps + p.run_steps - 1) / p.run_steps;
  // as many warps as share the steps of a run evenly
  p.warps = kWarps;
  int least = (p.run_steps + kWarps - 1) / kWarps;
  while (p.warps > 4 && (p.run_steps + p.warps - 2) / (p.warps - 1) == least) --p.warps;
  const int run_bytes = p.run_steps * kStepBytes;
  p.odd = run_bytes % 128 ? run_bytes : run_bytes + 64;  // so that the two rows of a quarter of a warp share no bank
  p.pitch = p.odd + run_bytes;
  p.stage_bytes = kStripRows / 2 * p.pitch + kStripRows * p.scale_bytes;
  p.stage_bytes += -p.stage_bytes & 127;
  p.x_slots = q.M == 1 ? 1 : q.M + q.M % 2;
  p.x_plane = p.x_slots == 1 ? 0 : p.x_slots * 4;  // of one token the pieces lie side by side already
  p.x_bytes = p.steps * kPieces * p.x_slots * 4 * 16;
  p.token_pitch = q.M == 1 ? kStripRows : kStripRows + 4;
  p.round = std::max(1, std::min({6, 12288 / (p.warps * q.M * p.token_pitch * 4), 32 * p.warps / kStripRows}));
  p.round = p.round >= most ? most : std::max(2, p.round / 2 * 2);  // pairs of strips do not part
  p.sums = most > p.round ? 2 : 1;
  p.sums_bytes = p.warps * p.round * q.M * p.token_pitch * 4;
  const int prologue = p.s.prologue ? 2 * 4 * (kWarps + 1) : 0;
  const int epilogue = p.sums * (p.sums_bytes + p.round * kStripRows * static_cast<int>(sizeof(Channel)));
  p.shared_bytes = 16 * kMaxStages + 64 + p.x_bytes + std::max(prologue, epilogue);
  // A linear with much to keep takes more than half of a multiprocessor, so that its blocks, which come while others still
  // run, do not crowd two on one; what follows it has the rest to arrive beside it. Others are kept apart by registers.
  const int all = d.shared_per_sm - 2048, wanted = std::min(most * p.runs, kMaxStages);
  const auto within = [&](int bytes) { return std::min((bytes - p.shared_bytes) / p.stage_bytes, wanted); };
  const bool large = p.shared_bytes + wanted * p.stage_bytes > d.shared_per_sm / 2;
  p.stages = within(large ? all * 5 / 8 : all * 3 / 8);
  if (p.stages < std::min(3, wanted)) p.stages = within(d.shared_per_block);
  p.shared_bytes += p.stages * p.stage_bytes;
  if (large) p.shared_bytes = std::max(p.shared_bytes, d.shared_per_sm / 2);
  p.idle = !large && !p.s.prologue && p.strips >= d.sms ? kIdleWarps : 0;
  return p.stages >= std::min(2, wanted);
}

int launch(const QuambaStream& s, cudaStream_t stream) {
  const QuambaLinear& q = s.linear;
  if (q.M < 1 || q.M > (s.prologue ? kPrologueTokens : kMaxTokens) || q.O < 8 || q.O % 8 || q.K < 128 || q.K % 32 ||
      q.K > kMaxK)
    return QUAMBA_UNSUPPORTED;
  if (q.S < 32 || q.S % 32 || q.K % q.S || (q.S % 128 && q.S != q.K)) return QUAMBA_UNSUPPORTED;
  for (const void* at : {q.x, q.w, static_cast<const void*>(q.w_scale), q.w_multiplier, s.norm_weight})
    if (reinterpret_cast<uintptr_t>(at) % 16) return QUAMBA_UNSUPPORTED;
  Params p{};
  p.s = s;
  int ordinal = 0;
  Device d{};
  cudaError_t error = cudaGetDevice(&ordinal);
  if (error == cudaSuccess) error = describe(ordinal, d);
  if (error != cudaSuccess) return error;
  p.strips = (q.O + kStripRows - 1) / kStripRows;
  const int blocks = std::min(d.sms, p.strips);
  if (!plan(p, d, (p.strips + blocks - 1) / blocks)) return QUAMBA_UNSUPPORTED;
  const int octets = p.steps * kPieces * 4 * (kPiece / kOctet), threads = 32 * (p.warps + 1 + p.idle);
  const int held = s.prologue ? (octets + threads - 1) / threads : 0;
  if (held > kMostHeld) return QUAMBA_UNSUPPORTED;
  constexpr decltype(&linear_stream<0>) kKernels[] = {linear_stream<0>, linear_stream<1>, linear_stream<2>,
                                                      linear_stream<3>, linear_stream<4>};
  const auto kernel = kKernels[held];
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, d.shared_per_block);
  if (error == cudaSuccess) error = prefer_shared(kernel);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = p.shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  error = cudaLaunchKernelEx(&config, kernel, p);
  return error != cudaSuccess ? error : cudaGetLastError();
}

}  // namespace quamba::stream

extern "C" int quamba_linear_w4a8_stream(const QuambaStream* s, void* stream) {
  return quamba::stream::launch(*s, static_cast<cudaStream_t>(stream));
}
