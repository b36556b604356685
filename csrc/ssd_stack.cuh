// One token of one sequence through a stack of Mamba2 blocks, in one launch on Hopper.
//
// At batch 1 a step is bound by its weights' bytes if nothing else takes time, and everything does: with a kernel for each
// part, every one of them waits for its predecessor, for its instructions, which the weights have driven out of the caches,
// and for its weights. Here one block stays on each multiprocessor for all layers, so that the code stays where it is and
// weights stream without a pause (stack_ring.cuh). Blocks pass on what they make in words that hold a value and the number of
// its layer: who needs one asks until the number is right, which takes half as long as a barrier of the grid.
//
//   norm, codes (every block for itself); in_proj, a share of the rows            -> projected
//   convolution, B and C (every block of a group for itself); rows of the state   -> u
//   norm, rotation, codes (every block for itself); out_proj, a share of the rows -> the residual
//
// That every block makes the whole input of its linears costs less than passing on once more.
//
// Hazards. A value of layer t is replaced by one of layer t + 1 when all blocks have used it, since that has to pass through
// all of them: nobody makes u before projected, nor the residual before all of u, nor projected before all of the residual.
// For the same reason the first block of a group may shift the convolution's state of B and C, and one block advance the step
// of the rounding, when they have all of u. The launch is cooperative: all blocks run, or none does.
#pragma once

#include <algorithm>
#include <cstddef>

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
constexpr int kBarrierBytes = 16 * kMaxStages + 128;

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
  unsigned* projected;  // what in_proj makes: 16 bits, and 16 of the layer's number
  uint2* u;             // what the mixer makes, before its norm: a float and the layer's number
  uint2* residual;
  unsigned* counts;     // blocks that have passed on u, or the residual, in all layers together
  Groups groups[2];    // of the norms before them
  Rotation rotation;
  int layers;
  int rows, blocks;    // of the state: of a block; blocks of a group
  int stages, stage_bytes, x_bytes, sums_bytes, row_floats;
  int flight, ahead;   // stages on their way; blocks that may be missing when all begin to ask for values
  float eps;
  QuambaStackLayer layer[kMostLayers];
};

// A quad of channels for each i: channels 4 (i kTeam + threadIdx.x) on. Loops over i end where a row does.
using Quads = float[kQuads][4];

__device__ __forceinline__ int quad_of(int i) { return i * kTeam + threadIdx.x; }

#define QUAMBA_EACH_QUAD(i, channels)            \
  _Pragma("unroll") for (int i = 0; i < kQuads; ++i) \
    if (i * kTeam * 4 < (channels))

// What other blocks pass on. Of 8 bytes that are written at once none is seen without the others.
__device__ __forceinline__ void pass_on(uint2* to, float v, unsigned layer) {
  asm volatile("st.relaxed.gpu.global.v2.u32 [%0], {%1, %2};" ::"l"(to), "r"(__float_as_uint(v)), "r"(layer) : "memory");
}

__device__ __forceinline__ void pass_on(unsigned* to, unsigned short v, unsigned layer) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(v | layer << 16) : "memory");
}

struct Patience {
#ifdef QUAMBA_TUNE
  long long polls = 0;
  __device__ __forceinline__ void lose() {
    if (++polls > 1 << 22) __trap();  // a value that never comes would hang the device
  }
#else
  __device__ __forceinline__ void lose() {}
#endif
};

// Asking for all of u or of the residual again and again would keep L2 busy, so that one thread asks how many blocks have
// passed on theirs first. That orders nothing: the numbers in the values do.
__device__ __forceinline__ void count_in(unsigned* count) {
  if (threadIdx.x == 0) asm volatile("red.relaxed.gpu.global.add.u32 [%0], 1;" ::"l"(count) : "memory");
}

__device__ __forceinline__ void await(const unsigned* count, int wanted) {
  if (threadIdx.x == 0) {
    int blocks;
    Patience patience;
    do {
      asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(blocks) : "l"(count) : "memory");
      patience.lose();
    } while (blocks < wanted);
  }
  Team::sync();
}

// Words of in_proj's result, asked for together.
template <int COUNT>
__device__ __forceinline__ void receive(unsigned (&v)[COUNT], const unsigned* const (&from)[COUNT], unsigned layer) {
  Patience patience;
  bool waiting;
  do {
    waiting = false;
#pragma unroll
    for (int i = 0; i < COUNT; ++i)
      asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v[i]) : "l"(from[i]) : "memory");
