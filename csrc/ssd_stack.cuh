// One token of one sequence through a stack of Mamba2 blocks, in one launch on Hopper.
//
// At batch 1 a step is bound by its weights' bytes if nothing else takes time, and everything does: with a kernel for each
// part, every one of them waits for its predecessor, for its instructions, which the weights have driven out of the caches,
// and for its weights. Here one block stays on each multiprocessor for all layers, so that the code stays where it is and
// weights stream without a pause (stack_ring.cuh); what is left between the parts are barriers of the grid, three a layer:
//
//   norm, codes (every block for itself); in_proj, a share of the rows            | barrier
//   convolution, B and C (every block of a group for itself); rows of the state   | barrier
//   norm, rotation, codes (every block for itself); out_proj, a share of the rows | barrier
//
// That every block makes the whole input of its linears costs less than another barrier.
//
// Hazards. What one block writes for others (projected, u, the residual y) is read after a barrier, through L2. y is replaced
// row by row by the block that owns the row, after the barrier behind which nobody reads it as the input of this layer. The
// convolution's state of B and C is read by all blocks of a group and shifted by the first of them behind the next barrier, as
// the step of the rounding is advanced. The launch is cooperative: all blocks run, or none does.
#pragma once

#include <algorithm>

#include "decode_state.cuh"
#include "finish.cuh"
#include "hadamard.cuh"
#include "launch.cuh"
#include "linear_skinny_epilogue.cuh"
#include "quads.cuh"
#include "stack_products.cuh"

namespace quamba::stack {

using decode::Rates;
using decode::Row;

constexpr int kThreads = kTeam + 32;
constexpr int kN = 128, kMostRows = 64;  // d_state; rows of the state that a block has, at most
constexpr int kQuads = 4;                // of a row of activations that a thread has, at most
constexpr int kRun = 128;                // channels of a warp's quads
constexpr int kMostLayers = 64;
constexpr int kScratch = 2 * kWarps;  // floats

// Groups of a norm: how many, runs of kRun channels in each (a power of two where there are several), 1 / their channels.
struct Groups {
  int count, runs;
  float share;
};

struct Params {
  QuambaDecode mixer;
  Matrix matrix[2];    // in_proj, out_proj
  const float* x;      // the residual stream
  float* y;
  void* projected;     // what in_proj makes, of the activations' type
  float* u;            // what the mixer makes, before its norm
  unsigned* arrivals;  // at barriers of the grid
  Groups groups[2];    // of the norms before them
  Rotation rotation;
  int layers;
  int rows, blocks;    // of the state: of a block; blocks of a group
  int stages, stage_bytes, x_bytes, sums_bytes;
  float eps;
  QuambaStackLayer layer[kMostLayers];
};

// A quad of channels for each i: channels 4 (i kTeam + threadIdx.x) on. Loops over i end where a row does.
using Quads = float[kQuads][4];

__device__ __forceinline__ int quad_of(int i) { return i * kTeam + threadIdx.x; }

#define QUAMBA_EACH_QUAD(i, channels)            \
  _Pragma("unroll") for (int i = 0; i < kQuads; ++i) \
    if (i * kTeam * 4 < (channels))

// Barrier of the grid, in two halves: what the block has written before is seen by all behind the second.
__device__ __forceinline__ void arrive_grid(const Params& p) {
  Team::sync();
  if (threadIdx.x == 0) asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(p.arrivals) : "memory");
}

__device__ __forceinline__ void wait_grid(const Params& p, unsigned& barriers) {
  const unsigned wanted = ++barriers * gridDim.x;
  if (threadIdx.x == 0) {
    unsigned arrived;
#ifdef QUAMBA_TUNE
    long long polls = 0;
#endif
    do {
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(arrived) : "l"(p.arrivals) : "memory");
#ifdef QUAMBA_TUNE
      if (++polls > 1 << 22) __trap();  // a lost arrival would hang the device
#endif
    } while (arrived < wanted);
  }
  Team::sync();
}

// The gains of a norm, of the activations' type, as they lie.
using RawQuads = uint2[kQuads];

