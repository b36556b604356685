// Mamba1's selective scan: h <- exp(dt A) h + dt x B, y = C h + D x, for every channel and state.
//
// What bounds it is the exponential: one for each token, channel and state, 16 a cycle and multiprocessor, where the rest
// is four multiply-adds; the bytes are a quarter of that time. Cutting time into chunks that run at once, and joining
// them afterwards, needs each exponential twice. So time is not cut: a channel's states are shared out over the lanes of
// a warp, 8 lanes of 2 states or 4 lanes of 4, which gives 1280 warps for 5120 channels, each exponential is taken
// once, and what is added are sums over the lanes, for as many tokens at a time as there are lanes: a butterfly that
// halves the number of values at every step costs 7 shuffles for 8 tokens.
//
// A block stages tiles of 32 tokens in shared memory: dt after the softplus and dt x for its channels, B and C for all.
// The next tile is on its way while one is computed.
#include "launch.cuh"
#include "quads.cuh"
#include "scan.h"

namespace {

using namespace quamba;

constexpr int kThreads = 128, kTokens = 32;

struct Scan {
  QuambaScan a;
  int blocks;  // of channels
  bool whole_x, whole_dt, whole_b, whole_c, whole_y;
};

// 2^v on the pipe of the multiply-adds: rounded to an integer, a polynomial of degree five for the rest, to 1e-7.
__device__ __forceinline__ float exp2_polynomial(float v) {
  v = fmaxf(v, -126.f);
  const float shifted = __fadd_rn(v, kRounder), rest = v - __fadd_rn(shifted, -kRounder);
  float y = 1.3264727e-3f;
  y = __fmaf_rn(y, rest, 9.671513e-3f);
  y = __fmaf_rn(y, rest, 5.5507336e-2f);
  y = __fmaf_rn(y, rest, 2.4022242e-1f);
  y = __fmaf_rn(y, rest, 6.93147e-1f);
  y = __fmaf_rn(y, rest, 1.f);
  return __int_as_float(__float_as_int(y) + (__float_as_int(shifted) << 23));
}

// log(1 + exp(v)) to a few units in the last place: max(v, 0) + 2 artanh(e / (2 + e)), e = exp(-|v|).
__device__ __forceinline__ float softplus(float v) {
  const float e = exp2_approximate(-kLog2e * fabsf(v)), s = __fdividef(e, 2.f + e), q = s * s;
  float sum = 2.f / 13.f;
  sum = __fmaf_rn(sum, q, 2.f / 11.f);
  sum = __fmaf_rn(sum, q, 2.f / 9.f);
  sum = __fmaf_rn(sum, q, 2.f / 7.f);
  sum = __fmaf_rn(sum, q, 2.f / 5.f);
  sum = __fmaf_rn(sum, q, 2.f / 3.f);
  sum = __fmaf_rn(sum, q, 2.f);
  return __fmaf_rn(sum, s, fmaxf(v, 0.f));
}

// Lanes x States = N. Polynomial: how many of eight exponentials do not go through the special function unit.
template <int Lanes, int States, int Polynomial>
__global__ void __launch_bounds__(kThreads) selective_scan(const __grid_constant__ Scan p) {
  constexpr int N = Lanes * States, kChannels = kThreads / Lanes, kPlanes = States / 2;
  constexpr int kQuads = kChannels / 4;                               // of channels
  constexpr int kItems = kTokens * kQuads / kThreads;                 // quads of channels a thread stages
  constexpr int kRows = N / 4;                                        // quads of B, and of C, a token
  constexpr int kRowItems = (kTokens * kRows + kThreads - 1) / kThreads;
  constexpr int kPitch = kChannels + 32 / Lanes;  // so that a butterfly's results fall into different banks
  __shared__ float4 rates[2][kTokens / 2][kChannels + 1];      // dt, dt x of two tokens
  __shared__ float4 columns[2][kTokens][kPlanes][Lanes];       // B, B, C, C of two states; or planes of four
  __shared__ __align__(16) float outputs[2][kTokens][kPitch];

  const QuambaScan& a = p.a;
  const int thread = threadIdx.x, lane = thread % Lanes, own = thread / Lanes;
  const int sequence = blockIdx.x / p.blocks, block = (blockIdx.x - sequence * p.blocks) * kChannels;
  const int channel = block + own;
  const bool exists = channel < a.I;
  const int quad = thread % kQuads, first = block + 4 * quad, count = min(a.I - first, 4);
  launch_dependents();
  wait_for_previous_kernel();

  long long begin = 0, tokens = a.T, batch = sequence;
  if (a.cu_seqlens) {
    batch = 0;
    begin = min(max(static_cast<long long>(__ldg(a.cu_seqlens + sequence)), 0LL), a.T);
    tokens = max(min(static_cast<long long>(__ldg(a.cu_seqlens + sequence + 1)), a.T) - begin, 0LL);
  }
  const long long x_base = batch * a.x_batch + begin * a.x_token + first;
  const long long dt_base = batch * a.dt_batch + begin * a.dt_token + first;
  const long long b_base = batch * a.b_batch + begin * a.b_token, c_base = batch * a.c_batch + begin * a.c_token;
  const long long y_base = (batch * a.T + begin) * a.I + first;

  float decay[States], h[States];
  const long long at = (static_cast<long long>(sequence) * a.I + channel) * N + lane * States;
#pragma unroll
  for (int s = 0; s < States; ++s) {
    decay[s] = exists ? kLog2e * __ldg(a.A + static_cast<long long>(channel) * N + lane * States + s) : 0.f;
    h[s] = exists && a.state ? __ldcg(a.state + at + s) : 0.f;
  }
  const float4 x_scale = load_scales(a.x_scale, a.x_scale_count > 1, first, count, 1.f);
  const float4 skip = load_quad(a.D, a.D_dtype, first, count, false);
  float4 bias = make_float4(0.f, 0.f, 0.f, 0.f);
  if (a.dt_bias) bias = load_quad(a.dt_bias, a.dt_bias_dtype, first, count, false);
  const float b_scale = a.b_scale ? __ldg(a.b_scale) : 1.f, c_scale = a.c_scale ? __ldg(a.c_scale) : 1.f;

  uint4 raw_x[kItems], raw_dt[kItems], raw_b[kRowItems], raw_c[kRowItems];
  auto fetch = [&](long long start) {
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      const long long t = start + (thread + k * kThreads) / kQuads;
      const int there = t < tokens ? count : 0;
      raw_x[k] = load_raw(a.x, a.x_dtype, x_base + t * a.x_token, there, p.whole_x);
      raw_dt[k] = load_raw(a.dt, a.dt_dtype, dt_base + t * a.dt_token, there, p.whole_dt);
    }
#pragma unroll
    for (int k = 0; k < kRowItems; ++k) {
      const int item = thread + k * kThreads, row = item / kRows;
      const long long t = start + row;
      const int there = row < kTokens && t < tokens ? 4 : 0, from = item % kRows * 4;
      raw_b[k] = load_raw(a.b, a.b_dtype, b_base + t * a.b_token + from, there, p.whole_b);
      raw_c[k] = load_raw(a.c, a.c_dtype, c_base + t * a.c_token + from, there, p.whole_c);
    }
  };
  float4 skipped[kItems];  // D x
  auto stage = [&](long long start, int buffer) {
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      const int row = (thread + k * kThreads) / kQuads;
      const bool real = start + row < tokens;  // dt = 0 leaves the states alone
      const float4 x = each([](float v, float s) { return v * s; }, to_floats(raw_x[k], a.x_dtype), x_scale);
      const float4 dt = each([&](float v, float b) { return real ? softplus(v + b) : 0.f; },
                             to_floats(raw_dt[k], a.dt_dtype), bias);
      skipped[k] = each([](float v, float d) { return v * d; }, x, skip);
      float2* rate = reinterpret_cast<float2*>(&rates[buffer][row / 2][4 * quad]) + row % 2;
      rate[0] = make_float2(dt.x, dt.x * x.x);
      rate[2] = make_float2(dt.y, dt.y * x.y);
      rate[4] = make_float2(dt.z, dt.z * x.z);
      rate[6] = make_float2(dt.w, dt.w * x.w);
    }
#pragma unroll
    for (int k = 0; k < kRowItems; ++k) {
      const int item = thread + k * kThreads, row = item / kRows, q = item % kRows;
      if (row >= kTokens) continue;
      const float4 b = to_floats(raw_b[k], a.b_dtype), c = to_floats(raw_c[k], a.c_dtype);
      const float4 bs = make_float4(b.x * b_scale, b.y * b_scale, b.z * b_scale, b.w * b_scale);
      const float4 cs = make_float4(c.x * c_scale, c.y * c_scale, c.z * c_scale, c.w * c_scale);
      if constexpr (States == 2) {
        columns[buffer][row][0][2 * q] = make_float4(bs.x, bs.y, cs.x, cs.y);
        columns[buffer][row][0][2 * q + 1] = make_float4(bs.z, bs.w, cs.z, cs.w);
      } else {
        columns[buffer][row][0][q] = bs;
        columns[buffer][row][1][q] = cs;
      }
    }
  };

  fetch(0);
  stage(0, 0);
  __syncthreads();
  int buffer = 0;
  for (long long start = 0; start < tokens; start += kTokens) {
    fetch(start + kTokens);
    const int here = static_cast<int>(min(tokens - start, static_cast<long long>(kTokens)));
#pragma unroll 1
    for (int group = 0; group < here; group += Lanes) {
      float sums[Lanes];
#pragma unroll
      for (int u = 0; u < Lanes; ++u) {
        const int t = group + u;
        const float4 rate = rates[buffer][t / 2][own];
        const float dt = u % 2 ? rate.z : rate.x, dt_x = u % 2 ? rate.w : rate.y;
        float b[States], c[States];
        if constexpr (States == 2) {
          const float4 v = columns[buffer][t][0][lane];
          b[0] = v.x, b[1] = v.y, c[0] = v.z, c[1] = v.w;
        } else {
          const float4 v = columns[buffer][t][0][lane], w = columns[buffer][t][1][lane];
          b[0] = v.x, b[1] = v.y, b[2] = v.z, b[3] = v.w, c[0] = w.x, c[1] = w.y, c[2] = w.z, c[3] = w.w;
        }
        float sum = 0.f;
#pragma unroll
        for (int s = 0; s < States; ++s) {
          const float exponent = dt * decay[s];
          const bool by_polynomial = (u * States + s) % 8 < Polynomial;
          const float kept = by_polynomial ? exp2_polynomial(exponent) : exp2_approximate(exponent);
          h[s] = __fmaf_rn(kept, h[s], dt_x * b[s]);
          sum = __fmaf_rn(c[s], h[s], sum);
        }
        sums[u] = sum;
      }
      // lane j of a channel ends up with the sum over all lanes for token j
#pragma unroll
      for (int step = Lanes / 2; step; step /= 2) {
        const bool upper = lane & step;
#pragma unroll
        for (int i = 0; i < step; ++i) {
          const float sent = upper ? sums[i] : sums[i + step], kept = upper ? sums[i + step] : sums[i];
          sums[i] = kept + __shfl_xor_sync(~0u, sent, step);
        }
      }
      outputs[buffer][group + lane][own] = sums[0];
    }
    float4 added[kItems];
#pragma unroll
    for (int k = 0; k < kItems; ++k) added[k] = skipped[k];
    if (start + kTokens < tokens) stage(start + kTokens, buffer ^ 1);
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      const int row = (thread + k * kThreads) / kQuads;
      if (row >= here) continue;
      const float4 y = each([](float v, float w) { return v + w; }, added[k],
                            *reinterpret_cast<const float4*>(&outputs[buffer][row][4 * quad]));
      store_quad(a.y, a.y_dtype, y_base + (start + row) * a.I, y, count, p.whole_y);
    }
    buffer ^= 1;
  }
  if (exists)
