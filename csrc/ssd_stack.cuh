// One token of one sequence through a stack of Mamba2 blocks, in one launch on Hopper.
//
// At batch 1 a step is bound by its weights' bytes if nothing else takes time, and everything does: with a kernel for each
// part, every one of them waits for its predecessor, for its instructions, which the weights have driven out of the caches,
// and for its weights. Here one block stays on each multiprocessor for all layers, so that the code stays where it is and
// weights stream without a pause (stack_ring.cuh). Blocks pass on what they make in words that hold a value and the number of
// its layer: who needs one asks until the number is right.
//
//   norm, codes (every block for itself); in_proj, a share of the rows            -> projected
//   convolution, B and C (every block of a group for itself); rows of the state   -> u
//   norm, rotation, codes (every block for itself); out_proj, a share of the rows -> the residual
//
// Every block makes the whole input of its linears, so that it is not passed on once more.
//
// Hazards. A value of layer t is replaced by one of layer t + 1 when all blocks have used it, since that has to pass through
// all of them: nobody makes u before projected, nor the residual before all of u, nor projected before all of the residual.
// For the same reason the first block of a group may shift the convolution's state of B and C, and one block advance the step
// of the rounding, when they have all of u. Where some blocks have no rows of a matrix they ask for values only when all others
// have counted in, behind everything that they read. The launch is cooperative: all blocks run, or none does.
#pragma once

#include "stack_mixer.cuh"
#include "stack_passing.cuh"

namespace quamba::stack {

// The weights of all layers in the order in which they are used: L2 is asked for them, or they are brought.
template <Kind KIND, bool ASK>
__device__ __forceinline__ void carry_weights(const Params& p, const Ring& ring) {
  Courier<ASK, KIND != Kind::kW8A8> courier;
  const Share of_in(p.matrix[0]), of_out(p.matrix[1]);
  const unsigned copies = max(1, (of_in.rows >> p.matrix[0].stage_rows_log) + (of_out.rows >> p.matrix[1].stage_rows_log));
#pragma unroll 1
  for (int turn = 0; turn < 2 * p.layers; ++turn) {
    const bool out = turn & 1;
    const QuambaStackLinear& linear = out ? p.layer[turn / 2].out : p.layer[turn / 2].in;
    if (turn && !out) courier.pace.measure(copies, ASK ? p.ask_pace : p.pace);
    courier.carry(ring, {p.matrix[out], out ? of_out.first : of_in.first, out ? of_out.rows : of_in.rows, linear.w,
                         KIND == Kind::kW4A8 ? linear.w_multiplier : linear.w_scale});
  }
}

// What the mixers need from before this token, a layer ahead; what others read of a layer comes to L2 in time.
template <Kind KIND, typename State>
__device__ __forceinline__ void bring_mixers(const Params& p, Mixer<kInteger<KIND>, State>& mixer, uint32_t full,
                                             uint32_t empty) {
  const Part part(p);
  const Share of_in(p.matrix[0]), of_out(p.matrix[1]);
  const int lane = threadIdx.x % 32;
#pragma unroll 1
  for (int layer = 0; layer < p.layers; ++layer) {
    const QuambaStackLayer& l = p.layer[layer];
    if (lane == 0 && blockIdx.x % 16 == 0) ask_for(l.norm_weight, p.matrix[0].K, 2);  // what all blocks need, once
    if (lane == 1 && blockIdx.x % 16 == 1) ask_for(l.gate_weight, p.matrix[1].K, 2);
    if (lane == 2 && blockIdx.x % 16 == 2 && l.in_scale) prefetch_l2(l.in_scale);
    if (lane == 3 && blockIdx.x % 16 == 3 && l.out_scale) prefetch_l2(l.out_scale);
    if (lane == 4 && kInteger<KIND>) ask_for(static_cast<const float*>(l.in.w_scale) + of_in.first, of_in.rows, 4);
    if (lane == 5 && kInteger<KIND>) ask_for(static_cast<const float*>(l.out.w_scale) + of_out.first, of_out.rows, 4);
    wait(empty, layer & 1 ^ 1);
    if (part.rows > 0)
      bring_mixer(p, l, part, mixer, full);
    else if (lane == 0)
      arrive(full);  // nothing to bring, but never two layers behind the team
  }
}

// What the block makes of it for its rows.
struct Between {
  float B[kN], C[kN];
  Row info[kMostRows];
};

template <Kind KIND, typename State, int TYPE>
__global__ void __launch_bounds__(kThreads, 1) ssd_stack(const __grid_constant__ Params p) {
  constexpr bool kCodes = kInteger<KIND>, kStateCodes = sizeof(State) == 1, kHalf = TYPE == QUAMBA_F16;
  constexpr int kCount = 16 / sizeof(State), kLanes = kN / kCount, kPass = kTeam / kLanes, kPasses = kMostRows / kPass;
  using Stored = decode::Stored<State, kCount>;
  extern __shared__ __align__(128) char shared[];
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);