__device__ __forceinline__ void load_gains(RawQuads& raw, const void* weight, int channels) {
  if (!weight) return;
  QUAMBA_EACH_QUAD(i, channels) {
    raw[i] = make_uint2(0, 0);
    if (quad_of(i) * 4 < channels) raw[i] = constant_pair(static_cast<const uint2*>(weight) + quad_of(i));
  }
}

// v <- v / rms(v) * gain, the root mean square being that of each group of channels. runs: a float for every kRun channels.
template <bool HALF>
__device__ __forceinline__ void normalise(Quads& v, int channels, const Groups& g, float eps, bool weighted,
                                          const RawQuads& gain, float* runs) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  QUAMBA_EACH_QUAD(i, channels) {
    const float sum = decode::sum_lanes<32>((v[i][0] * v[i][0] + v[i][1] * v[i][1]) + (v[i][2] * v[i][2] + v[i][3] * v[i][3]));
    if (lane == 0) runs[i * kWarps + warp] = sum;  // zeros beyond the row
  }
  Team::sync();
  float inverse = 0.f;
  QUAMBA_EACH_QUAD(i, channels) {
    if (i == 0 || g.count > 1) {
      const float* const from = runs + (g.count > 1 ? (i * kWarps + warp & -g.runs) : 0);
      float sum = lane < g.runs ? from[lane] : 0.f;
      if (lane + 32 < g.runs) sum += from[lane + 32];
      inverse = rsqrtf(decode::sum_lanes<32>(sum) * g.share + eps);
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) v[i][j] = __fmul_rn(v[i][j], inverse);
    if (weighted) {
      const float2 low = pair_of<HALF>(gain[i].x), high = pair_of<HALF>(gain[i].y);
      v[i][0] = __fmul_rn(v[i][0], low.x), v[i][1] = __fmul_rn(v[i][1], low.y);
      v[i][2] = __fmul_rn(v[i][2], high.x), v[i][3] = __fmul_rn(v[i][3], high.y);
    }
  }
}

// The rotation of hadamard.cuh: two factors 2 within a thread's quads, three at a time through shared memory, then the base.
__device__ __forceinline__ void rotate(Quads& v, float* row, int channels, const Rotation& r) {
  float* const own = row + padded(threadIdx.x * 4);
  QUAMBA_EACH_QUAD(i, channels) {
    if (r.bits > 0) {
      const float a = v[i][0] + v[i][1], b = v[i][0] - v[i][1], c = v[i][2] + v[i][3], d = v[i][2] - v[i][3];
      v[i][0] = a, v[i][1] = b, v[i][2] = c, v[i][3] = d;
    }
    if (r.bits > 1) {
      const float a = v[i][0] + v[i][2], b = v[i][1] + v[i][3], c = v[i][0] - v[i][2], d = v[i][1] - v[i][3];
      v[i][0] = a, v[i][1] = b, v[i][2] = c, v[i][3] = d;
    }
    if (quad_of(i) * 4 < channels)
#pragma unroll
      for (int j = 0; j < 4; ++j) own[i * padded(kTeam * 4) + j] = v[i][j];
  }
  Team::sync();
  int done = min(r.bits, 2);
#pragma unroll 1
  for (; r.bits - done >= 3; done += 3) hadamard::pass<8, false, Team>(row, channels, done);
#pragma unroll 1
  for (; done < r.bits; ++done) hadamard::pass<2, false, Team>(row, channels, done);
  if (r.base == 12) hadamard::pass<12, true, Team>(row, channels, r.bits);
  if (r.base == 20) hadamard::pass<20, true, Team>(row, channels, r.bits);
  QUAMBA_EACH_QUAD(i, channels)
    if (quad_of(i) * 4 < channels)
#pragma unroll
      for (int j = 0; j < 4; ++j) v[i][j] = own[i * padded(kTeam * 4) + j] * r.gain;
}

