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
constexpr int kN = 128, kPasses = 2;  // d_state; passes of the team over its rows of the state, at most
constexpr int kQuads = 4;             // of a row of activations that a thread has, at most
constexpr int kRun = 128;             // channels of a warp's quads
constexpr int kMostLayers = 64;
constexpr int kScratch = 2 * kWarps;  // floats

struct Params {
  QuambaDecode mixer;
  Matrix in, out;
  const void* x;
  void* y;
  void* projected;     // [in.O], of the activations' type
  float* u;            // [out.K]
  unsigned* arrivals;  // at barriers of the grid
  Rotation rotation;
  int layers, hidden_type, norm_weight_type, in_bias_type, out_bias_type;
  int rows, blocks;    // of the state: of a block; blocks of a group
  int stages, stage_bytes, x_bytes, sums_bytes;
  float eps;
  QuambaStackLayer layer[kMostLayers];
};

// A quad of channels for each i: channels 4 (i kTeam + threadIdx.x) on.
using Quads = float[kQuads][4];

__device__ __forceinline__ int quad_of(int i) { return i * kTeam + threadIdx.x; }

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

// The gains of a norm, as they lie; 16 bits fill x and y.
using RawQuads = uint4[kQuads];

__device__ __forceinline__ void load_gains(RawQuads& raw, const void* weight, int type, int channels) {
#pragma unroll
  for (int i = 0; i < kQuads; ++i) raw[i] = make_uint4(0, 0, 0, 0);
  if (!weight) return;
  if (type == QUAMBA_F32) {
#pragma unroll
    for (int i = 0; i < kQuads; ++i)
      if (quad_of(i) * 4 < channels) raw[i] = constant_quad(static_cast<const uint4*>(weight) + quad_of(i));
  } else {
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
      if (quad_of(i) * 4 >= channels) continue;
      const uint2 two = constant_pair(static_cast<const uint2*>(weight) + quad_of(i));
      raw[i].x = two.x, raw[i].y = two.y;
    }
  }
}

// v <- v / rms(v) * gain, the root mean square being that of each of `groups` groups of channels. runs: a float for every
// kRun channels. Ends without a sync.
__device__ __forceinline__ void normalise(Quads& v, int channels, int groups, float eps, const void* weight, int type,
                                          const RawQuads& gain, float* runs) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < kQuads; ++i) {
    const int run = quad_of(i) * 4 / kRun;
    const float sum = decode::sum_lanes<32>((v[i][0] * v[i][0] + v[i][1] * v[i][1]) + (v[i][2] * v[i][2] + v[i][3] * v[i][3]));
    if (lane == 0 && run * kRun < channels) runs[run] = sum;
  }
  Team::sync();
  const int of_group = channels / groups / kRun;
  float inverse = 0.f;
#pragma unroll
  for (int i = 0; i < kQuads; ++i) {
    if (i == 0 || groups > 1) {
      const int group = min(quad_of(i) * 4 / kRun / of_group, groups - 1);
      float sum = 0.f;
      for (int r = lane; r < of_group; r += 32) sum += runs[group * of_group + r];
      inverse = rsqrtf(decode::sum_lanes<32>(sum) / static_cast<float>(of_group * kRun) + eps);
    }
    const float4 g = weight ? to_floats(gain[i], type) : make_float4(1.f, 1.f, 1.f, 1.f);
    v[i][0] = __fmul_rn(__fmul_rn(v[i][0], inverse), g.x), v[i][1] = __fmul_rn(__fmul_rn(v[i][1], inverse), g.y);
    v[i][2] = __fmul_rn(__fmul_rn(v[i][2], inverse), g.z), v[i][3] = __fmul_rn(__fmul_rn(v[i][3], inverse), g.w);
  }
}

