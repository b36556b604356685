// One token of one sequence through a stack of Mamba1 blocks, in one launch on Hopper: as ssd_stack.cuh, which says why
// and how. A block owns the same channels of in_proj's x and z, of the convolution, of the scan, and as columns of
// x_proj, so that three things are passed on in a layer:
//
//   norm, codes (every block for itself); in_proj, rows of x; convolution; x_proj, columns  -> common, added up in L2
//   in_proj, rows of z, meanwhile; dt, B and C (every block for itself); dt_proj; the scan  -> u
//   rotation, codes (every block for itself); out_proj, a share of the rows                 -> the residual
//
// Sums that blocks add to are words that count them too, in their upper bits: who needs a sum asks until all have added
// to it. Integers are added, so that their order does not matter: of w4a16 multiples of 2^-28, below what the
// activations' type keeps of anything above 2^-16.
//
// Hazards. Every layer has sums of its own. A value of layer t is replaced by one of layer t + 1 when all blocks have
// used it: every block adds to the sums, if it has channels or not, behind all that it read of the residual and u;
// nobody makes u before the sums are whole, nor the residual before all of u. So nobody has to count who has passed
// something on before asking for it, which is done for the sake of L2 alone (stack_passing.cuh). The step of the
// rounding is advanced when u is whole, which takes all who draw. The launch is cooperative: all blocks run, or none
// does.
#pragma once

#include "selective_stack_mixer.cuh"
#include "stack_passing.cuh"

namespace quamba::stack::selective {

constexpr int kInput = 0, kGate = 1, kOut = 2;  // turns: rows of x, of z, of out_proj
constexpr int kCountBit = 55;  // below it the sum, as a signed number: +-2^54
constexpr float kUnit = 0x1p-28f;
constexpr float kMostSum = 0x1p18f;  // of a block: beyond fp16, and 256 of them do not reach the count

__device__ __forceinline__ void add_to(unsigned long long* sum, long long v) {
  asm volatile("red.relaxed.gpu.global.add.u64 [%0], %1;" ::"l"(sum), "l"((1ll << kCountBit) + v) : "memory");
}

// What `blocks` blocks have added to copies that lie `apart`.
__device__ __forceinline__ long long whole_sum(const unsigned long long* sum, int apart, int blocks) {
  Patience patience;
  long long v;
  do {
    long long copy[kCopies];
#pragma unroll
    for (int i = 0; i < kCopies; ++i)
      asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(copy[i]) : "l"(sum + i * apart) : "memory");
    v = 0;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) v += copy[i];
    patience.lose();
  } while ((v + (1ll << (kCountBit - 1))) >> kCountBit != blocks);
  return v - (static_cast<long long>(blocks) << kCountBit);
}

// The weights of all layers in the order in which they are used: L2 is asked for them, or they are brought.
template <Kind KIND, bool ASK>
__device__ __forceinline__ void carry_weights(const Params& p, const Ring& ring) {
  Courier<ASK, KIND != Kind::kW8A8> courier;
  const Share of_in(p.matrix[0]), of_out(p.matrix[1]);
  const unsigned copies =
      max(1, 2 * (of_in.rows >> p.matrix[0].stage_rows_log) + (of_out.rows >> p.matrix[1].stage_rows_log));
#pragma unroll 1
  for (int layer = 0; layer < p.layers; ++layer) {
    if (layer) courier.pace.measure(copies, ASK ? p.ask_pace : p.pace);
#pragma unroll 1
    for (int turn = 0; turn < 3; ++turn) {
      const bool out = turn == kOut;
      const QuambaStackLinear& linear = out ? p.layer[layer].out : p.layer[layer].in;
      const int first = out ? of_out.first : of_in.first + (turn == kGate ? p.matrix[0].O : 0);
      courier.carry(ring, {p.matrix[out], first, out ? of_out.rows : of_in.rows, linear.w,
                           KIND == Kind::kW4A8 ? linear.w_multiplier : linear.w_scale});
    }
  }
}