// v as the input of a linear: codes by a static scale or the token's own, or floats of the activations' type. Ends with a
// sync; returns the scale.
template <Kind KIND, bool HALF>
__device__ __forceinline__ float put_input(const Quads& v, int channels, const float* static_scale, char* x,
                                           float* scratch) {
  float scale = 1.f;
  if constexpr (kInteger<KIND>) {
    if (static_scale) {
      scale = __uint_as_float(constant_word(static_scale));
    } else {
      float peak = 0.f;
      QUAMBA_EACH_QUAD(i, channels)
#pragma unroll
        for (int j = 0; j < 4; ++j) peak = fmaxf(peak, fabsf(v[i][j]));
      peak = decode::max_lanes<32>(peak);
      if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = peak;
      Team::sync();
      peak = decode::max_lanes<16>(scratch[threadIdx.x % kWarps]);
      scale = peak > 0.f ? __fdiv_rn(peak, 127.f) : 1.f;
    }
  }
  const Grid grid = make_grid(scale);
  QUAMBA_EACH_QUAD(i, channels) {
    const int quad = quad_of(i), k = quad * 4;
    if (k < channels) {
      if constexpr (kInteger<KIND>) {
        unsigned code[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) code[j] = __float_as_uint(code_on(v[i][j], grid) + kRounder);
        if constexpr (KIND == Kind::kW8A8) {
          reinterpret_cast<unsigned*>(x)[quad] =
              __byte_perm(__byte_perm(code[0], code[1], 0x0040), __byte_perm(code[2], code[3], 0x0040), 0x5410);
        } else {
          unsigned short* const to = reinterpret_cast<unsigned short*>(x + k / 8 * 8 + k % 8 / 2);
          to[0] = static_cast<unsigned short>(__byte_perm(code[0], code[2], 0x0040));
          to[2] = static_cast<unsigned short>(__byte_perm(code[1], code[3], 0x0040));
        }
      } else {
        const int piece = k / 8, step = piece / 16, t = piece / 4 % 4, at = piece % 4;
        *reinterpret_cast<uint2*>(x + (step * 32 + at * 8 + (t ^ (2 * at))) * 16 + k % 8 * 2) =
            make_uint2(pack_pair(v[i][0], v[i][1], HALF), pack_pair(v[i][2], v[i][3], HALF));
      }
    }
  }
  Team::sync();
  return scale;
}

// What a block has of the mixers.
struct Part {
  int group, first, rows, channel0;  // rows of the state: of its group, among all

  __device__ __forceinline__ Part(const Params& p) {
    const int group_rows = p.mixer.H / p.mixer.G * p.mixer.P;
    group = blockIdx.x / p.blocks, first = (blockIdx.x - group * p.blocks) * p.rows;
    rows = group < p.mixer.G ? max(0, min(p.rows, group_rows - first)) : 0;
    channel0 = group * group_rows + first;
  }
};

// What the block will read of a mixer and of the epilogues, into L2 ahead of time: a lane a tensor, of the convolution's three
// a stretch (x, B, C).
template <bool CODES, typename State>
__device__ __forceinline__ void ask_for_mixer(const Params& p, const QuambaStackLayer& l, const Part& part, const Share& of_in,
                                              const Share& of_out) {
  const QuambaDecode& q = p.mixer;
  const int lane = threadIdx.x % 32, stretch = lane % 3, inner = q.H * q.P;
  const int first = stretch ? inner + (stretch - 1) * q.G * kN + part.group * kN : part.channel0;
  const int count = part.rows <= 0 ? 0 : stretch ? kN : part.rows, own = part.rows;
  switch (lane / 3) {
    case 0:
    case 1:
    case 2:
      return ask_for(l.conv_state, static_cast<int64_t>(lane / 3) * q.channels + first, count, CODES ? 1 : 2);
    case 3:
      return ask_for(l.conv_weight, first, count, CODES ? 4 : 8);
    case 4:
      return ask_for(l.conv_weight_scale, first, count, 4);
    case 5:
      return ask_for(l.conv_out_scale, first, count, 4);
    case 6:
      return ask_for(l.conv_in_scale, q.conv_in_count > 1 ? first : 0, q.conv_in_count > 1 ? count : 1, 4);
    case 7:
      return ask_for(l.conv_bias, first, count, 2);
  }
  if (lane == 24) ask_for(l.state, static_cast<int64_t>(part.channel0) * kN, own * kN, sizeof(State));
  if (lane == 25) ask_for(l.state_scale, part.channel0, own, 4);
  if (lane == 26) ask_for(l.x_scale, q.x_count > 1 ? part.channel0 : 0, q.x_count > 1 ? own : 1, 4);
  if (lane == 27) ask_for(l.z_scale, q.z_count > 1 ? part.channel0 : 0, q.z_count > 1 ? own : 1, 4);
  if (lane == 28 && blockIdx.x % 16 == 0) ask_for(l.gate_weight, 0, inner, 2), ask_for(l.norm_weight, 0, p.matrix[0].K, 2);
  if (lane == 29 && CODES) ask_for(l.in.w_scale, of_in.first, of_in.rows, 4);
  if (lane == 30 && CODES) ask_for(l.out.w_scale, of_out.first, of_out.rows, 4);
  if (lane == 31 && blockIdx.x % 16 == 0) {
    ask_for(l.A, 0, q.H, 4), ask_for(l.D, 0, q.H, 4), ask_for(l.dt_bias, 0, q.H, 4);
    ask_for(l.rng, 0, 2, 8), ask_for(l.in_scale, 0, 1, 4), ask_for(l.out_scale, 0, 1, 4);
  }
}