// v as the input of a linear: codes by a static scale or the token's own, or floats of the activations' type. Ends with a
// sync; returns the scale.
template <Kind KIND>
__device__ __forceinline__ float put_input(const Quads& v, int channels, const float* static_scale, int type, char* x,
                                           float* scratch) {
  float scale = 1.f;
  if constexpr (kInteger<KIND>) {
    if (static_scale) {
      scale = __uint_as_float(constant_word(static_scale));
    } else {
      float peak = 0.f;
#pragma unroll
      for (int i = 0; i < kQuads; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) peak = fmaxf(peak, fabsf(v[i][j]));
      peak = decode::max_lanes<32>(peak);
      if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = peak;
      Team::sync();
      peak = decode::max_lanes<16>(scratch[threadIdx.x % kWarps]);
      scale = peak > 0.f ? __fdiv_rn(peak, 127.f) : 1.f;
    }
  }
  const float inverse = __frcp_rn(scale);
#pragma unroll
  for (int i = 0; i < kQuads; ++i) {
    const int quad = quad_of(i), k = quad * 4;
    if (k >= channels) continue;
    if constexpr (kInteger<KIND>) {
      unsigned code[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) code[j] = to_code(v[i][j], scale, inverse);
      const unsigned first = __byte_perm(code[0], code[2], 0x0040), second = __byte_perm(code[1], code[3], 0x0040);
      if constexpr (KIND == Kind::kW8A8) {
        reinterpret_cast<unsigned*>(x)[quad] =
            __byte_perm(__byte_perm(code[0], code[1], 0x0040), __byte_perm(code[2], code[3], 0x0040), 0x5410);
      } else {
        char* const to = x + k / 8 * 8 + k % 8 / 2;
        *reinterpret_cast<unsigned short*>(to) = static_cast<unsigned short>(first);
        *reinterpret_cast<unsigned short*>(to + 4) = static_cast<unsigned short>(second);
      }
    } else {
      const int piece = k / 8, step = piece / 16, t = piece / 4 % 4, at = piece % 4;
      const bool half = type == QUAMBA_F16;
      *reinterpret_cast<uint2*>(x + (step * 32 + at * 8 + (t ^ (2 * at))) * 16 + k % 8 * 2) =
          make_uint2(pack_pair(v[i][0], v[i][1], half), pack_pair(v[i][2], v[i][3], half));
    }
  }
  Team::sync();
  return scale;
}

// What a thread has to do with the convolution: a channel of B and C, or one of its block's rows.
struct Channel {
  bool exists, row;
  int place;  // among the convolution's channels
  decode::Taps taps;
  decode::Window window;
  float unit;
};

// The mixer of a layer as the decode kernels see it.
__device__ __forceinline__ QuambaDecode mixer_of(const Params& p, const QuambaStackLayer& l) {
  QuambaDecode q = p.mixer;
  const int bytes = 2, inner = q.H * q.P, shared = q.G * q.N;
  const char* const projected = static_cast<const char*>(p.projected);
  q.z = projected, q.x = projected + bytes * inner, q.B = projected + bytes * 2 * inner;
  q.C = projected + bytes * (2 * inner + shared), q.dt = projected + bytes * (2 * inner + 2 * shared);
  q.conv_state = l.conv_state, q.conv_weight = l.conv_weight, q.conv_weight_scale = l.conv_weight_scale;
  q.conv_bias = l.conv_bias, q.conv_in_scale = l.conv_in_scale, q.conv_out_scale = l.conv_out_scale;
  q.state = l.state, q.state_scale = l.state_scale, q.rng = l.rng;
  q.A = l.A, q.D = l.D, q.dt_bias = l.dt_bias;
  q.x_scale = l.x_scale, q.B_scale = l.B_scale, q.C_scale = l.C_scale, q.z_scale = l.z_scale;
  q.norm_weight = l.gate_weight, q.out_scale = l.out_scale;
  return q;
}

// Shared memory of the part between the linears.
struct Between {
  float B[kN], C[kN];
  unsigned columns[kN];
  Row info[kTeam / 2];
  unsigned draws[kTeam / 2];
};