// What the mixers need from before this token, a layer ahead; what others read of a layer comes to L2 in time.
template <Kind KIND, typename State>
__device__ __forceinline__ void bring_mixers(const Params& p, Mixer<kInteger<KIND>, State>& mixer, uint32_t full,
                                             uint32_t empty) {
  const Share of_in(p.matrix[0]), of_out(p.matrix[1]);
  const int lane = threadIdx.x % 32;
#pragma unroll 1
  for (int layer = 0; layer < p.layers; ++layer) {
    const QuambaSelectiveStackLayer& l = p.layer[layer];
    if (lane == 0 && blockIdx.x % 16 == 0) ask_for(l.norm_weight, p.matrix[0].K, 2);  // what all blocks need, once
    if (lane == 1 && blockIdx.x % 16 == 1 && l.in_scale) prefetch_l2(l.in_scale);
    if (lane == 2 && blockIdx.x % 16 == 2 && l.out_scale) prefetch_l2(l.out_scale);
    if (kInteger<KIND>) {
      const float* const scales = static_cast<const float*>(l.in.w_scale);
      if (lane == 3) ask_for(scales + of_in.first, of_in.rows, 4);
      if (lane == 4) ask_for(scales + p.matrix[0].O + of_in.first, of_in.rows, 4);
      if (lane == 5) ask_for(static_cast<const float*>(l.out.w_scale) + of_out.first, of_out.rows, 4);
    }
    if (layer + 1 < p.layers) ask_for_mixer<KIND, State>(p, p.layer[layer + 1], of_in);
    wait(empty, layer & 1 ^ 1);
    if (of_in.rows > 0)
      bring_mixer<KIND, State>(p, l, of_in, mixer, full);
    else if (lane == 0)
      arrive(full, 33);  // nothing to bring, but never two layers behind the team
  }
}

// What the block makes of a layer for its channels.
struct __align__(16) Between {
  char inputs[4 * kMostChannels];  // of x_proj
  float x[kMostChannels], gate[kMostChannels];
  float B[kStates], C[kStates], peaks[kWarps];
  char rank[kMostRank];
  float weight_scale[kTeam];  // of a thread's row
};

// Where a block has what in shared memory.
template <bool CODES, typename State>
struct Memory {
  char* x;  // the input of a linear
  uint32_t* sums;
  Between* between;
  float *scratch, *runs, *row;
  Mixer<CODES, State>* mixer;
  uint32_t mixer_full, mixer_empty;  // barriers
};