#pragma unroll
    for (int s = 0; s < States; ++s) a.last[at + s] = h[s];
}

template <int Lanes, int States, int Polynomial = 0>
int launch_scan(const QuambaScan& a, void* stream) {
  const bool dense = a.I % 4 == 0;
  const int blocks = (a.I - 1) / (kThreads / Lanes) + 1;
  const Scan p{a,
               blocks,
               dense && in_quads(a.x, a.x_dtype, a.x_token, a.x_batch),
               dense && in_quads(a.dt, a.dt_dtype, a.dt_token, a.dt_batch),
               in_quads(a.b, a.b_dtype, a.b_token, a.b_batch),
               in_quads(a.c, a.c_dtype, a.c_token, a.c_batch),
               dense && in_quads(a.y, a.y_dtype)};
  const long long grid = static_cast<long long>(blocks) * a.sequences;
  if (grid > 0x7fffffffLL) return QUAMBA_UNSUPPORTED;
  return launch(selective_scan<Lanes, States, Polynomial>, p, dim3(static_cast<unsigned>(grid)), kThreads, stream);
}

}  // namespace

extern "C" int quamba_selective_scan(const QuambaScan* args, void* stream) {
  const QuambaScan& a = *args;
  auto is_float = [](int type) { return type == QUAMBA_F32 || type == QUAMBA_F16 || type == QUAMBA_BF16; };
  if (a.I < 1 || a.T < 0 || a.sequences < 1 || (a.cu_seqlens && a.T > 0x7fffffffLL) || !is_float(a.dt_dtype) ||
      !is_float(a.y_dtype) || !is_float(a.D_dtype) || (a.dt_bias && !is_float(a.dt_bias_dtype)))
    return QUAMBA_UNSUPPORTED;
  if (a.N == 8) return launch_scan<4, 2>(a, stream);
  if (a.N == 32) return launch_scan<8, 4>(a, stream);
  if (a.N != 16) return QUAMBA_UNSUPPORTED;
  int processors = 0;
  if (cudaError_t error = device_attribute(cudaDevAttrMultiProcessorCount, processors); error != cudaSuccess)
    return error;
  // four lanes need fewer shuffles and loads, eight make twice the warps
  const long long warps_of_four = static_cast<long long>(a.I) * a.sequences * 4 / 32;
  const int lanes = a.lanes ? a.lanes : warps_of_four >= 16LL * processors ? 4 : 8;
  if (lanes == 4)
    return a.polynomial == 2   ? launch_scan<4, 4, 2>(a, stream)
           : a.polynomial == 1 ? launch_scan<4, 4, 1>(a, stream)
                               : launch_scan<4, 4>(a, stream);
  return a.polynomial == 2   ? launch_scan<8, 2, 2>(a, stream)
         : a.polynomial == 1 ? launch_scan<8, 2, 1>(a, stream)
                             : launch_scan<8, 2>(a, stream);
}
