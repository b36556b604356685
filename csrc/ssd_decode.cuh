// One token of Mamba2's mixer, from the output of in_proj to the gated output of the recurrence.
//
// The heads of a state group share B and C, so a group's state is one matrix of (heads x headdim) rows of N; a block
// takes `rows` of them. Its threads first make what the rows need: the convolution of the group's 2 N channels of B and C
// (again in every block: 4 multiplications a channel) and of its own channels of x, dt, gate, dither. Then LANES threads
// hold a row, 16 bytes each, and walk down the tile with several rows of loads in flight.
//
// Hazards. A block reads and writes the convolution's state of its own x; that of B and C it only reads, and the second
// kernel (decode_finish.cu) shifts it. The state and the rest of what a step writes are read after the wait for the
// previous kernel: that one may have let this one start early, while the step before still ran. What is fetched ahead of
// the wait are constants, and the state into L2, where a later write finds it.
//
// Budget, int8 of N = 128: 2 bytes of traffic an element, so 3 TB/s leave 19 instructions each on an H100. Unpacking
// takes 2.3, the recurrence 3 (all fp32), the maximum 1, rounding 2 and dither 2, packing 0.8, sums over lanes and the
// rest of a row 5 or 6: 17 in the machine code for sm_90a. fp16: 4 bytes, 6 instructions.
#pragma once

#include <cstdlib>

#include "decode_launch.cuh"
#include "decode_state.cuh"

