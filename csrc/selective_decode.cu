// One token of Mamba1's recurrence, from x, dt, B and C to the gated output; decode_finish.cu does the rest.
//
// LANES threads hold a row of the state, 16 bytes each (one thread a row of 16 int8), and keep what belongs to its
// channel in registers (A above all: 64 bytes a row, more than the int8 state itself) while they walk over sequences of
// the batch, several loads ahead. Hazards and what is fetched before the wait are as in ssd_decode.cuh.
//
// Budget, int8: 40 bytes of traffic and 64 of L2 (once in `run` sequences) for 16 elements. An element takes an
// exponential (2 instructions), unpacking 2.3, recurrence 4, maximum, rounding, dither and packing 8; the row's own
// softplus, gate and hash add 10: 28 instructions for 2.5 bytes, so 3 TB/s leave an H100 about as many as it needs.
#include <cstdlib>

#include "decode_finish.h"
#include "decode_launch.cuh"
#include "decode_state.cuh"

namespace quamba::decode {

constexpr int kRowThreads = 128, kStates = 16, kMaxRun = 32, kRowBlocks = 4;

struct SelectiveParams {
  QuambaDecode q;
  int run;  // sequences of a block
};

// CODES: x is int8 and the rest of the activations has 16 bits, as in a quantised model.
template <typename State, bool CODES>
__global__ void __launch_bounds__(kRowThreads, kRowBlocks) selective_rows(const __grid_constant__ SelectiveParams p) {
  constexpr int COUNT = 16 / sizeof(State), kLanes = kStates / COUNT;
  constexpr bool kCodes = sizeof(State) == 1;
  constexpr int kAhead = kCodes ? 2 : 4;
  __shared__ __align__(16) float Bs[kMaxRun][kStates];
  __shared__ __align__(16) float Cs[kMaxRun][kStates];
  __shared__ __align__(16) unsigned columns[kStates];
  const QuambaDecode& q = p.q;
  launch_dependents();

  const int in = Types<CODES>::input(q), x_in = CODES ? QUAMBA_I8 : q.x_in;
  const int inner = q.H, row = blockIdx.x * (blockDim.x / kLanes) + threadIdx.x / kLanes;
  const int column = threadIdx.x % kLanes * COUNT, channel = min(row, inner - 1);
  const bool exists = row < inner;
  const int first = blockIdx.y * p.run, count = min(p.run, q.batch - first);
  State* const state = static_cast<State*>(q.state) + static_cast<long long>(channel) * kStates + column;
  const long long state_step = static_cast<long long>(inner) * kStates;
  if (column * sizeof(State) % 32 == 0 && exists)
    for (int i = 0; i < count; ++i) {
      prefetch_l2(state + (first + i) * state_step);
      if (kCodes && row % 8 == 0) prefetch_l2(q.state_scale + static_cast<long long>(first + i) * inner + row);
    }

  float A[COUNT];
  const float* const rates = q.A + static_cast<long long>(channel) * kStates + column;
#pragma unroll
  for (int i = 0; i < COUNT / 4; ++i) {
    const uint4 four = constant_quad(rates + 4 * i);
    A[4 * i] = __uint_as_float(four.x), A[4 * i + 1] = __uint_as_float(four.y);
    A[4 * i + 2] = __uint_as_float(four.z), A[4 * i + 3] = __uint_as_float(four.w);
  }
  const float D = constant(q.D, channel, 0.f), dt_bias = constant(q.dt_bias, channel, 0.f);
  const float x_scale = constant(q.x_scale, q.x_count > 1 ? channel : 0, 1.f);
  const float z_scale = constant(q.z_scale, q.z_count > 1 ? channel : 0, 1.f);
  const float B_scale = constant(q.B_scale, 0, 1.f), C_scale = constant(q.C_scale, 0, 1.f);

  wait_for_previous_kernel();
  Stored<State, COUNT> ring[kAhead];
  float scales[kAhead];
  unsigned xs[kAhead], dts[kAhead], zs[kAhead];
  const auto load = [&](int u, int i) {
    if (i >= count || !exists) return;
    const long long batch = first + i;
    ring[u].load(state + batch * state_step);
    if (kCodes) scales[u] = __ldcg(q.state_scale + batch * inner + channel);
    xs[u] = fetch(q.x, x_in, batch * q.x_stride + channel);
    dts[u] = fetch(q.dt, in, batch * q.dt_stride + channel);
    zs[u] = fetch(q.z, in, batch * q.z_stride + channel);
  };
#pragma unroll
  for (int u = 0; u < kAhead; ++u) {
    ring[u] = {};
    scales[u] = 0.f;
    xs[u] = dts[u] = zs[u] = 0;
    load(u, u);
  }
  for (int i = threadIdx.x; i < count * 2 * kStates; i += blockDim.x) {
    const int n = i % kStates, b = i / (2 * kStates);
    const bool is_B = i / kStates % 2 == 0;
    const void* const from = is_B ? q.B : q.C;
    const long long at = (first + b) * q.bc_stride + n;
    const float v = value(fetch(from, in, at), from, in, at), scale = is_B ? B_scale : C_scale;
    const bool coded = is_B ? q.B_scale != nullptr : q.C_scale != nullptr;
    (is_B ? Bs : Cs)[b][n] = coded ? __fmul_rn(code_of(v, scale), scale) : v;
  }
  const bool noisy = kCodes && q.rng;
  const unsigned key = noisy ? dither_key(q.rng) : 0;
  if (noisy && threadIdx.x < kStates)
    columns[threadIdx.x] = column_draw(key, static_cast<unsigned>(q.batch) * inner + threadIdx.x);
  __syncthreads();
  unsigned dither[kCodes ? COUNT : 1];
  if constexpr (kCodes)
#pragma unroll
    for (int i = 0; i < COUNT; ++i) dither[i] = noisy ? columns[column + i] : 0;

#pragma unroll 1
  for (int base = 0; base < count; base += kAhead) {
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const int i = base + u;
      if (i >= count) break;
      const long long batch = first + i;
      const float x = __fmul_rn(value(xs[u], q.x, x_in, batch * q.x_stride + channel), x_scale);
      const float z = value(zs[u], q.z, in, batch * q.z_stride + channel), scale = scales[u];
      const float rate = value(dts[u], q.dt, in, batch * q.dt_stride + channel);
      constexpr float kLog2e = 1.44269504088896341f;
      const float dt = softplus(__fadd_rn(rate, dt_bias)), input = __fmul_rn(dt, x), power = dt * kLog2e;
      float h[COUNT], y = 0.f;
      unpack(ring[u], h);
      load(u, i + kAhead);
#pragma unroll
      for (int j = 0; j < COUNT; j += 4) {
        const float4 b = *reinterpret_cast<const float4*>(&Bs[i][column + j]);
        const float4 c = *reinterpret_cast<const float4*>(&Cs[i][column + j]);
        const float bs[4] = {b.x, b.y, b.z, b.w}, cs[4] = {c.x, c.y, c.z, c.w};
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const float before = kCodes ? h[j + k] * scale : h[j + k];
          h[j + k] = fmaf(exp2_approximate(power * A[j + k]), before, input * bs[k]);
          y = fmaf(h[j + k], cs[k], y);
        }
      }
      y = sum_lanes<kLanes>(y);
      const long long at = batch * inner + channel;
      Stored<State, COUNT> stored;
      float row_scale = 0.f;
      if constexpr (kCodes)
        row_scale = quantize_row<kLanes>(h, noisy, noisy ? row_draw(key, static_cast<unsigned>(at)) : 0, dither, stored);
      else
        pack(h, stored);
      if (!exists) continue;
      stored.store(state + batch * state_step);
      if (column == 0) {
        if (kCodes) q.state_scale[at] = row_scale;
        static_cast<float*>(q.workspace)[at] = (y + __fmul_rn(x, D)) * gate_of(q, z, z_scale);
      }
    }
  }
}