// The weights of all layers, in the order in which they are used.
template <Kind KIND, typename State>
__device__ __forceinline__ void bring_all(const Params& p, const Ring& ring) {
  Stage stage{0, 0};
  const Part part(p);
  const Share of_in(p.matrix[0]), of_out(p.matrix[1]);
#pragma unroll 1
  for (int turn = 0; turn < 2 * p.layers; ++turn) {
    const QuambaStackLayer& l = p.layer[turn / 2];
    const QuambaStackLinear& linear = turn & 1 ? l.out : l.in;
    if (!(turn & 1)) ask_for_mixer<kInteger<KIND>, State>(p, l, part, of_in, of_out);
    bring<kRows<KIND>>(ring, p.matrix[turn & 1], turn & 1 ? of_out : of_in, linear.w,
                       KIND == Kind::kW4A8 ? linear.w_multiplier : linear.w_scale, stage);
  }
}

// The mixer of a layer as the decode kernels see it.
template <bool CODES, int TYPE>
__device__ __forceinline__ QuambaDecode mixer_of(const Params& p, const QuambaStackLayer& l) {
  QuambaDecode q = p.mixer;
  const int bytes = 2, inner = q.H * q.P, shared = q.G * q.N;
  const char* const projected = static_cast<const char*>(p.projected);
  q.in = q.conv_bias_type = TYPE, q.conv_state_type = q.conv_weight_type = CODES ? QUAMBA_I8 : TYPE;
  q.z = projected, q.x = projected + bytes * inner, q.dt = projected + bytes * (2 * inner + 2 * shared);
  q.conv_state = l.conv_state, q.conv_weight = l.conv_weight, q.conv_bias = l.conv_bias;
  q.conv_weight_scale = CODES ? l.conv_weight_scale : nullptr;
  q.conv_in_scale = CODES ? l.conv_in_scale : nullptr, q.conv_out_scale = CODES ? l.conv_out_scale : nullptr;
  q.x_scale = CODES ? l.x_scale : nullptr, q.B_scale = CODES ? l.B_scale : nullptr, q.C_scale = CODES ? l.C_scale : nullptr;
  q.z_scale = CODES ? l.z_scale : nullptr;
  q.A = l.A, q.D = l.D, q.dt_bias = l.dt_bias, q.rng = l.rng;
  return q;
}

// Shared memory of the part between the linears.
struct Between {
  float B[kN], C[kN];
  unsigned columns[kN];
  Row info[kMostRows];
  unsigned draws[kMostRows];
};