template <Kind KIND, typename State>
__global__ void __launch_bounds__(kThreads, 1) ssd_stack(const __grid_constant__ Params p) {
  constexpr bool kCodes = kInteger<KIND>, kStateCodes = sizeof(State) == 1;
  constexpr int kCount = 16 / sizeof(State), kLanes = kN / kCount, kPass = kTeam / kLanes;
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
    unsigned n = 0;
#pragma unroll 1
    for (int layer = 0; layer < p.layers; ++layer) {
      const QuambaStackLayer& l = p.layer[layer];
      constexpr bool kGrouped = KIND != Kind::kW8A8;
      n = bring<kRows<KIND>>(ring, p.in, l.in.w, kGrouped && kCodes ? l.in.w_multiplier : l.in.w_scale, n);
      n = bring<kRows<KIND>>(ring, p.out, l.out.w, kGrouped && kCodes ? l.out.w_multiplier : l.out.w_scale, n);
    }
    return;
  }

  const int hidden = p.out.O, inner = p.out.K, type = p.mixer.in;
  const Share in_share(p.in), out_share(p.out);
  const int group = blockIdx.x / p.blocks, group_rows = p.mixer.H / p.mixer.G * p.mixer.P;
  const int first = (blockIdx.x - group * p.blocks) * p.rows;
  const int rows = group < p.mixer.G ? min(p.rows, group_rows - first) : 0;  // none, or fewer, at the end
  const int channel0 = group * group_rows + first;
  unsigned n = 0, barriers = 0;
  RawQuads gain;
  load_gains(gain, p.layer[0].norm_weight, p.norm_weight_type, hidden);

#pragma unroll 1
  for (int layer = 0; layer < p.layers; ++layer) {
    const QuambaStackLayer& l = p.layer[layer];
    const void* const residual = layer ? p.y : p.x;

    Quads v;
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
      const bool inside = quad_of(i) * 4 < hidden;
      const float4 four = load_quad(residual, p.hidden_type, static_cast<long long>(quad_of(i)) * 4, inside ? 4 : 0, true);
      v[i][0] = four.x, v[i][1] = four.y, v[i][2] = four.z, v[i][3] = four.w;
    }
    const int own_in = in_share.first + min(static_cast<int>(threadIdx.x), max(in_share.rows, 1) - 1);
    const float in_scale = kCodes ? __uint_as_float(constant_word(static_cast<const float*>(l.in.w_scale) + own_in)) : 1.f;
    const float in_bias = l.in.bias ? skinny::load_float(l.in.bias, own_in, p.in_bias_type) : -0.f;
    normalise(v, hidden, 1, p.eps, l.norm_weight, p.norm_weight_type, gain, runs);
    float x_scale = put_input<KIND>(v, hidden, l.in_scale, type, x, scratch);
    n = products<KIND>(ring, p.in, in_share, n, x, sums);
    Team::sync();
    if (threadIdx.x < in_share.rows) {
      float sum = sum_of<KIND>(p.in, sums, threadIdx.x);
      if (kCodes) sum = __fmul_rn(__fmul_rn(sum, x_scale), in_scale);
      skinny::store_float(p.projected, own_in, type, __fadd_rn(sum, in_bias));
    }
    arrive_grid(p);

    // what the mixer has from before this token is fetched while others finish
    const QuambaDecode q = mixer_of(p, l);
    const int c = threadIdx.x;
    Channel own{};
    Rates rates{};
    own.row = c >= 2 * kN, own.exists = rows > 0 && (!own.row || c - 2 * kN < rows);
    const int head = own.row ? (channel0 + c - 2 * kN) / q.P : 0;
    if (own.exists) {
      const bool is_B = c < kN;
      own.place = own.row ? channel0 + c - 2 * kN : inner + (is_B ? group * kN + c : (q.G - 1 + group) * kN + c);
      own.taps = decode::taps_of<kCodes>(q, own.place);
      own.window = {0, own.place, q.x, own.place};  // B and C follow x
#pragma unroll
      for (int w = 0; w < decode::kWidth - 1; ++w)
        own.window.past[w] = decode::fetch(q.conv_state, decode::Types<kCodes>::state(q), decode::conv_place(q, own.window, w));
      if (own.row) {
        own.unit = decode::constant(q.x_scale, q.x_count > 1 ? own.place : 0, 1.f);
        rates = {decode::constant(q.A, head, 0.f), decode::constant(q.D, head, 0.f), decode::constant(q.dt_bias, head, 0.f),
                 decode::constant(q.z_scale, q.z_count > 1 ? own.place : 0, 1.f)};
      } else {
        own.unit = is_B ? decode::constant(q.B_scale, q.B_count > 1 ? group : 0, 1.f)
                        : decode::constant(q.C_scale, q.C_count > 1 ? group : 0, 1.f);
      }
    }
    const int lane_row = threadIdx.x / kLanes, column = threadIdx.x % kLanes * kCount;
    const auto state_at = [&](int at) { return static_cast<State*>(q.state) + static_cast<int64_t>(channel0 + at) * kN + column; };
    decode::Stored<State, kCount> kept[kPasses];
    float scales[kPasses];
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const int at = i * kPass + lane_row;
      kept[i] = {}, scales[i] = 1.f;
      if (at >= rows) continue;
      kept[i].load(state_at(at));
      if (kStateCodes) scales[i] = __ldcg(q.state_scale + channel0 + at);
    }
    const bool noisy = kStateCodes && q.rng;
    const unsigned key = noisy ? decode::dither_key(q.rng) : 0;
    if (noisy && rows > 0)
      for (int i = threadIdx.x; i < kN + rows; i += kTeam) {
        if (i < kN)
          between.columns[i] = decode::column_draw(key, static_cast<unsigned>(inner) + i);
        else
          between.draws[i - kN] = decode::row_draw(key, static_cast<unsigned>(channel0) + i - kN);
      }
    wait_grid(p, barriers);

    if (own.exists) {
      own.window.x = decode::fetch(q.x, type, own.place);
      unsigned dt_word = 0, z_word = 0;
      if (own.row) dt_word = decode::fetch(q.dt, type, head), z_word = decode::fetch(q.z, type, own.place);
      const float made = decode::convolve<kCodes>(q, own.taps, own.window) * own.unit;
      if (own.row) {
        decode::shift<kCodes>(q, own.taps.in, own.window);
        const float raw = __fadd_rn(decode::value(dt_word, q.dt, type, head), rates.dt_bias);
        const float dt = fminf(fmaxf(decode::softplus(raw), q.dt_min), q.dt_max);
        between.info[c - 2 * kN] = {expf(__fmul_rn(dt, rates.A)), __fmul_rn(dt, made), __fmul_rn(made, rates.D),
                                    decode::gate_of(q, decode::value(z_word, q.z, type, own.place), rates.z_scale)};
      } else {
        between.B[c] = made;  // C follows B
      }
    }
    Team::sync();
    if (rows > 0) {
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
        decode::Stored<State, kCount> stored;
        float scale = 0.f;
        if constexpr (kStateCodes)
          scale = decode::quantize_row<kLanes>(h, noisy, noisy ? between.draws[min(at, rows - 1)] : 0, dither, stored);
        else
          decode::pack(h, stored);
        if (at >= rows) continue;
        stored.store(state_at(at));
        if (column == 0) {
          if (kStateCodes) q.state_scale[channel0 + at] = scale;
          p.u[channel0 + at] = (y + r.skip) * r.gate;
        }
      }
    }
    arrive_grid(p);

    load_gains(gain, q.norm_weight, q.norm_weight_type, inner);
    const int own_out = out_share.first + min(static_cast<int>(threadIdx.x), max(out_share.rows, 1) - 1);
    const float out_scale = kCodes ? __uint_as_float(constant_word(static_cast<const float*>(l.out.w_scale) + own_out)) : 1.f;
    const float out_bias = l.out.bias ? skinny::load_float(l.out.bias, own_out, p.out_bias_type) : -0.f;
    const float before = skinny::load_float(residual, own_out, p.hidden_type);
    wait_grid(p, barriers);