  using Made = Mixer<kCodes, State>;
  char* const x = shared + kBarrierBytes + p.stages * p.stage_bytes;  // an even number of odd multiples of 64
  uint32_t* const sums = reinterpret_cast<uint32_t*>(x + p.x_bytes);
  Between& between = *reinterpret_cast<Between*>(reinterpret_cast<char*>(sums) + p.sums_bytes);
  float* const scratch = reinterpret_cast<float*>(&between + 1);
  float* const runs = scratch + kScratch;
  float* const row = runs + kQuads * kWarps;
  Made& mixer = *reinterpret_cast<Made*>(row + p.row_floats);
  const Ring ring(shared, p.stages, p.stage_bytes);
  const uint32_t mixer_full = ring.other_barrier(0), mixer_empty = ring.other_barrier(1);
  if (threadIdx.x == kTeam) {
    init_barrier(mixer_full, 1), init_barrier(mixer_empty, kWarps);
    ring.init();
  }
  __syncthreads();

  if (warp < kWarps) {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kManyRegisters));

  const int inner = p.matrix[1].K, lane = threadIdx.x % 32;
  const Share of_in(p.matrix[0]), of_out(p.matrix[1]);
  const Part part(p);
  const int group = part.group, rows = part.rows, channel0 = part.channel0;
  // a thread's channel of the convolution: of B and C, or of the block's rows of x
  const int own_row = static_cast<int>(threadIdx.x) - 2 * kN;
  const bool is_row = own_row >= 0, is_B = threadIdx.x < kN, exists = rows > 0 && own_row < rows;
  const int shared0 = inner + (is_B ? 0 : (p.mixer.G - 1) * kN) + group * kN;
  const int place = is_row ? channel0 + own_row : shared0 + static_cast<int>(threadIdx.x);
  const int head = is_row && exists ? place / p.mixer.P : 0, own_head = is_row ? head - channel0 / p.mixer.P : 0;
  const int early = kCodes && is_row ? channel0 % 16 : 0;  // bytes that came along

  const int inputs = inner, dts = 2 * inner + 2 * p.mixer.G * kN;  // where x and dt begin in projected
  Stage stage{0, 0};
  unsigned own_input = 0;  // of the thread's channel of the convolution
  float before = 0.f;      // the residual in the thread's row of out_proj
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
      await(p.counts + out, static_cast<int>((out ? layer : layer - 1) * gridDim.x) - p.ahead);
      receive(v, out ? p.u : p.residual, m.K, out ? layer : layer - 1);
    } else {
      QUAMBA_EACH_QUAD(i, m.K) {
        const float4 four = quad_of(i) * 4 < m.K ? __ldcg(reinterpret_cast<const float4*>(p.x) + quad_of(i))
                                                 : make_float4(0.f, 0.f, 0.f, 0.f);
        v[i][0] = four.x, v[i][1] = four.y, v[i][2] = four.z, v[i][3] = four.w;
      }
    }
    if (out && part.first) {  // the first block of a group still needs what it has of the mixer
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
      sum = __fmul_rn(sum, x_scale);
      if (kCodes) sum = __fmul_rn(sum, weight_scale);
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
    if (out && !part.first) {
      // all threads of the block have had all of u, so that all blocks have read what is replaced here
      if (rows > 0 && !is_row) {
        const QuambaDecode q = mixer_of<kCodes, TYPE>(p, l);
        decode::Taps taps{};
        decode::Window window;
        read_channel<kCodes, TYPE>(q, mixer, threadIdx.x, 0, place, own_input & 0xffffu, taps, window);
        decode::shift<kCodes>(q, taps.in, window);
      }
      if (kStateCodes && l.rng && blockIdx.x == 0 && threadIdx.x == 0) l.rng[1] = __ldcg(l.rng + 1) + 1;
      __syncwarp();
      if (lane == 0) arrive(mixer_empty);
    }
    if (!out) {  // a branch of its own: as an else, ptxas 13.0 spills three times as much for W8A8
      const QuambaDecode q = mixer_of<kCodes, TYPE>(p, l);
      wait(mixer_full, turn / 2 & 1);
      if (exists) {
        decode::Taps taps{};
        decode::Window window;
        unsigned got[3];
        const unsigned* const input = p.projected + inputs + place;
        receive(got, {input, is_row ? p.projected + dts + head : input, is_row ? p.projected + place : input}, layer);
        own_input = got[0];
        float dt = decode::to_float(got[1], TYPE);
        const float z = decode::to_float(got[2], TYPE);
        read_channel<kCodes, TYPE>(q, mixer, threadIdx.x, early, place, got[0] & 0xffffu, taps, window);
        const float made = decode::convolve<kCodes>(q, taps, window);
        if (is_row) {
          const float xs = made * mixer.x_scale[q.x_count > 1 ? own_row : 0];
          decode::shift<kCodes>(q, taps.in, window);
          dt = fminf(fmaxf(decode::softplus(__fadd_rn(dt, mixer.dt_bias[own_head])), q.dt_min), q.dt_max);
          between.info[own_row] = {expf(__fmul_rn(dt, mixer.A[own_head])), __fmul_rn(dt, xs), __fmul_rn(xs, mixer.D[own_head]),
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
  } else {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kFewRegisters));
    if (warp == kWarps) carry_weights<KIND, false>(p, ring);
    if (warp == kWarps + 2) carry_weights<KIND, true>(p, ring);
    if (warp == kWarps + 1) bring_mixers<KIND, State>(p, mixer, mixer_full, mixer_empty);
  }
}

}  // namespace quamba::stack