template <Kind KIND, typename State, int TYPE>
__global__ void __launch_bounds__(kThreads, 1) ssd_stack(const __grid_constant__ Params p) {
  constexpr bool kCodes = kInteger<KIND>, kStateCodes = sizeof(State) == 1, kHalf = TYPE == QUAMBA_F16;
  constexpr int kCount = 16 / sizeof(State), kLanes = kN / kCount, kPass = kTeam / kLanes, kPasses = kMostRows / kPass;
  using Stored = decode::Stored<State, kCount>;
  extern __shared__ __align__(128) char shared[];
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);

  char* const stages = shared + 16 * kMaxStages;
  char* const x = stages + p.stages * p.stage_bytes;
  uint32_t* const sums = reinterpret_cast<uint32_t*>(x + p.x_bytes);
  Between& between = *reinterpret_cast<Between*>(reinterpret_cast<char*>(sums) + p.sums_bytes);
  float* const scratch = reinterpret_cast<float*>(&between + 1);
  float* const runs = scratch + kScratch;
  float* const row = runs + kQuads * kWarps;
  const Ring ring{shared_address(shared), shared_address(shared) + 8 * kMaxStages, stages, p.stages, p.stage_bytes};
  if (threadIdx.x == kTeam) ring.init();
  __syncthreads();

  if (warp == kWarps) {
    bring_all<KIND, State>(p, ring);
    return;
  }

  const int inner = p.matrix[1].K;
  const Share of_in(p.matrix[0]), of_out(p.matrix[1]);
  const Part part(p);
  const int group = part.group, first = part.first, rows = part.rows, channel0 = part.channel0;
  // a thread's channel of the convolution: of B and C, or of the block's rows of x
  const bool is_row = threadIdx.x >= 2 * kN, is_B = threadIdx.x < kN;
  const bool exists = rows > 0 && (!is_row || static_cast<int>(threadIdx.x) - 2 * kN < rows);
  const int own_row = threadIdx.x - 2 * kN;
  const int place = !exists  ? 0
                    : is_row ? channel0 + own_row
                             : inner + (is_B ? 0 : (p.mixer.G - 1) * kN) + group * kN + static_cast<int>(threadIdx.x);
  const int head = is_row && exists ? place / p.mixer.P : 0;

  Stage stage{0, 0};
  unsigned barriers = 0;
  RawQuads gain;
  decode::Window window{};
  float conv_in = 1.f;
  load_gains(gain, p.layer[0].norm_weight, p.matrix[0].K);

  // in_proj and out_proj of every layer in turn: what they share is there once, as instructions have to be fetched, too