// The team's part.
template <Kind KIND, typename State, int TYPE>
__device__ __forceinline__ void take_step(const Params& p, const Ring& ring,
                                          const Memory<kInteger<KIND>, State>& memory) {
  constexpr bool kCodes = kInteger<KIND>, kStateCodes = sizeof(State) == 1, kHalf = TYPE == QUAMBA_F16;
  constexpr int kLanes = 8;  // of a channel of the scan
  static_assert(kMostChannels * kLanes <= kTeam && kStates == 2 * kLanes);
  char* const x = memory.x;
  uint32_t* const sums = memory.sums;
  Between& between = *memory.between;
  const auto& mixer = *memory.mixer;
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
  const int lane = threadIdx.x % 32, common = p.R + 2 * kStates;
  const Share of_in(p.matrix[0]), of_out(p.matrix[1]);
  const int channels = of_in.rows, channel0 = of_in.first;
  const int early = kCodes ? channel0 % 16 : 0;  // bytes that came along
  const int octets = channels / kOctet, first_group = min(octets, kGroup - channel0 / kOctet % kGroup);

  Stage stage{0, 0};
  float x_scale = 1.f, before = 0.f;  // of a linear's input; the residual in the thread's row of out_proj
  if (static_cast<int>(threadIdx.x) < of_out.rows) before = __ldcg(p.x + of_out.first + threadIdx.x);

  // three turns a layer, of a product each: what they share is there once, as instructions have to be fetched, too
#pragma unroll 1
  for (int turn = 0, at_layer = 0; at_layer < p.layers; turn == kOut ? turn = 0, ++at_layer : ++turn) {
    const bool out = turn == kOut;
    const QuambaSelectiveStackLayer& l = p.layer[at_layer];
    const QuambaStackLinear& linear = out ? l.out : l.in;
    const Matrix& m = p.matrix[out];
    const Share share = out ? of_out : of_in;
    const unsigned layer = at_layer + 1;
    // a thread's row; those of z belong to threads that do not wait for sums
    const int own_row = static_cast<int>(threadIdx.x) - (turn == kGate ? kTeam - kMostChannels : 0);
    const bool owner = own_row >= 0 && own_row < share.rows;
    const int own = share.first + own_row + (turn == kGate ? p.matrix[0].O : 0);
    // through shared memory, as a register that holds it would be spilled, and so waited for
    if (kCodes && owner)
      copy_piece<4>(shared_address(between.weight_scale + threadIdx.x),
                    static_cast<const float*>(linear.w_scale) + own);
    if (turn != kGate) {
      const void* const weight = out ? nullptr : l.norm_weight;
      const float* const static_scale = out ? l.out_scale : l.in_scale;
      Quads v;
      RawQuads gain;
      load_gains(gain, weight, m.K);
      float in_scale = 1.f;
      if (kCodes && static_scale) in_scale = __uint_as_float(constant_word(static_scale));
      if (out || at_layer) {
        await(p.counts + out, static_cast<int>((out ? layer : layer - 1) * gridDim.x) - p.ahead);
        receive(v, out ? p.u : p.residual, m.K, out ? layer : layer - 1);
      } else {
        QUAMBA_EACH_QUAD(i, m.K) {
          const float4 four = quad_of(i) * 4 < m.K ? __ldcg(reinterpret_cast<const float4*>(p.x) + quad_of(i))
                                                   : make_float4(0.f, 0.f, 0.f, 0.f);
          v[i][0] = four.x, v[i][1] = four.y, v[i][2] = four.z, v[i][3] = four.w;
        }
      }
      if (!out)
        normalise<kHalf>(v, m.K, p.norm, p.eps, weight != nullptr, gain, memory.runs);
      else if (p.rotation.base)
        rotate(v, memory.row, m.K, p.rotation);
      x_scale = put_input<KIND, kHalf>(v, m.K, in_scale, static_scale != nullptr, x, memory.scratch);
    }
    products<KIND>(ring, m, share, stage, x, sums);
    if (kCodes) copy_async_wait();
    Team::sync();
    float made = 0.f;
    if (owner) {
      made = sum_of<KIND>(m, sums, own_row);
      made = __fmul_rn(made, x_scale);
      if (kCodes) made = __fmul_rn(made, between.weight_scale[threadIdx.x]);
      if (linear.bias) made = __fadd_rn(made, skinny::load_float(linear.bias, own, TYPE));
    }
    if (out) {
      if (owner) {
        before = __fadd_rn(made, before);
        pass_on(p.residual + own, before, layer);
        if (at_layer + 1 == p.layers) p.y[own] = before;
      }
      count_in(p.counts);
      // behind a sync of those who have all of u; a sum of no result, for which nobody waits
      if (kStateCodes && l.rng && blockIdx.x == 0 && threadIdx.x == 0)
        asm volatile("red.relaxed.gpu.global.add.u64 [%0], %1;" ::"l"(l.rng + 1), "l"(1ll) : "memory");
      continue;
    }

    const QuambaDecode q = mixer_of<kCodes, TYPE>(p, l);
    unsigned long long* const total = p.common + static_cast<int64_t>(at_layer * kCopies) * common + threadIdx.x;
    const bool adds = static_cast<int>(threadIdx.x) < common;
    if (turn == kInput) {
      wait(memory.mixer_full, at_layer & 1);
      if (owner) {
        decode::Taps taps{};
        decode::Window window;
        read_channel<kCodes, TYPE>(q, mixer, own_row, early, own, to_half(made, kHalf), taps, window);
        const float y = decode::convolve<kCodes>(q, taps, window);
        put_channel<KIND>(between.inputs, own_row, y);
        between.x[own_row] = kCodes ? y * mixer.x_scale : y;
        decode::shift<kCodes>(q, taps.in, window);
      }
      Team::sync();  // all have used the sums of x, too
      if (adds) {
        unsigned long long* const to = total + blockIdx.x % kCopies * common;
        if (channels > 0) {
          const auto sum = share_of_row<KIND>(p, mixer.more, between.inputs, threadIdx.x, channel0 / kOctet, octets,
                                              first_group);
          if constexpr (kCodes)
            add_to(to, sum);
          else
            add_to(to, __float2ll_rn(fminf(fmaxf(sum, -kMostSum), kMostSum) * (1.f / kUnit)));
        } else {
          add_to(to, 0);
        }
      }
      continue;
    }

    if (owner)
      between.gate[own_row] = decode::gate_of(q, decode::to_float(to_half(made, kHalf), TYPE),
                                              mixer.z_scale[q.z_count > 1 ? own_row : 0]);
    if (channels > 0) {
      const int at = static_cast<int>(threadIdx.x) - p.R;  // of B and C
      float low = 0.f;
      if (adds) {
        const long long sum = whole_sum(total, common, gridDim.x);
        float value = __ll2float_rn(sum);
        if constexpr (kCodes)
          value = __fmul_rn(__fmul_rn(value, mixer.x_scale), mixer.common_scale[threadIdx.x]);
        else
          value *= kUnit;
        value = decode::rounded(value, TYPE);
        if (at < 0) {
          low = value;
        } else {
          const float scale = at < kStates ? mixer.B_scale : mixer.C_scale;
          (at < kStates ? between.B : between.C)[at % kStates] =
              kCodes ? __fmul_rn(decode::code_of(value, scale), scale) : value;
        }
      }
      const float peak = decode::max_lanes<32>(fabsf(low));
      if (lane == 0) between.peaks[warp] = peak;
      Team::sync();
      const float highest = decode::max_lanes<16>(between.peaks[lane % kWarps]);
      const float low_scale = highest > 0.f ? __fdiv_rn(highest, 127.f) : 1.f;
      if (at < 0) between.rank[threadIdx.x] = static_cast<signed char>(code_on(low, make_grid(low_scale)));
      Team::sync();

      const int channel = threadIdx.x / kLanes, column = threadIdx.x % kLanes * 2;
      if (warp * (32 / kLanes) < channels) {
        const int words = p.R / 4;
        const int* const w = reinterpret_cast<const int*>(mixer.more + p.dt_at) + channel * words;
        int sum = 0;
#pragma unroll 4
        for (int i = threadIdx.x % kLanes; i < words; i += kLanes)
          sum = __dp4a(w[i], reinterpret_cast<const int*>(between.rank)[i], sum);
#pragma unroll
        for (int step = kLanes / 2; step; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
        float rate = __fmul_rn(__fmul_rn(static_cast<float>(sum), low_scale), mixer.dt_scale[channel]);
        if (l.dt.bias) rate = __fadd_rn(rate, decode::to_float(mixer.dt_bias[channel], TYPE));
        const float dt = decode::softplus(decode::rounded(rate, TYPE));
        const float xs = between.x[channel], input = __fmul_rn(dt, xs), power = dt * kLog2e;
        const float2 A = reinterpret_cast<const float2*>(mixer.A)[threadIdx.x];
        const float2 B = *reinterpret_cast<const float2*>(between.B + column);
        const float2 C = *reinterpret_cast<const float2*>(between.C + column);
        float h[2];
        if constexpr (kStateCodes) {
          const char2 codes = reinterpret_cast<const char2*>(mixer.state)[threadIdx.x];
          const float scale = mixer.state_scale[channel];
          h[0] = static_cast<float>(codes.x) * scale, h[1] = static_cast<float>(codes.y) * scale;
        } else {
          const float2 two = __half22float2(reinterpret_cast<const __half2*>(mixer.state)[threadIdx.x]);
          h[0] = two.x, h[1] = two.y;
        }
        h[0] = fmaf(exp2_approximate(power * A.x), h[0], input * B.x);
        h[1] = fmaf(exp2_approximate(power * A.y), h[1], input * B.y);
        const float y = decode::sum_lanes<kLanes>(fmaf(h[1], C.y, h[0] * C.x));
        if (column == 0)
          pass_on(p.u + channel0 + channel, (y + __fmul_rn(xs, mixer.D[channel])) * between.gate[channel], layer);
        State* const to = static_cast<State*>(l.state) + static_cast<int64_t>(channel0) * kStates;
        if constexpr (kStateCodes) {
          const bool noisy = l.rng;
          const float highest = decode::max_lanes<kLanes>(fmaxf(fabsf(h[0]), fabsf(h[1])));
          const float inverse = decode::inverse_of(highest, noisy);
          unsigned code[2];
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const unsigned draw = noisy ? mixer.draws[channel] + mixer.columns[column + j] : 0;
            const float dither = __uint_as_float(__funnelshift_r(draw, 0x7f, 9));  // from 1 to 2
            code[j] = __float_as_uint(noisy ? __fadd_rd(__fmaf_rn(h[j], inverse, dither), kRounder - 1.f)
                                            : __fadd_rn(__fmul_rn(h[j], inverse), kRounder));
          }
          __stcg(reinterpret_cast<unsigned short*>(to) + threadIdx.x,
                 static_cast<unsigned short>(__byte_perm(code[0], code[1], 0x0040)));
          if (column == 0) l.state_scale[channel0 + channel] = decode::scale_of(highest);
        } else {
          const __half2 two = __floats2half2_rn(h[0], h[1]);
          __stcg(reinterpret_cast<unsigned*>(to) + threadIdx.x, reinterpret_cast<const unsigned&>(two));
        }
      }
    }
    __syncwarp();
    if (lane == 0) arrive(memory.mixer_empty);
    count_in(p.counts + 1);
  }
}