#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
      const float4 four = quad_of(i) * 4 < inner ? __ldcg(reinterpret_cast<const float4*>(p.u) + quad_of(i))
                                                 : make_float4(0.f, 0.f, 0.f, 0.f);
      v[i][0] = four.x, v[i][1] = four.y, v[i][2] = four.z, v[i][3] = four.w;
    }
    if (own.exists && !own.row && first == 0) decode::shift<kCodes>(q, own.taps.in, own.window);
    if (noisy && blockIdx.x == 0 && threadIdx.x == 0) q.rng[1] = __ldcg(q.rng + 1) + 1;
    if (q.norm_groups) normalise(v, inner, q.norm_groups, q.eps, q.norm_weight, q.norm_weight_type, gain, runs);
    if (p.rotation.base) {
#pragma unroll
      for (int i = 0; i < kQuads; ++i)
        if (quad_of(i) * 4 < inner)
#pragma unroll
          for (int j = 0; j < 4; ++j) row[padded(quad_of(i) * 4) + j] = v[i][j];
      Team::sync();
      rotate<20, Team>(row, inner, p.rotation);
#pragma unroll
      for (int i = 0; i < kQuads; ++i)
        if (quad_of(i) * 4 < inner)
#pragma unroll
          for (int j = 0; j < 4; ++j) v[i][j] = row[padded(quad_of(i) * 4) + j] * p.rotation.gain;
    }
    x_scale = put_input<KIND>(v, inner, q.out_scale, type, x, scratch);
    n = products<KIND>(ring, p.out, out_share, n, x, sums);
    Team::sync();
    if (threadIdx.x < out_share.rows) {
      float sum = sum_of<KIND>(p.out, sums, threadIdx.x);
      if (kCodes) sum = __fmul_rn(__fmul_rn(sum, x_scale), out_scale);
      skinny::store_float(p.y, own_out, p.hidden_type, __fadd_rn(__fadd_rn(sum, out_bias), before));
    }
    if (layer + 1 == p.layers) break;
    arrive_grid(p);
    load_gains(gain, p.layer[layer + 1].norm_weight, p.norm_weight_type, hidden);
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