#pragma unroll 1
  for (int turn = 0; turn < 2 * p.layers; ++turn) {
    const int out = turn & 1;
    const QuambaStackLayer& l = p.layer[turn / 2];
    const QuambaStackLinear& linear = out ? l.out : l.in;
    const Matrix& m = p.matrix[out];
    const Share share = out ? of_out : of_in;
    const float* const residual = turn < 2 ? p.x : p.y;
    const bool owner = static_cast<int>(threadIdx.x) < share.rows;
    const int own = share.first + threadIdx.x;

    Quads v;
    const float* const from = out ? p.u : residual;
    QUAMBA_EACH_QUAD(i, m.K) {
      const float4 four = quad_of(i) * 4 < m.K ? __ldcg(reinterpret_cast<const float4*>(from) + quad_of(i))
                                               : make_float4(0.f, 0.f, 0.f, 0.f);
      v[i][0] = four.x, v[i][1] = four.y, v[i][2] = four.z, v[i][3] = four.w;
    }
    float weight_scale = 1.f, before = -0.f;
    if (owner) {
      if (kCodes) weight_scale = __uint_as_float(constant_word(static_cast<const float*>(linear.w_scale) + own));
      if (out) before = __ldcg(residual + own);
    }
    if (out) {  // behind the barrier, so that all have read them
      if (exists && !is_row && first == 0) {
        const QuambaDecode q = mixer_of<kCodes, TYPE>(p, l);
        decode::shift<kCodes>(q, conv_in, {0, place, q.x, place, {0, window.past[1], window.past[2]}, window.x});
      }
      if (kStateCodes && l.rng && blockIdx.x == 0 && threadIdx.x == 0) l.rng[1] = __ldcg(l.rng + 1) + 1;
    }
    if (p.groups[out].count)
      normalise<kHalf>(v, m.K, p.groups[out], out ? p.mixer.eps : p.eps, (out ? l.gate_weight : l.norm_weight) != nullptr, gain, runs);
    if (out && p.rotation.base) rotate(v, row, m.K, p.rotation);
    const float x_scale = put_input<KIND, kHalf>(v, m.K, out ? l.out_scale : l.in_scale, x, scratch);
    products<KIND>(ring, m, share, stage, x, sums);
    Team::sync();
    if (owner) {
      float sum = sum_of<KIND>(m, sums, threadIdx.x);
      if (kCodes) sum = __fmul_rn(__fmul_rn(sum, x_scale), weight_scale);
      if (linear.bias) sum = __fadd_rn(sum, skinny::load_float(linear.bias, own, TYPE));
      if (out)
        p.y[own] = __fadd_rn(sum, before);
      else
        skinny::store_float(p.projected, own, TYPE, sum);
    }
    if (turn + 1 == 2 * p.layers) break;
    arrive_grid(p);

    if (!out) {
      // what the mixer has from before this token is fetched while others finish
      const QuambaDecode q = mixer_of<kCodes, TYPE>(p, l);
      decode::Taps taps{};
      Rates rates{};
      float unit = 1.f;
      if (exists) {
        taps = decode::taps_of<kCodes>(q, place);
        window = {0, place, q.x, place};  // B and C follow x
        conv_in = taps.in;
#pragma unroll
        for (int w = 0; w < decode::kWidth - 1; ++w)
          window.past[w] = decode::fetch(q.conv_state, decode::Types<kCodes>::state(q), decode::conv_place(q, window, w));
        if (is_row) {
          unit = decode::constant(q.x_scale, q.x_count > 1 ? place : 0, 1.f);
          rates = {decode::constant(q.A, head, 0.f), decode::constant(q.D, head, 0.f), decode::constant(q.dt_bias, head, 0.f),
                   decode::constant(q.z_scale, q.z_count > 1 ? place : 0, 1.f)};
        } else {
          unit = is_B ? decode::constant(q.B_scale, q.B_count > 1 ? group : 0, 1.f)
                      : decode::constant(q.C_scale, q.C_count > 1 ? group : 0, 1.f);
        }
      }
      const int lane_row = threadIdx.x / kLanes, column = threadIdx.x % kLanes * kCount;
      State* const state = static_cast<State*>(l.state) + static_cast<int64_t>(channel0 + lane_row) * kN + column;
      float* const state_scale = kStateCodes ? l.state_scale + channel0 + lane_row : nullptr;
      Stored kept[kPasses];
      float scales[kPasses];
#pragma unroll
      for (int i = 0; i < kPasses; ++i) {
        kept[i] = {}, scales[i] = 1.f;
        if (i * kPass + lane_row >= rows) continue;
        kept[i].load(state + i * kPass * kN);
        if (kStateCodes) scales[i] = __ldcg(state_scale + i * kPass);
      }
      const bool noisy = kStateCodes && q.rng;
      if (noisy && static_cast<int>(threadIdx.x) < kN + rows) {
        const unsigned key = decode::dither_key(q.rng);
        if (threadIdx.x < kN)
          between.columns[threadIdx.x] = decode::column_draw(key, static_cast<unsigned>(inner) + threadIdx.x);
        else
          between.draws[threadIdx.x - kN] = decode::row_draw(key, static_cast<unsigned>(channel0) + threadIdx.x - kN);
      }
      wait_grid(p, barriers);

      if (exists) {
        window.x = decode::fetch(q.x, TYPE, place);
        unsigned dt_word = 0, z_word = 0;
        if (is_row) dt_word = decode::fetch(q.dt, TYPE, head), z_word = decode::fetch(q.z, TYPE, place);
        const float made = decode::convolve<kCodes>(q, taps, window) * unit;
        if (is_row) {
          decode::shift<kCodes>(q, taps.in, window);
          const float raw = __fadd_rn(decode::value(dt_word, q.dt, TYPE, head), rates.dt_bias);
          const float dt = fminf(fmaxf(decode::softplus(raw), q.dt_min), q.dt_max);
          between.info[own_row] = {expf(__fmul_rn(dt, rates.A)), __fmul_rn(dt, made), __fmul_rn(made, rates.D),
                                   decode::gate_of(q, decode::value(z_word, q.z, TYPE, place), rates.z_scale)};
        } else {
          between.B[threadIdx.x] = made;  // C follows B
        }
      }
      Team::sync();
      if (warp * 32 / kLanes < rows) {
        float B[kCount], C[kCount];
        unsigned dither[kStateCodes ? kCount : 1];
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          B[i] = between.B[column + i], C[i] = between.C[column + i];
          if constexpr (kStateCodes) dither[i] = noisy ? between.columns[column + i] : 0;
        }
#pragma unroll
        for (int i = 0; i < kPasses; ++i) {
          if (i * kPass >= rows) break;
          const int at = i * kPass + lane_row;
          const Row r = between.info[min(at, rows - 1)];
          float h[kCount];
          decode::unpack(kept[i], h);
          const float decay = kStateCodes ? r.decay * scales[i] : r.decay;
          float y = 0.f;
#pragma unroll
          for (int j = 0; j < kCount; ++j) {
            h[j] = fmaf(decay, h[j], r.input * B[j]);
            y = fmaf(h[j], C[j], y);
          }
          y = decode::sum_lanes<kLanes>(y);
          Stored stored;
          float scale = 0.f;
          if constexpr (kStateCodes)
            scale = decode::quantize_row<kLanes>(h, noisy, noisy ? between.draws[min(at, rows - 1)] : 0, dither, stored);
          else
            decode::pack(h, stored);
          if (at >= rows) continue;
          stored.store(state + i * kPass * kN);
          if (column == 0) {
            if (kStateCodes) state_scale[i * kPass] = scale;
            p.u[channel0 + at] = (y + r.skip) * r.gate;
          }
        }
      }
      arrive_grid(p);
    }
    load_gains(gain, out ? p.layer[turn / 2 + 1].norm_weight : l.gate_weight, p.matrix[!out].K);
    wait_grid(p, barriers);
  }
}