#pragma unroll
    for (int i = 0; i < COUNT; ++i) waiting |= v[i] >> 16 != layer;
    patience.lose();
  } while (waiting);
}

__device__ __forceinline__ void receive(Quads& v, const uint2* from, int channels, unsigned layer) {
  Patience patience;
  bool waiting;
  do {
    waiting = false;
    QUAMBA_EACH_QUAD(i, channels) {
      v[i][0] = v[i][1] = v[i][2] = v[i][3] = 0.f;
      if (quad_of(i) * 4 < channels)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          unsigned a, b, c, d;
          asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                       : "=r"(a), "=r"(b), "=r"(c), "=r"(d)
                       : "l"(from + quad_of(i) * 4 + h * 2)
                       : "memory");
          v[i][2 * h] = __uint_as_float(a), v[i][2 * h + 1] = __uint_as_float(c);
          waiting |= b != layer || d != layer;
        }
    }
    patience.lose();
  } while (waiting);
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
  float4* const own = reinterpret_cast<float4*>(row + Team::place(threadIdx.x * 4));
  constexpr int kNext = Team::place(kTeam * 4) / 4;
  QUAMBA_EACH_QUAD(i, channels) {
    if (r.bits > 0) {
      const float a = v[i][0] + v[i][1], b = v[i][0] - v[i][1], c = v[i][2] + v[i][3], d = v[i][2] - v[i][3];
      v[i][0] = a, v[i][1] = b, v[i][2] = c, v[i][3] = d;
    }
    if (r.bits > 1) {
      const float a = v[i][0] + v[i][2], b = v[i][1] + v[i][3], c = v[i][0] - v[i][2], d = v[i][1] - v[i][3];
      v[i][0] = a, v[i][1] = b, v[i][2] = c, v[i][3] = d;
    }
    if (quad_of(i) * 4 < channels) own[i * kNext] = make_float4(v[i][0], v[i][1], v[i][2], v[i][3]);
  }
  Team::sync();
  int done = min(r.bits, 2);
#pragma unroll 1
  for (; r.bits - done >= 3; done += 3) hadamard::pass<8, false, Team>(row, channels, done);
  if (r.bits - done == 2) hadamard::pass<4, false, Team>(row, channels, done);
  if (r.bits - done == 1) hadamard::pass<2, false, Team>(row, channels, done);
  if (r.base == 12) hadamard::pass<12, true, Team>(row, channels, r.bits);
  if (r.base == 20) hadamard::pass<20, true, Team>(row, channels, r.bits);
  QUAMBA_EACH_QUAD(i, channels)
    if (quad_of(i) * 4 < channels) {
      const float4 q = own[i * kNext];
      v[i][0] = q.x * r.gain, v[i][1] = q.y * r.gain, v[i][2] = q.z * r.gain, v[i][3] = q.w * r.gain;
    }
}