namespace quamba::decode {

constexpr int kMagicBits = 31;  // exact while channels times P stay below 2^31

struct SsdParams {
  QuambaDecode q;
  int rows, group_rows;  // of a block, of a group
  unsigned head_magic;   // ceil(2^kMagicBits / P): head = channel * head_magic >> kMagicBits
};

template <typename State, int N, int COUNT>
struct SsdConfig {
  static constexpr int kThreads = N >= 128 ? 256 : 128, kBlocks = 512 / kThreads;  // 128 registers a thread
  static constexpr int kLanes = N / COUNT, kPass = kThreads / kLanes;              // threads of a row, rows at a time
  static constexpr int kRing = sizeof(State) == 1 ? 4 : 8 / Stored<State, COUNT>::kWords;
  static constexpr int kShared = (2 * N + kThreads - 1) / kThreads;  // channels of B and C for each thread
  static_assert(kLanes <= 32, "a row lies within a warp");
};

template <typename State, int N, int COUNT, bool CODES>
__global__ void __launch_bounds__(SsdConfig<State, N, COUNT>::kThreads, SsdConfig<State, N, COUNT>::kBlocks)
    ssd_rows(const __grid_constant__ SsdParams p) {
  using Config = SsdConfig<State, N, COUNT>;
  constexpr int kThreads = Config::kThreads, kLanes = Config::kLanes, kPass = Config::kPass, kRing = Config::kRing;
  constexpr int kShared = Config::kShared;
  constexpr bool kCodes = sizeof(State) == 1;
  extern __shared__ __align__(16) char shared[];
  const QuambaDecode& q = p.q;
  launch_dependents();

  const int group = blockIdx.y, batch = blockIdx.z, group_rows = p.group_rows;
  const int first = blockIdx.x * p.rows, rows = min(p.rows, group_rows - first);
  const int channel0 = group * group_rows + first, inner = q.H * q.P;
  const long long row0 = static_cast<long long>(batch) * inner + channel0;
  float* const Bs = reinterpret_cast<float*>(shared);
  float* const Cs = Bs + N;
  unsigned* const columns = reinterpret_cast<unsigned*>(Cs + N);
  Row* const info = reinterpret_cast<Row*>(columns + N);
  unsigned* const draws = reinterpret_cast<unsigned*>(info + p.rows);

  const int own = threadIdx.x / kLanes, column = threadIdx.x % kLanes * COUNT;
  State* state = static_cast<State*>(q.state) + (row0 + own) * N + column;
  float* state_scale = kCodes ? q.state_scale + row0 + own : nullptr;
  for (int at = own; at < rows; at += kPass)
    if (column * sizeof(State) % 32 == 0) prefetch_l2(state + static_cast<long long>(at - own) * N);
  if (kCodes && static_cast<int>(threadIdx.x) * 8 < rows) prefetch_l2(q.state_scale + row0 + threadIdx.x * 8);

  // A thread's channels: of B and C, and a row of the tile.
  const int c0 = threadIdx.x, row = threadIdx.x, channel = channel0 + row;
  const bool has_row = row < rows;
  const auto place = [&](int c) { return inner + (c < N ? group * N + c : (q.G - 1 + group) * N + c); };
  Taps taps[kShared], row_taps{};
  float units[kShared], row_unit = 1.f;
  Rates rates{};
  const int head = static_cast<int>(static_cast<unsigned long long>(channel) * p.head_magic >> kMagicBits);
#pragma unroll
  for (int s = 0; s < kShared; ++s) {
    const int c = s * kThreads + c0;
    if (c >= 2 * N) continue;
    taps[s] = taps_of<CODES>(q, place(c));
    units[s] = c < N ? constant(q.B_scale, q.B_count > 1 ? group : 0, 1.f)
                     : constant(q.C_scale, q.C_count > 1 ? group : 0, 1.f);
  }
  if (has_row) {
    row_taps = taps_of<CODES>(q, channel);
    row_unit = constant(q.x_scale, q.x_count > 1 ? channel : 0, 1.f);
    rates = {constant(q.A, head, 0.f), constant(q.D, head, 0.f), constant(q.dt_bias, head, 0.f),
             constant(q.z_scale, q.z_count > 1 ? channel : 0, 1.f)};
  }

  wait_for_previous_kernel();
  const int in = Types<CODES>::input(q);
  const long long place_dt = batch * q.dt_stride + head, place_z = batch * q.z_stride + channel;
  Window windows[kShared], row_window{};
  unsigned dt_word = 0, z_word = 0;
#pragma unroll
  for (int s = 0; s < kShared; ++s) {
    const int c = s * kThreads + c0;
    if (c >= 2 * N) continue;
    const bool is_B = c < N;
    windows[s] = window_of<CODES>(q, batch, place(c), is_B ? q.B : q.C,
                                  batch * q.bc_stride + group * N + (is_B ? c : c - N));
  }
  if (has_row) {
    row_window = window_of<CODES>(q, batch, channel, q.x, batch * q.x_stride + channel);
    dt_word = fetch(q.dt, in, place_dt), z_word = fetch(q.z, in, place_z);
  }
  Stored<State, COUNT> ring[kRing];
  float scales[kRing];
  // pass `base + u` of the tile, when the pointers stand at `base` less `ahead`
  const auto load = [&](int u, int base, int ahead) {
    if ((base + u) * kPass + own >= rows) return;
    ring[u].load(state + (ahead + u) * kPass * N);
    if (kCodes) scales[u] = __ldcg(state_scale + (ahead + u) * kPass);
  };
#pragma unroll
  for (int u = 0; u < kRing; ++u) {
    ring[u] = {};
    scales[u] = 0.f;
    load(u, 0, 0);
  }
  const bool noisy = kCodes && q.rng;
  const unsigned key = noisy ? dither_key(q.rng) : 0;
#pragma unroll
  for (int s = 0; s < kShared; ++s) {
    const int c = s * kThreads + c0;
    if (c < 2 * N) Bs[c] = convolve<CODES>(q, taps[s], windows[s]) * units[s];  // Cs follows Bs
  }
  if (has_row) {
    const float x = convolve<CODES>(q, row_taps, row_window) * row_unit;
    shift<CODES>(q, row_taps.in, row_window);
    const float raw = __fadd_rn(value(dt_word, q.dt, in, place_dt), rates.dt_bias);
    const float dt = fminf(fmaxf(softplus(raw), q.dt_min), q.dt_max);
    info[row] = {expf(__fmul_rn(dt, rates.A)), __fmul_rn(dt, x), __fmul_rn(x, rates.D),
                 gate_of(q, value(z_word, q.z, in, place_z), rates.z_scale)};
  }
  if (noisy) {
    const unsigned all = static_cast<unsigned>(q.batch) * inner;
    for (int i = threadIdx.x; i < N + rows; i += kThreads) {
      if (i < N)
        columns[i] = column_draw(key, all + i);
      else
        draws[i - N] = row_draw(key, static_cast<unsigned>(row0) + i - N);
    }
  }
  __syncthreads();

  float B[COUNT], C[COUNT];
  unsigned dither[kCodes ? COUNT : 1];
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    B[i] = Bs[column + i], C[i] = Cs[column + i];
    if constexpr (kCodes) dither[i] = columns[column + i];
  }
  const int passes = (rows + kPass - 1) / kPass;
  float* u_out = static_cast<float*>(q.workspace) + row0 + own;
  const Row* own_info = info + own;
#pragma unroll 1
  for (int base = 0; base < passes; base += kRing) {
    // kept as they are: computed again for every access they would take a sixth of the instructions
    asm volatile("" : "+l"(state), "+l"(state_scale), "+l"(u_out));
#pragma unroll
    for (int u = 0; u < kRing; ++u) {
      const int pass = base + u, at = pass * kPass + own;
      if (pass >= passes) break;
      const Row r = at < rows ? own_info[u * kPass] : info[0];
      float h[COUNT];
      unpack(ring[u], h);
      const float decay = kCodes ? r.decay * scales[u] : r.decay;
      load(u, base + kRing, kRing);
      float y = 0.f;
#pragma unroll
      for (int i = 0; i < COUNT; ++i) {
        h[i] = fmaf(decay, h[i], r.input * B[i]);
        y = fmaf(h[i], C[i], y);
      }
      y = sum_lanes<kLanes>(y);
      Stored<State, COUNT> stored;
      float scale = 0.f;
      if constexpr (kCodes)
        scale = quantize_row<kLanes>(h, noisy, noisy ? draws[min(at, rows - 1)] : 0, dither, stored);
      else
        pack(h, stored);
      if (at >= rows) continue;
      stored.store(state + u * kPass * N);
      if (column == 0) {
        if (kCodes) state_scale[u * kPass] = scale;
        u_out[u * kPass] = (y + r.skip) * r.gate;
      }
    }
    state += kRing * kPass * N, u_out += kRing * kPass, own_info += kRing * kPass;
    if (kCodes) state_scale += kRing * kPass;
  }
}