inline int64_t rounded_up(int64_t bytes) { return (bytes + 255) / 256 * 256; }

inline int outputs(const QuambaDecode& q) { return 2 * q.H * q.P + 2 * q.G * q.N + q.H; }

inline int64_t workspace_of(const QuambaDecode& q) {
  return 256 + rounded_up(2ll * outputs(q)) + rounded_up(4ll * q.H * q.P);
}

// A matrix of O rows of K; false where its stages would not be whole.
template <Kind KIND>
bool describe(Matrix& m, int O, int K, int S) {
  m = {};
  m.O = O, m.K = K, m.row_bytes = KIND == Kind::kW8A8 ? K : K / 2;
  if (O % kOctet || m.row_bytes % kStep || K > kQuads * 4 * kTeam) return false;
  m.steps = m.row_bytes / kStep;
  m.runs = (m.row_bytes + kRunBytes - 1) / kRunBytes;
  m.run_steps = (m.steps + m.runs - 1) / m.runs;
  m.runs = (m.steps + m.run_steps - 1) / m.run_steps;
  m.pitch = m.run_steps % 2 ? m.run_steps * kStep : (m.run_steps + 1) * kStep;
  if (KIND == Kind::kW8A8) return m.group_steps = 1, true;
  if (S < 128 || S % 128 || K % S) return false;
  m.scale_bytes = K / S * (kInteger<KIND> ? 1 : 2), m.group_steps = S / 128;
  return m.scale_bytes * kOctet % 16 == 0;
}

// The largest share of a matrix.
inline int most_rows(const Matrix& m, int blocks) { return (m.O / kOctet + blocks - 1) / blocks * kOctet; }