template <Kind KIND, typename State>
int launch(const QuambaStack& s, cudaStream_t stream) {
  const QuambaDecode& q = s.mixer;
  const int inner = q.H * q.P;
  Params p{};
  p.mixer = q, p.x = s.x, p.y = s.y, p.eps = s.eps;
  p.hidden_type = s.hidden_type, p.norm_weight_type = s.norm_weight_type;
  p.in_bias_type = s.in_bias_type, p.out_bias_type = s.out_bias_type;
  if (q.batch != 1 || q.G < 1 || q.H % q.G || q.N != kN || inner % kRun || s.D % kRun || s.count < 1 || q.in == QUAMBA_F32)
    return QUAMBA_UNSUPPORTED;
  if (q.norm_groups < 0 || (q.norm_groups && inner % (q.norm_groups * kRun))) return QUAMBA_UNSUPPORTED;
  if (!make_rotation(q.block, p.rotation) || p.rotation.base > 20 || (p.rotation.base && inner % q.block))
    return QUAMBA_UNSUPPORTED;
  if (!describe<KIND>(p.in, outputs(q), s.D, s.S) || !describe<KIND>(p.out, s.D, inner, s.S)) return QUAMBA_UNSUPPORTED;
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
  p.rows = (group_rows + p.blocks - 1) / p.blocks;
  constexpr int kPass = kTeam * 16 / static_cast<int>(sizeof(State)) / kN;
  if (p.rows > std::min(kPasses * kPass, kTeam / 2)) return QUAMBA_UNSUPPORTED;

  int stage_bytes = 0, parts = 0;
  for (const Matrix* m : {&p.in, &p.out}) {
    const int strips = (most_rows(*m, sms) + kRows<KIND> - 1) / kRows<KIND>;
    stage_bytes = std::max(stage_bytes, kRows<KIND> * (m->pitch + m->scale_bytes));
    parts = std::max(parts, strips * m->runs * kParts);
    p.x_bytes = std::max(p.x_bytes, m->steps * kStepX<KIND>);
    if (most_rows(*m, sms) > kTeam) return QUAMBA_UNSUPPORTED;
  }
  p.stage_bytes = (stage_bytes + 127) / 128 * 128;
  p.sums_bytes = parts * kRows<KIND> * 4;
  const int others = 16 * kMaxStages + p.x_bytes + p.sums_bytes + static_cast<int>(sizeof(Between)) +
                     4 * (kScratch + kQuads * kWarps + padded(inner));
  p.stages = std::min((most - others) / p.stage_bytes, kMaxStages);
  if (p.stages < 2) return QUAMBA_UNSUPPORTED;

  char* at = static_cast<char*>(s.workspace);
  p.arrivals = reinterpret_cast<unsigned*>(at);
  p.projected = at + 256;
  p.u = reinterpret_cast<float*>(at + 256 + rounded_up(2ll * outputs(q)));

  const auto kernel = ssd_stack<KIND, State>;
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
template <Kind KIND>
int launch(const QuambaStack& s, void* stream) {
  const auto to = static_cast<cudaStream_t>(stream);
  if (s.mixer.state_type == QUAMBA_I8) return launch<KIND, int8_t>(s, to);
  if (s.mixer.state_type == QUAMBA_F16) return launch<KIND, __half>(s, to);
  return QUAMBA_UNSUPPORTED;
}

}  // namespace quamba::stack