template <Kind KIND, typename State, int TYPE>
__global__ void __launch_bounds__(kThreads, 1) selective_stack(const __grid_constant__ Params p) {
  extern __shared__ __align__(128) char shared[];
  using Made = Mixer<kInteger<KIND>, State>;
  Memory<kInteger<KIND>, State> memory;
  memory.x = shared + kBarrierBytes + p.stages * p.stage_bytes;  // an even number of odd multiples of 64
  memory.sums = reinterpret_cast<uint32_t*>(memory.x + p.x_bytes);
  memory.between = reinterpret_cast<Between*>(reinterpret_cast<char*>(memory.sums) + p.sums_bytes);
  memory.scratch = reinterpret_cast<float*>(memory.between + 1);
  memory.runs = memory.scratch + kScratch;
  memory.row = memory.runs + kQuads * kWarps;
  memory.mixer = reinterpret_cast<Made*>(memory.row + p.row_floats);
  const Ring ring(shared, p.stages, p.stage_bytes);
  memory.mixer_full = ring.other_barrier(0), memory.mixer_empty = ring.other_barrier(1);
  if (threadIdx.x == kTeam) {
    init_barrier(memory.mixer_full, 33), init_barrier(memory.mixer_empty, kWarps);
    ring.init();
  }
  __syncthreads();

  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
  if (warp < kWarps) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kManyRegisters));
    take_step<KIND, State, TYPE>(p, ring, memory);
  } else {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kFewRegisters));
    if (warp == kWarps) carry_weights<KIND, false>(p, ring);
    if (warp == kWarps + 2) carry_weights<KIND, true>(p, ring);
    if (warp == kWarps + 1) bring_mixers<KIND, State>(p, *memory.mixer, memory.mixer_full, memory.mixer_empty);
  }
}

}  // namespace quamba::stack::selective