template <Kind KIND, typename State, int TYPE>
int launch(const QuambaStack& s, cudaStream_t stream) {
  const QuambaDecode& q = s.mixer;
  const int inner = q.H * q.P;
  constexpr bool kCodes = kInteger<KIND>;
  Params p{};
  p.mixer = q, p.x = s.x, p.y = s.y, p.eps = s.eps;
  if (q.batch != 1 || q.G < 1 || q.H % q.G || q.N != kN || inner % kRun || s.D % kRun || s.count < 1)
    return QUAMBA_UNSUPPORTED;
  if (q.conv_state_type != (kCodes ? QUAMBA_I8 : TYPE) || q.conv_weight_type != q.conv_state_type) return QUAMBA_UNSUPPORTED;
  const int groups = q.norm_groups, runs = groups > 0 ? inner / groups / kRun : 0;
  if (groups < 0 || (groups && (inner % (groups * kRun) || (groups > 1 && runs & (runs - 1))))) return QUAMBA_UNSUPPORTED;
  p.groups[0] = {1, s.D / kRun, 1.f / static_cast<float>(s.D)};
  p.groups[1] = {groups, runs, groups ? 1.f / static_cast<float>(runs * kRun) : 0.f};
  if (!make_rotation(q.block, p.rotation) || p.rotation.base > 20 || (p.rotation.base && inner % q.block))
    return QUAMBA_UNSUPPORTED;
  if (!describe<KIND>(p.matrix[0], outputs(q), s.D, s.S) || !describe<KIND>(p.matrix[1], s.D, inner, s.S))
    return QUAMBA_UNSUPPORTED;
  if (s.workspace_bytes < workspace_of(q)) return QUAMBA_UNSUPPORTED;
  int ordinal = 0, sms = 0, most = 0, cooperative = 0;
  cudaError_t error = cudaGetDevice(&ordinal);
  const auto get = [&](int& value, cudaDeviceAttr attribute) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&value, attribute, ordinal);
  };
  get(sms, cudaDevAttrMultiProcessorCount);
  get(most, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  get(cooperative, cudaDevAttrCooperativeLaunch);
  if (error != cudaSuccess) return error;
  if (!cooperative) return QUAMBA_UNSUPPORTED;

  const int group_rows = inner / q.G;
  p.blocks = sms / q.G;
  if (!p.blocks) return QUAMBA_UNSUPPORTED;
  p.rows = ((group_rows + p.blocks - 1) / p.blocks + 7) / 8 * 8;
  if (p.rows > kMostRows) return QUAMBA_UNSUPPORTED;

  int stage_bytes = 0, parts = 0;
  for (const Matrix& m : p.matrix) {
    const int strips = (most_rows(m, sms) + kRows<KIND> - 1) / kRows<KIND>;
    stage_bytes = std::max(stage_bytes, kRows<KIND> * (m.pitch + m.scale_bytes));
    parts = std::max(parts, strips * m.runs * kParts);
    p.x_bytes = std::max(p.x_bytes, m.steps * kStepX<KIND>);
    if (most_rows(m, sms) > kTeam) return QUAMBA_UNSUPPORTED;
  }
  p.stage_bytes = (stage_bytes + 127) / 128 * 128;
  p.sums_bytes = parts * kRows<KIND> * 4;
  const int others = 16 * kMaxStages + p.x_bytes + p.sums_bytes + static_cast<int>(sizeof(Between)) +
                     4 * (kScratch + kQuads * kWarps + padded(inner));
  p.stages = std::min((most - others) / p.stage_bytes, kMaxStages);
  if (p.stages < kWarps / kParts) return QUAMBA_UNSUPPORTED;

  char* at = static_cast<char*>(s.workspace);
  p.arrivals = reinterpret_cast<unsigned*>(at);
  p.projected = at + 256;
  p.u = reinterpret_cast<float*>(at + 256 + rounded_up(2ll * outputs(q)));

  const auto kernel = ssd_stack<KIND, State, TYPE>;
  const int bytes = others + p.stages * p.stage_bytes;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(sms);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  for (int layer = 0; error == cudaSuccess && layer < s.count; layer += kMostLayers) {
    p.layers = std::min(kMostLayers, s.count - layer);
    std::copy(s.layers + layer, s.layers + layer + p.layers, p.layer);
    if (layer) p.x = p.y;
    error = cudaMemsetAsync(p.arrivals, 0, sizeof(unsigned), stream);
    if (error == cudaSuccess) error = cudaLaunchKernelEx(&config, kernel, p);
  }
  return error != cudaSuccess ? error : cudaGetLastError();
}

// By the type of the states.
template <Kind KIND, int TYPE>
int launch(const QuambaStack& s, void* stream) {
  const auto to = static_cast<cudaStream_t>(stream);
  if (s.mixer.state_type == QUAMBA_I8) return launch<KIND, int8_t, TYPE>(s, to);
  if (s.mixer.state_type == QUAMBA_F16) return launch<KIND, __half, TYPE>(s, to);
  return QUAMBA_UNSUPPORTED;
}

// And of the activations.
template <Kind HALF, Kind BRAIN>
int launch(const QuambaStack& s, void* stream) {
  if (s.mixer.in == QUAMBA_F16) return launch<HALF, QUAMBA_F16>(s, stream);
  if (s.mixer.in == QUAMBA_BF16) return launch<BRAIN, QUAMBA_BF16>(s, stream);
  return QUAMBA_UNSUPPORTED;
}

}  // namespace quamba::stack