// v as the input of a linear: codes by a static scale or the token's own, or floats of the activations' type. Ends with a
// sync; returns the scale.
template <Kind KIND, bool HALF>
__device__ __forceinline__ float put_input(const Quads& v, int channels, float scale, bool is_static, char* x,
                                           float* scratch) {
  if constexpr (kInteger<KIND>) {
    if (!is_static) {
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

// What a block needs of a layer's mixer from before this token, in shared memory. Channels of the convolution in the order of
// B, C and the block's rows of x.
template <bool CODES, typename State>
struct __align__(16) Mixer {
  static constexpr int kSlots = 2 * kN + kMostRows, kTap = CODES ? 4 : 8, kPast = CODES ? 1 : 2, kHeads = 8;
  unsigned char weight[kSlots * kTap];
  float weight_scale[CODES ? kSlots : 4], out_scale[CODES ? kSlots : 4], in_scale[CODES ? kSlots : 4];
  unsigned short bias[kSlots];
  unsigned char past[decode::kWidth - 1][(kSlots + 16) * kPast];
  float x_scale[kMostRows], z_scale[kMostRows], state_scale[kMostRows];
  float A[kHeads], D[kHeads], dt_bias[kHeads], shared_scale[4];  // from the first row's head on; of B and C
  unsigned columns[kN], draws[kMostRows];
  State state[kMostRows * kN];  // of which there are rows
};

// Where element c of B, C or the dither lies, so that lanes with `count` neighbours each read quads side by side.
template <int COUNT>
__device__ __forceinline__ int spread(int c) {
  return c % COUNT / 4 * (kN / COUNT * 4) + c / COUNT * 4 + c % 4;
}

// A warp brings it.
template <bool CODES, typename State>
__device__ __forceinline__ void bring_mixer(const Params& p, const QuambaStackLayer& l, const Part& part,
                                            Mixer<CODES, State>& to, uint32_t full) {
  using Made = Mixer<CODES, State>;
  const QuambaDecode& q = p.mixer;
  const int lane = threadIdx.x % 32, inner = q.H * q.P, rows = part.rows;
  const uint64_t policy = evict_first();
  // a lane copies one stretch of one tensor
  const int stretch = lane % 3, tensor = lane / 3;
  const int first = stretch == 2 ? part.channel0 : inner + (stretch * q.G + part.group) * kN;
  const int count = stretch == 2 ? rows : kN, slot = stretch * kN;
  const void* from = nullptr;
  void* into = nullptr;
  int64_t at = first;
  int bytes = 0, element = 4;
  if (tensor < 3) {
    element = Made::kPast, at += static_cast<int64_t>(tensor) * q.channels;
    from = l.conv_state, into = to.past[tensor] + slot * element;
  } else if (tensor == 3) {
    element = Made::kTap, from = l.conv_weight, into = to.weight + slot * element;
  } else if (tensor == 4) {
    element = 2, from = l.conv_bias, into = to.bias + slot;
  } else if (CODES && tensor == 5) {
    from = l.conv_weight_scale, into = to.weight_scale + slot;
  } else if (CODES && tensor == 6) {
    from = l.conv_out_scale, into = to.out_scale + slot;
  } else if (CODES && tensor == 7) {
    from = q.conv_in_count > 1 ? l.conv_in_scale : nullptr, into = to.in_scale + slot;
  }
  if (from) bytes = count * element;
  if (tensor >= 8) {
    at = part.channel0, bytes = rows * 4;
    if (lane == 24) from = l.state, into = to.state, at *= kN, element = sizeof(State), bytes = rows * kN * element;
    if (lane == 25) from = l.state_scale, into = to.state_scale;
    if (lane == 26) from = q.x_count > 1 ? l.x_scale : nullptr, into = to.x_scale;
    if (lane == 27) from = q.z_count > 1 ? l.z_scale : nullptr, into = to.z_scale;
    if (!from) bytes = 0;
  }
  // codes of rows may begin half way into 16 bytes; what lies before them comes along
  const uintptr_t begin = reinterpret_cast<uintptr_t>(from) + at * element;
  const int early = from ? static_cast<int>(begin % 16) : 0;
  bytes = from ? (bytes + early + 15) / 16 * 16 : 0;
  int total = bytes;
#pragma unroll
  for (int step = 16; step; step /= 2) total += __shfl_xor_sync(~0u, total, step);
  const auto one = [](const float* data, int i) { return data ? __uint_as_float(constant_word(data + i)) : 1.f; };
  const int head0 = part.channel0 / q.P;
  if (lane < Made::kHeads) {
    const int head = min(head0 + lane, q.H - 1);
    to.A[lane] = one(l.A, head), to.D[lane] = one(l.D, head), to.dt_bias[lane] = l.dt_bias ? one(l.dt_bias, head) : 0.f;
  }
  if (lane == 8 && CODES && q.conv_in_count == 1) to.in_scale[0] = one(l.conv_in_scale, 0);
  if (lane == 9 && q.x_count <= 1) to.x_scale[0] = one(l.x_scale, 0);
  if (lane == 10 && q.z_count <= 1) to.z_scale[0] = one(l.z_scale, 0);
  if (lane == 11) to.shared_scale[0] = one(l.B_scale, q.B_count > 1 ? part.group : 0);
  if (lane == 12) to.shared_scale[1] = one(l.C_scale, q.C_count > 1 ? part.group : 0);
  if (sizeof(State) == 1 && l.rng) {
    const unsigned key = decode::dither_key(l.rng);
    for (int i = lane; i < kN; i += 32)
      to.columns[spread<16>(i)] = decode::column_draw(key, static_cast<unsigned>(inner) + i);
    for (int i = lane; i < rows; i += 32) to.draws[i] = decode::row_draw(key, static_cast<unsigned>(part.channel0) + i);
  }
  __syncwarp();
  if (lane == 0) arrive_expecting(full, total);
  __syncwarp();
  if (bytes)
    bulk_copy(shared_address(into), reinterpret_cast<const void*>(begin - early), bytes, full, policy);
}

// What all layers need from global memory, in the order in which it is used.
template <Kind KIND, typename State>
__device__ __forceinline__ void bring_all(const Params& p, const Ring& ring, Mixer<kInteger<KIND>, State>& mixer,
                                          uint32_t mixer_full, uint32_t mixer_empty) {
  Flow flow;
  flow.flight = p.flight;
  const Part part(p);
  const Share of_in(p.matrix[0]), of_out(p.matrix[1]);
#pragma unroll 1
  for (int turn = 0; turn < 2 * p.layers; ++turn) {
    const QuambaStackLayer& l = p.layer[turn / 2];
    const QuambaStackLinear& linear = turn & 1 ? l.out : l.in;
    if (!(turn & 1)) {
      // what others read of a layer comes to L2 in time; what all blocks do, once
      const int lane = threadIdx.x % 32;
      if (lane == 0 && blockIdx.x % 16 == 0) ask_for(l.norm_weight, p.matrix[0].K, 2);
      if (lane == 1 && blockIdx.x % 16 == 1) ask_for(l.gate_weight, p.matrix[1].K, 2);
      if (lane == 2 && blockIdx.x % 16 == 2 && l.in_scale) prefetch_l2(l.in_scale);
      if (lane == 3 && blockIdx.x % 16 == 3 && l.out_scale) prefetch_l2(l.out_scale);
      if (lane == 4 && kInteger<KIND>) ask_for(static_cast<const float*>(l.in.w_scale) + of_in.first, of_in.rows, 4);
      if (lane == 5 && kInteger<KIND>) ask_for(static_cast<const float*>(l.out.w_scale) + of_out.first, of_out.rows, 4);
    }
    if ((turn & 1) && part.rows > 0) {
      wait(mixer_empty, turn / 2 & 1 ^ 1);
      bring_mixer(p, l, part, mixer, mixer_full);
    }
    const Share& share = turn & 1 ? of_out : of_in;
    if (threadIdx.x % 32 == 0)
      bring(ring, p.matrix[turn & 1], share, linear.w, KIND == Kind::kW4A8 ? linear.w_multiplier : linear.w_scale, flow);
    __syncwarp();
  }
}

// The mixer of a layer as the decode kernels see it.
template <bool CODES, int TYPE>
__device__ __forceinline__ QuambaDecode mixer_of(const Params& p, const QuambaStackLayer& l) {
  QuambaDecode q = p.mixer;
  q.in = q.conv_bias_type = TYPE, q.conv_state_type = q.conv_weight_type = CODES ? QUAMBA_I8 : TYPE;
  q.conv_state = l.conv_state, q.conv_weight = l.conv_weight, q.conv_bias = l.conv_bias;
  q.conv_weight_scale = CODES ? l.conv_weight_scale : nullptr;
  q.conv_in_scale = CODES ? l.conv_in_scale : nullptr, q.conv_out_scale = CODES ? l.conv_out_scale : nullptr;
  q.x_scale = CODES ? l.x_scale : nullptr, q.B_scale = CODES ? l.B_scale : nullptr, q.C_scale = CODES ? l.C_scale : nullptr;
  q.z_scale = CODES ? l.z_scale : nullptr;
  q.A = l.A, q.D = l.D, q.dt_bias = l.dt_bias, q.rng = l.rng;
  return q;
}

// What the block makes of it for its rows.
struct Between {
  float B[kN], C[kN];
  Row info[kMostRows];
};

// A channel of the convolution, its new input being x, its constants and past in slot `at`: every word is filled, wherever the
// element would lie.
template <bool CODES, int TYPE, typename Made>
__device__ __forceinline__ void read_channel(const QuambaDecode& q, const Made& mixer, int at, int early, int place,
                                             unsigned x, decode::Taps& taps, decode::Window& window) {
  const auto code = [](unsigned v) { return v * 0x01010101u; };
  const auto half = [](unsigned v) { return v * 0x00010001u; };
  if constexpr (CODES) {
    taps.weight.x = taps.weight.y = reinterpret_cast<const unsigned*>(mixer.weight)[at];
    taps.weight_scale = mixer.weight_scale[at], taps.out = mixer.out_scale[at];
    taps.in = mixer.in_scale[q.conv_in_count > 1 ? at : 0];
  } else {
    const uint2 two = reinterpret_cast<const uint2*>(mixer.weight)[at];
    taps.weight.x = two.x, taps.weight.y = two.y, taps.weight_scale = taps.out = taps.in = 1.f;
  }
  if (q.conv_bias) taps.bias = half(mixer.bias[at]);
  window = {0, place};
#pragma unroll
  for (int w = 0; w < decode::kWidth - 1; ++w) {
    if constexpr (CODES)
      window.past[w] = code(mixer.past[w][at + early]);
    else
      window.past[w] = half(reinterpret_cast<const unsigned short*>(mixer.past[w])[at]);
  }
  window.x = half(x);
}

template <Kind KIND, typename State, int TYPE>
__global__ void __launch_bounds__(kThreads, 1) ssd_stack(const __grid_constant__ Params p) {
  constexpr bool kCodes = kInteger<KIND>, kStateCodes = sizeof(State) == 1, kHalf = TYPE == QUAMBA_F16;
  constexpr int kCount = 16 / sizeof(State), kLanes = kN / kCount, kPass = kTeam / kLanes, kPasses = kMostRows / kPass;
  using Stored = decode::Stored<State, kCount>;
  extern __shared__ __align__(128) char shared[];
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);

  using Made = Mixer<kCodes, State>;
  char* const stages = shared + kBarrierBytes;
  char* const x = stages + p.stages * p.stage_bytes;  // an even number of odd multiples of 64
  uint32_t* const sums = reinterpret_cast<uint32_t*>(x + p.x_bytes);
  Between& between = *reinterpret_cast<Between*>(reinterpret_cast<char*>(sums) + p.sums_bytes);
  float* const scratch = reinterpret_cast<float*>(&between + 1);
  float* const runs = scratch + kScratch;
  float* const row = runs + kQuads * kWarps;
  Made& mixer = *reinterpret_cast<Made*>(row + p.row_floats);
  const Ring ring{shared_address(shared), shared_address(shared) + 8 * kMaxStages, stages, p.stages, p.stage_bytes};
  const uint32_t mixer_full = ring.full + 16 * kMaxStages, mixer_empty = mixer_full + 8;
  if (threadIdx.x == kTeam) {
    init_barrier(mixer_full, 1), init_barrier(mixer_empty, kWarps);
    ring.init();
  }
  __syncthreads();

  if (warp == kWarps) {
    bring_all<KIND, State>(p, ring, mixer, mixer_full, mixer_empty);
    return;
  }

  const int inner = p.matrix[1].K, lane = threadIdx.x % 32;
  const Share of_in(p.matrix[0]), of_out(p.matrix[1]);
  const Part part(p);
  const int group = part.group, rows = part.rows, channel0 = part.channel0;
  // a thread's channel of the convolution: of B and C, or of the block's rows of x
  const int own_row = static_cast<int>(threadIdx.x) - 2 * kN;
  const bool is_row = own_row >= 0, is_B = threadIdx.x < kN, exists = rows > 0 && own_row < rows;
  const int place = is_row ? channel0 + own_row : inner + (is_B ? 0 : (p.mixer.G - 1) * kN) + group * kN + static_cast<int>(threadIdx.x);
  const int head = is_row && exists ? place / p.mixer.P : 0;
  const int early = kCodes && is_row ? channel0 % 16 : 0;  // bytes that came along

  const int inputs = inner, dts = 2 * inner + 2 * p.mixer.G * kN;  // where x and dt begin in projected
  Stage stage{0, 0};
  float before = 0.f;  // the residual in the thread's row of out_proj
  if (static_cast<int>(threadIdx.x) < of_out.rows) before = __ldcg(p.x + of_out.first + threadIdx.x);

  // in_proj and out_proj of every layer in turn: what they share is there once, as instructions have to be fetched, too
#pragma unroll 1
  for (int turn = 0; turn < 2 * p.layers; ++turn) {
    const int out = turn & 1;
    const QuambaStackLayer& l = p.layer[turn / 2];
    const QuambaStackLinear& linear = out ? l.out : l.in;
    const Matrix& m = p.matrix[out];
    const Share share = out ? of_out : of_in;
    const unsigned layer = turn / 2 + 1;
    const void* const weight = out ? l.gate_weight : l.norm_weight;
    const float* const static_scale = out ? l.out_scale : l.in_scale;
    const bool owner = static_cast<int>(threadIdx.x) < share.rows;
    const int own = share.first + threadIdx.x;

    Quads v;
    RawQuads gain;
    load_gains(gain, weight, m.K);
    float in_scale = 1.f, weight_scale = 1.f, bias = -0.f;
    if (kCodes && static_scale) in_scale = __uint_as_float(constant_word(static_scale));
    if (owner) {
      if (kCodes) weight_scale = __uint_as_float(constant_word(static_cast<const float*>(linear.w_scale) + own));
      if (linear.bias) bias = skinny::load_float(linear.bias, own, TYPE);
    }
    if (turn) {
      if (p.ahead < static_cast<int>(gridDim.x))
        await(p.counts + out, static_cast<int>((out ? layer : layer - 1) * gridDim.x) - p.ahead);
      receive(v, out ? p.u : p.residual, m.K, out ? layer : layer - 1);
    } else {
      QUAMBA_EACH_QUAD(i, m.K) {
        const float4 four = quad_of(i) * 4 < m.K ? __ldcg(reinterpret_cast<const float4*>(p.x) + quad_of(i))
                                                 : make_float4(0.f, 0.f, 0.f, 0.f);
        v[i][0] = four.x, v[i][1] = four.y, v[i][2] = four.z, v[i][3] = four.w;
      }
    }
    if (out && rows > 0) {
      // not before all threads have all of u, so that all blocks have read them
      Team::sync();
      if (part.first == 0 && !is_row) {
        const QuambaDecode q = mixer_of<kCodes, TYPE>(p, l);
        decode::Taps taps{};
        decode::Window window;
        unsigned got[1];
        receive(got, {p.projected + inputs + place}, layer);
        read_channel<kCodes, TYPE>(q, mixer, threadIdx.x, 0, place, got[0] & 0xffffu, taps, window);
        decode::shift<kCodes>(q, taps.in, window);
      }
      if (kStateCodes && l.rng && blockIdx.x == 0 && threadIdx.x == 0) l.rng[1] = __ldcg(l.rng + 1) + 1;
      __syncwarp();
      if (lane == 0) arrive(mixer_empty);
    }
    if (p.groups[out].count)
      normalise<kHalf>(v, m.K, p.groups[out], out ? p.mixer.eps : p.eps, weight != nullptr, gain, runs);
    if (out && p.rotation.base) rotate(v, row, m.K, p.rotation);
    const float x_scale = put_input<KIND, kHalf>(v, m.K, in_scale, static_scale != nullptr, x, scratch);
    products<KIND>(ring, m, share, stage, x, sums);
    Team::sync();
    if (owner) {
      float sum = sum_of<KIND>(m, sums, threadIdx.x);
      if (kCodes) sum = __fmul_rn(__fmul_rn(sum, x_scale), weight_scale);
      sum = __fadd_rn(sum, bias);
      if (out) {
        before = __fadd_rn(sum, before);
        pass_on(p.residual + own, before, layer);
        if (turn + 1 == 2 * p.layers) p.y[own] = before;
      } else {
        pass_on(p.projected + own, to_half(sum, kHalf), layer);
      }
    }
    if (out) count_in(p.counts);
    if (!out) {
      const QuambaDecode q = mixer_of<kCodes, TYPE>(p, l);
      if (rows > 0) wait(mixer_full, turn / 2 & 1);
      if (exists) {
        decode::Taps taps{};
        decode::Window window;
        unsigned got[3];
        const unsigned* const input = p.projected + inputs + place;
        receive(got, {input, is_row ? p.projected + dts + head : input, is_row ? p.projected + place : input}, layer);
        float dt = decode::to_float(got[1], TYPE);
        const float z = decode::to_float(got[2], TYPE);
        read_channel<kCodes, TYPE>(q, mixer, threadIdx.x, early, place, got[0] & 0xffffu, taps, window);
        const float made = decode::convolve<kCodes>(q, taps, window);
        if (is_row) {
          const int at = head - channel0 / q.P;
          const float xs = made * mixer.x_scale[q.x_count > 1 ? own_row : 0];
          decode::shift<kCodes>(q, taps.in, window);
          dt = fminf(fmaxf(decode::softplus(__fadd_rn(dt, mixer.dt_bias[at])), q.dt_min), q.dt_max);
          between.info[own_row] = {expf(__fmul_rn(dt, mixer.A[at])), __fmul_rn(dt, xs), __fmul_rn(xs, mixer.D[at]),
                                   decode::gate_of(q, z, mixer.z_scale[q.z_count > 1 ? own_row : 0])};
        } else {
          (is_B ? between.B : between.C)[spread<kCount>(threadIdx.x % kN)] = made * mixer.shared_scale[!is_B];
        }
      }
      Team::sync();
      if (warp * 32 / kLanes < rows) {
        const int lane_row = threadIdx.x / kLanes, column = threadIdx.x % kLanes;
        const bool noisy = kStateCodes && l.rng;
        float B[kCount], C[kCount];
        unsigned dither[kStateCodes ? kCount : 1];
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          const int at = spread<kCount>(i) + column * 4;
          B[i] = between.B[at], C[i] = between.C[at];
          if constexpr (kStateCodes) dither[i] = noisy ? mixer.columns[at] : 0;
        }
#pragma unroll
        for (int i = 0; i < kPasses; ++i) {
          if (i * kPass >= rows) break;
          const int at = min(i * kPass + lane_row, rows - 1);
          const Row r = between.info[at];
          Stored kept, stored;
          const uint4* const words = reinterpret_cast<const uint4*>(mixer.state + at * kN + column * kCount);
#pragma unroll
          for (int w = 0; w < Stored::kWords; ++w) kept.words[w] = words[w];
          float h[kCount];
          decode::unpack(kept, h);
          const float decay = kStateCodes ? r.decay * mixer.state_scale[at] : r.decay;
          float y[2] = {0.f, 0.f};
#pragma unroll
          for (int j = 0; j < kCount; ++j) {
            h[j] = fmaf(decay, h[j], r.input * B[j]);
            y[j % 2] = fmaf(h[j], C[j], y[j % 2]);
          }
          const float sum = decode::sum_lanes<kLanes>(y[0] + y[1]);
          float scale = 0.f;
          if constexpr (kStateCodes)
            scale = decode::quantize_row<kLanes>(h, noisy, noisy ? mixer.draws[at] : 0, dither, stored);
          else
            decode::pack(h, stored);
          if (i * kPass + lane_row >= rows) continue;
          stored.store(static_cast<State*>(l.state) + static_cast<int64_t>(channel0 + at) * kN + column * kCount);
          if (column == 0) {
            if (kStateCodes) l.state_scale[channel0 + at] = scale;
            pass_on(p.u + channel0 + at, (sum + r.skip) * r.gate, layer);
          }
        }
      }
      count_in(p.counts + 1);
    }
  }
}

inline int64_t rounded_up(int64_t bytes) { return (bytes + 255) / 256 * 256; }

inline int outputs(const QuambaDecode& q) { return 2 * q.H * q.P + 2 * q.G * q.N + q.H; }

inline int64_t workspace_of(const QuambaStack& s) {
  return rounded_up(4ll * outputs(s.mixer)) + 8ll * (s.mixer.H * s.mixer.P + s.D) + 2 * sizeof(unsigned);
}

// The largest share of a matrix.
inline int most_rows(const Matrix& m, int blocks) { return (m.O / kOctet + blocks - 1) / blocks * kOctet; }

// A matrix of O rows of K, for so many blocks; false where it cannot be copied in stages.
template <Kind KIND>
bool describe(Matrix& m, int O, int K, int S, int blocks) {
  m = {};
  m.O = O, m.K = K, m.row_bytes = KIND == Kind::kW8A8 ? K : K / 2, m.steps = m.row_bytes / kStep;
  if (O % kOctet || m.row_bytes % (2 * kStep) || K > kQuads * 4 * kTeam) return false;
  if (KIND != Kind::kW8A8) {
    if (S != 2 * kStep) return false;
    m.scale_bytes = K / S * (kInteger<KIND> ? 1 : 2);
  }
  for (m.stage_rows = kOctet; m.stage_rows > 2 && m.stage_rows * m.row_bytes > kStageBytes;) m.stage_rows /= 2;
  m.strip_stages = kStrip / m.stage_rows;
  // parts by what they take: rounds of the warps, times steps and what a part costs beside them
  const int strips = (most_rows(m, blocks) + kStrip - 1) / kStrip;
  double least = 0;
  for (int parts = 1; parts <= kWarps; parts *= 2) {
    const double cost = (strips * parts + kWarps - 1) / kWarps * ((m.steps + parts - 1) / parts + 1.5);
    if (!m.parts || cost < least) m.parts = parts, least = cost;
  }
  return m.stage_rows * m.scale_bytes % 16 == 0;
}

// Whether what is copied in bulk begins at a multiple of 16 bytes.
inline bool aligned(const QuambaStackLayer& l) {
  for (const void* p : {l.in.w, l.in.w_scale, l.in.w_multiplier, l.out.w, l.out.w_scale, l.out.w_multiplier,
                        static_cast<const void*>(l.conv_state), l.conv_weight, static_cast<const void*>(l.conv_weight_scale),
                        l.conv_bias, static_cast<const void*>(l.conv_in_scale), static_cast<const void*>(l.conv_out_scale),
                        static_cast<const void*>(l.state), static_cast<const void*>(l.state_scale),
                        static_cast<const void*>(l.x_scale), static_cast<const void*>(l.z_scale), l.norm_weight,
                        l.gate_weight})
    if (reinterpret_cast<uintptr_t>(p) % 16) return false;
  return true;
}

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
  if (s.workspace_bytes < workspace_of(s) || q.channels % 16 || q.P * (Mixer<kCodes, State>::kHeads - 1) < kMostRows)
    return QUAMBA_UNSUPPORTED;
  for (int i = 0; i < s.count; ++i)
    if (!aligned(s.layers[i])) return QUAMBA_UNSUPPORTED;
  int ordinal = 0, sms = 0, most = 0, cooperative = 0;
  cudaError_t error = cudaGetDevice(&ordinal);
  const auto get = [&](int& value, cudaDeviceAttr attribute) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&value, attribute, ordinal);
  };
  get(sms, cudaDevAttrMultiProcessorCount);
  get(most, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  get(cooperative, cudaDevAttrCooperativeLaunch);
  if (error != cudaSuccess) return error;
  if (!cooperative || !describe<KIND>(p.matrix[0], outputs(q), s.D, s.S, sms) ||
      !describe<KIND>(p.matrix[1], s.D, inner, s.S, sms))
    return QUAMBA_UNSUPPORTED;

  const int group_rows = inner / q.G;
  p.blocks = sms / q.G;
  if (!p.blocks) return QUAMBA_UNSUPPORTED;
  p.rows = ((group_rows + p.blocks - 1) / p.blocks + 7) / 8 * 8;
  if (p.rows > kMostRows) return QUAMBA_UNSUPPORTED;

  int stage_bytes = 0, parts = 0;
  for (const Matrix& m : p.matrix) {
    const int strips = (most_rows(m, sms) + kStrip - 1) / kStrip;
    stage_bytes = std::max(stage_bytes, m.stage_rows * (m.row_bytes + m.scale_bytes));
    parts = std::max(parts, strips * m.parts);
    p.x_bytes = std::max(p.x_bytes, m.steps * kStepX<KIND>);
    if (most_rows(m, sms) > kTeam) return QUAMBA_UNSUPPORTED;
  }
  p.stage_bytes = (stage_bytes + 63) / 128 * 128 + 64;
  p.sums_bytes = parts * kStrip * 4;
  p.row_floats = (Team::place(inner) + 31) / 32 * 32;
  using Made = Mixer<kCodes, State>;
  const int others = kBarrierBytes + p.x_bytes + p.sums_bytes +
                     static_cast<int>(sizeof(Between) + offsetof(Made, state)) + p.rows * kN * static_cast<int>(sizeof(State)) +
                     4 * (kScratch + kQuads * kWarps + p.row_floats);
  p.stages = std::min((most - others) / p.stage_bytes, kMaxStages) / 2 * 2;
  if (p.stages < std::max(p.matrix[0].strip_stages, p.matrix[1].strip_stages)) return QUAMBA_UNSUPPORTED;

  p.projected = static_cast<unsigned*>(s.workspace);
  p.u = reinterpret_cast<uint2*>(static_cast<char*>(s.workspace) + rounded_up(4ll * outputs(q)));
  p.residual = p.u + inner;
  p.counts = reinterpret_cast<unsigned*>(p.residual + s.D);
  p.flight = std::min(tuned("QUAMBA_STACK_FLIGHT", 3), p.stages);
  p.ahead = tuned("QUAMBA_STACK_AHEAD", 0);

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
    error = cudaMemsetAsync(s.workspace, 0, workspace_of(s), stream);  // there is no layer 0
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