template <typename State, int N, int COUNT>
cudaError_t launch_rows(const QuambaDecode& q, int sms, void* stream) {
  using Config = SsdConfig<State, N, COUNT>;
  const int group_rows = q.H / q.G * q.P;
  // rounds of blocks, times what one takes: making B, C and the rows' terms counts as much as some rows
  constexpr int kPrologue = 48;
  int rows = 0;
  long long least = 0;
  for (int tile = 128; tile >= 16 && (tile >= Config::kPass || !rows); tile /= 2) {
    const long long blocks = static_cast<long long>(q.batch) * q.G * ((group_rows + tile - 1) / tile);
    const long long at_once = static_cast<long long>(Config::kBlocks) * sms;
    const long long cost = (blocks + at_once - 1) / at_once * (kPrologue + tile);
    if (!rows || cost < least) rows = tile, least = cost;
  }
#ifdef QUAMBA_TUNE
  if (const char* text = std::getenv("QUAMBA_DECODE_ROWS")) rows = std::min(std::atoi(text), Config::kThreads);
#endif
  const unsigned magic = static_cast<unsigned>(((1ull << kMagicBits) + q.P - 1) / q.P);
  const int bytes = 4 * 3 * N + rows * static_cast<int>(sizeof(Row) + sizeof(float));
  const dim3 grid((group_rows + rows - 1) / rows, q.G, q.batch);
  const SsdParams params{q, rows, group_rows, magic};
  return all_codes(q) ? launch(ssd_rows<State, N, COUNT, true>, params, grid, Config::kThreads, bytes, stream)
                      : launch(ssd_rows<State, N, COUNT, false>, params, grid, Config::kThreads, bytes, stream);
}

// The first kernel of the step for states of one type; QUAMBA_UNSUPPORTED for a d_state that has none.
template <typename State>
int launch_ssd(const QuambaDecode& q, int sms, void* stream) {
  constexpr int kCount = 16 / sizeof(State), kWide = sizeof(State) == 4 ? 8 : kCount;
  if (q.N == 16) return launch_rows<State, 16, kCount>(q, sms, stream);
  if (q.N == 32) return launch_rows<State, 32, kCount>(q, sms, stream);
  if (q.N == 64) return launch_rows<State, 64, kCount>(q, sms, stream);
  if (q.N == 128) return launch_rows<State, 128, kCount>(q, sms, stream);
  if (q.N == 256) return launch_rows<State, 256, kWide>(q, sms, stream);
  return QUAMBA_UNSUPPORTED;
}

}  // namespace quamba::decode