template <typename State>
cudaError_t launch_selective(const QuambaDecode& q, int sms, void* stream) {
  constexpr int kLanes = kStates * sizeof(State) / 16;
  // few sequences: small blocks, so that more multiprocessors take part; many: a run of them for each block
  const int threads = static_cast<long long>(q.batch) * q.H * kLanes >= 256ll * sms ? kRowThreads : kRowThreads / 2;
  const int tile = threads / kLanes, tiles = (q.H + tile - 1) / tile;
  // one wave of blocks, so that A and what else belongs to a channel is read by few of them
  const long long blocks = static_cast<long long>(q.batch) * tiles, slots = static_cast<long long>(kRowBlocks) * sms;
  const long long wanted = (blocks + slots - 1) / slots;
  int run = wanted > kMaxRun ? kMaxRun : static_cast<int>(wanted);
#ifdef QUAMBA_TUNE
  if (const char* text = std::getenv("QUAMBA_DECODE_RUN")) run = std::atoi(text);
#endif
  const dim3 grid(tiles, (q.batch + run - 1) / run);
  return q.x_in == QUAMBA_I8 && q.in != QUAMBA_F32
             ? launch(selective_rows<State, true>, SelectiveParams{q, run}, grid, threads, 0, stream)
             : launch(selective_rows<State, false>, SelectiveParams{q, run}, grid, threads, 0, stream);
}

}  // namespace quamba::decode

extern "C" long long quamba_selective_decode_workspace(const QuambaDecode* q) { return 4ll * q->batch * q->H; }

extern "C" int quamba_selective_decode(const QuambaDecode* call, void* stream) {
  using namespace quamba;
  using namespace quamba::decode;
  const QuambaDecode& q = *call;
  Rotation rotation;
  if (q.P != 1 || q.N != kStates || q.batch > 65535 || !can_finish(q, rotation) ||
      reinterpret_cast<uintptr_t>(q.A) % 16)
    return QUAMBA_UNSUPPORTED;
  if (q.state_type == QUAMBA_I8 ? !q.state_scale : q.state_scale != nullptr) return QUAMBA_UNSUPPORTED;
  int ordinal = 0, sms = 0;
  cudaError_t error = cudaGetDevice(&ordinal);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, ordinal);
  if (error != cudaSuccess) return error;
  switch (q.state_type) {
    case QUAMBA_F32: error = launch_selective<float>(q, sms, stream); break;
    case QUAMBA_F16: error = launch_selective<__half>(q, sms, stream); break;
    case QUAMBA_I8: error = launch_selective<int8_t>(q, sms, stream); break;
    default: return QUAMBA_UNSUPPORTED;
  }
  return error != cudaSuccess ? error : launch_finish(q, rotation, 0, false, sms, stream);
}
