// Mamba1's selective scan: h <- exp(dt A) h + dt x B, y = C h + D x, for every channel and state.
//
// What bounds it is the exponential: one for each token, channel and state, 16 a cycle and multiprocessor, where the rest
// is four multiply-adds; the bytes are a quarter of that time. Cutting time into chunks that run at once, and joining
// them afterwards, needs each exponential twice. So time is not cut: a channel's states are shared out over the lanes of
// a warp, 16 lanes of 1 state, 8 of 2 or 4 of 4, each exponential is taken once, and what is added are sums over the
// lanes. Those pass through shared memory, for as many tokens at a time as there are lanes: a store a token, and each
// lane adds up one token's.
//
// A sequence alone has too few states to hide anything: 5120 channels are 39 a multiprocessor, so what counts is that
// all get the same share. 16 lanes make blocks of 8 channels and give every scheduler five warps of 640 blocks' 2560.
//
// A block stages tiles of tokens in shared memory: dt after the softplus and dt x for its channels, B and C for all.
// The next tile is on its way while one is computed.
#include "launch.cuh"
#include "quads.cuh"
#include "scan.h"

namespace {

using namespace quamba;

constexpr int kThreads = 128;

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
  const float e = exp2_approximate(-kLog2e * fabsf(v)), s = e * reciprocal_approximate(2.f + e), q = s * s;
  float sum = 0.28011987f;
  sum = __fmaf_rn(sum, q, 0.28001805f);
  sum = __fmaf_rn(sum, q, 0.40021527f);
  sum = __fmaf_rn(sum, q, 0.66666416f);
  sum = __fmaf_rn(sum, q, 2.f);
  return __fmaf_rn(sum, s, fmaxf(v, 0.f));
}

// Lanes x States = N. Type: of x, and then dt has 16 bits and all rows lie in whole quads; Columns: of B and C; or kAny.
// Polynomial: how many of eight exponentials do not go through the special function unit.
template <int Lanes, int States, int Type, int Columns, int Polynomial>
__global__ void __launch_bounds__(kThreads) selective_scan(const __grid_constant__ Scan p) {
  constexpr int N = Lanes * States, kChannels = kThreads / Lanes;
  constexpr int kTokens = kChannels < 16 ? 64 : 32;                   // of a tile
  constexpr int kQuads = kChannels / 4;                               // of channels
  constexpr int kItems = kTokens * kQuads / kThreads;                 // quads of channels a thread stages
  constexpr int kRows = N / 4;                                        // quads of B, and of C, a token
  constexpr int kRowItems = (kTokens * kRows + kThreads - 1) / kThreads;
  constexpr int kPitch = kChannels + 4;
  constexpr int kSteps = States == 1 ? kTokens / 2 : kTokens, kPlanes = States == 4 ? 2 : 1;
  constexpr int kRow = kPlanes * Lanes + 1;  // so that stores of neighbouring tokens fall into different banks
  __shared__ float4 rates[2][kTokens / 2][kChannels + 1];  // dt, dt x of two tokens
  // of a lane: B, C of two tokens (one state); B, B, C, C (two); a plane of B and one of C (four)
  __shared__ float4 columns[2][kSteps][kRow];
  // sums over a lane's states, of as many tokens as lanes; eight lanes' quads of eight tokens fall into different banks
  __shared__ __align__(16) float partial[kThreads / 32][Lanes][Lanes == 4 ? 40 : 36];
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
  constexpr int kDtType = Type == kAny ? kAny : QUAMBA_F16;
  // where the first tile of each stream lies for this thread, and what leads from tile to tile
  const long long row = thread / kQuads, column_row = thread / kRows;
  long long x_at = batch * a.x_batch + (begin + row) * a.x_token + first, x_step = kTokens * a.x_token;
  long long dt_at = batch * a.dt_batch + (begin + row) * a.dt_token + first, dt_step = kTokens * a.dt_token;
  long long b_at = batch * a.b_batch + (begin + column_row) * a.b_token + thread % kRows * 4;
  long long c_at = batch * a.c_batch + (begin + column_row) * a.c_token + thread % kRows * 4;
  const long long b_step = kTokens * a.b_token, c_step = kTokens * a.c_token;
  long long y_at = (batch * a.T + begin + row) * a.I + first;

  float decay[States], h[States];
  const long long at = (static_cast<long long>(sequence) * a.I + channel) * N + lane * States;
#pragma unroll
  for (int s = 0; s < States; ++s) {
    decay[s] = exists ? kLog2e * __ldg(a.A + static_cast<long long>(channel) * N + lane * States + s) : 0.f;
    h[s] = exists && a.state ? __ldcg(a.state + at + s) : 0.f;
  }
  // x stands for x_scale x and b for b_scale b, so that codes are multiplied by the least: dt x and D x take the scales
  const float b_scale = a.b_scale ? __ldg(a.b_scale) : 1.f, c_scale = a.c_scale ? __ldg(a.c_scale) : 1.f;
  const float b_inverse = __frcp_rn(b_scale), c_inverse = __frcp_rn(c_scale);
  const bool rounds_b = Columns != QUAMBA_I8 && a.b_scale && a.b_dtype != QUAMBA_I8;
  const bool rounds_c = Columns != QUAMBA_I8 && a.c_scale && a.c_dtype != QUAMBA_I8;
  auto codes_of = [](float4 v, bool rounds, float scale, float inverse) {
    return rounds ? each([&](float u, float) { return round_code(u, scale, inverse); }, v, v) : v;
  };
  auto times = [](float v, float w) { return v * w; };
  const float4 x_scale = load_scales(a.x_scale, a.x_scale_count > 1, first, count, 1.f);
  const float4 skip = each(times, load_quad(a.D, a.D_dtype, first, count, false), x_scale);
  const float4 x_factor = each([&](float v, float) { return v * b_scale; }, x_scale, x_scale);
  float4 bias = make_float4(0.f, 0.f, 0.f, 0.f);
  if (a.dt_bias) bias = load_quad(a.dt_bias, a.dt_bias_dtype, first, count, false);

  uint4 raw_x[kItems], raw_dt[kItems], raw_b[kRowItems], raw_c[kRowItems];
  auto fetch = [&](int left) {  // of the tokens that are left, the next tile
    constexpr int kApart = kThreads / kQuads, kColumnsApart = kThreads / kRows;  // rows between a thread's items
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      const int there = static_cast<int>(row) + k * kApart < left ? count : 0;
      raw_x[k] = load_raw_as<Type>(a.x, a.x_dtype, x_at + k * kApart * a.x_token, there, Type != kAny || p.whole_x);
      raw_dt[k] =
          load_raw_as<kDtType>(a.dt, a.dt_dtype, dt_at + k * kApart * a.dt_token, there, Type != kAny || p.whole_dt);
    }
#pragma unroll
    for (int k = 0; k < kRowItems; ++k) {
      const int item = static_cast<int>(column_row) + k * kColumnsApart;
      const int there = item < kTokens && item < left ? 4 : 0;
      raw_b[k] = load_raw_as<Columns>(a.b, a.b_dtype, b_at + k * kColumnsApart * a.b_token, there, Columns != kAny || p.whole_b);
      raw_c[k] = load_raw_as<Columns>(a.c, a.c_dtype, c_at + k * kColumnsApart * a.c_token, there, Columns != kAny || p.whole_c);
    }
    x_at += x_step, dt_at += dt_step, b_at += b_step, c_at += c_step;
  };
  float4 skipped[kItems];  // D x
  auto stage = [&](int left, int buffer) {
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      const int t = static_cast<int>(row) + k * (kThreads / kQuads);
      const float4 x = to_floats_as<Type>(raw_x[k], a.x_dtype);
      skipped[k] = each(times, x, skip);
      float4 dt = make_float4(0.f, 0.f, 0.f, 0.f), dt_x = dt;  // beyond the last token dt = 0 leaves the states alone
      if (t < left) {
        dt = each([](float v, float b) { return softplus(v + b); }, to_floats_as<kDtType>(raw_dt[k], a.dt_dtype), bias);
        dt_x = each(times, dt, each(times, x, x_factor));
      }
      float2* rate = reinterpret_cast<float2*>(&rates[buffer][t / 2][4 * quad]) + t % 2;
      rate[0] = make_float2(dt.x, dt_x.x);
      rate[2] = make_float2(dt.y, dt_x.y);
      rate[4] = make_float2(dt.z, dt_x.z);
      rate[6] = make_float2(dt.w, dt_x.w);
    }
#pragma unroll
    for (int k = 0; k < kRowItems; ++k) {
      const int t = static_cast<int>(column_row) + k * (kThreads / kRows), q = thread % kRows;
      if (t >= kTokens) continue;
      const float4 b = codes_of(to_floats_as<Columns>(raw_b[k], a.b_dtype), rounds_b, b_scale, b_inverse);
      const float4 c = codes_of(to_floats_as<Columns>(raw_c[k], a.c_dtype), rounds_c, c_scale, c_inverse);
      if constexpr (States == 1) {
        float2* column = reinterpret_cast<float2*>(&columns[buffer][t / 2][4 * q]) + t % 2;
        column[0] = make_float2(b.x, c.x);
        column[2] = make_float2(b.y, c.y);
        column[4] = make_float2(b.z, c.z);
        column[6] = make_float2(b.w, c.w);
      } else if constexpr (States == 2) {
        columns[buffer][t][2 * q] = make_float4(b.x, b.y, c.x, c.y);
        columns[buffer][t][2 * q + 1] = make_float4(b.z, b.w, c.z, c.w);
      } else {
        columns[buffer][t][q] = b;
        columns[buffer][t][Lanes + q] = c;
      }
    }
  };

  const auto clamped = [&](long long left) { return static_cast<int>(min(left, static_cast<long long>(kTokens))); };
  fetch(clamped(tokens));
  stage(clamped(tokens), 0);
  __syncthreads();
  int buffer = 0;
  for (long long left = tokens; left > 0; left -= kTokens) {
    const int here = clamped(left), next = max(clamped(left - kTokens), 0);
    fetch(next);
    auto& sums = partial[thread / 32];
#pragma unroll 1
    for (int group = 0; group < here; group += Lanes) {
#pragma unroll
      for (int u = 0; u < Lanes; ++u) {
        const int t = group + u;
        const float4 rate = rates[buffer][t / 2][own];
        const float dt = u % 2 ? rate.z : rate.x, dt_x = u % 2 ? rate.w : rate.y;
        float b[States], c[States];
        const float4 v = columns[buffer][States == 1 ? t / 2 : t][lane];
        if constexpr (States == 1) {
          b[0] = u % 2 ? v.z : v.x, c[0] = u % 2 ? v.w : v.y;
        } else if constexpr (States == 2) {
          b[0] = v.x, b[1] = v.y, c[0] = v.z, c[1] = v.w;
        } else {
          const float4 w = columns[buffer][t][Lanes + lane];
          b[0] = v.x, b[1] = v.y, b[2] = v.z, b[3] = v.w, c[0] = w.x, c[1] = w.y, c[2] = w.z, c[3] = w.w;
        }
        float sum = 0.f;
#pragma unroll
        for (int s = 0; s < States; ++s) {
          const float exponent = dt * decay[s];
          const bool by_polynomial = (u * States + s) % 8 < Polynomial;
          const float kept = by_polynomial ? exp2_polynomial(exponent) : exp2_approximate(exponent);
          h[s] = __fmaf_rn(kept, h[s], dt_x * b[s]);
          sum = s ? __fmaf_rn(c[s], h[s], sum) : c[s] * h[s];
        }
        sums[u][thread % 32] = sum;
      }
      __syncwarp();
      // lane j of a channel adds up all lanes' sums for token j
      float4 total = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
      for (int i = 0; i < Lanes / 4; ++i)
        total = each([](float v, float w) { return v + w; }, total,
                     *reinterpret_cast<const float4*>(&sums[lane][own % (32 / Lanes) * Lanes + 4 * i]));
      outputs[buffer][group + lane][own] = (total.x + total.y) + (total.z + total.w);
      __syncwarp();
    }
    float4 added[kItems];
#pragma unroll
    for (int k = 0; k < kItems; ++k) added[k] = skipped[k];
    if (next) stage(next, buffer ^ 1);
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      const int t = static_cast<int>(row) + k * (kThreads / kQuads);
      if (t >= here) continue;
      const float4 y = each([&](float v, float w) { return __fmaf_rn(c_scale, w, v); }, added[k],
                            *reinterpret_cast<const float4*>(&outputs[buffer][t][4 * quad]));
      store_quad(a.y, a.y_dtype, y_at + static_cast<long long>(k * (kThreads / kQuads)) * a.I, y, count, p.whole_y);
    }
    y_at += static_cast<long long>(kTokens) * a.I;
    buffer ^= 1;
  }
  if (exists)
#pragma unroll
    for (int s = 0; s < States; ++s) a.last[at + s] = h[s];
}

template <int Lanes, int States, int Type, int Columns, int Polynomial>
int launch_as(const Scan& p, void* stream) {
  const long long grid = static_cast<long long>(p.blocks) * p.a.sequences;
  if (grid > 0x7fffffffLL) return QUAMBA_UNSUPPORTED;
  // not before the kernel ahead has ended: blocks that start while its own still run are shared out unevenly
  return launch(selective_scan<Lanes, States, Type, Columns, Polynomial>, p, dim3(static_cast<unsigned>(grid)),
                kThreads, stream, 0, false);
}

template <int Lanes, int States>
int launch_scan(const QuambaScan& a, void* stream) {
  const bool dense = a.I % 4 == 0;
  const Scan p{a,
               (a.I - 1) / (kThreads / Lanes) + 1,
               dense && in_quads(a.x, a.x_dtype, a.x_token, a.x_batch),
               dense && in_quads(a.dt, a.dt_dtype, a.dt_token, a.dt_batch),
               in_quads(a.b, a.b_dtype, a.b_token, a.b_batch),
               in_quads(a.c, a.c_dtype, a.c_token, a.c_batch),
               dense && in_quads(a.y, a.y_dtype)};
  if constexpr (Lanes * States == 16) {
    const bool whole = p.whole_x && p.whole_dt && p.whole_b && p.whole_c && a.dt_dtype != QUAMBA_F32;
    const bool halves = size_of(a.b_dtype) == 2 && size_of(a.c_dtype) == 2;
    if (whole && a.x_dtype == QUAMBA_I8 && a.b_dtype == QUAMBA_I8 && a.c_dtype == QUAMBA_I8)
      return launch_as<Lanes, States, QUAMBA_I8, QUAMBA_I8, 0>(p, stream);
    if (whole && a.x_dtype == QUAMBA_I8 && halves)
      return a.polynomial ? launch_as<Lanes, States, QUAMBA_I8, QUAMBA_F16, 1>(p, stream)
                          : launch_as<Lanes, States, QUAMBA_I8, QUAMBA_F16, 0>(p, stream);
    if (whole && size_of(a.x_dtype) == 2 && halves)
      return launch_as<Lanes, States, QUAMBA_F16, QUAMBA_F16, 0>(p, stream);
  }
  if constexpr (Lanes * States == 16 && Lanes != 8)
    return launch_scan<8, 2>(a, stream);  // one for any types is enough
  else
    return launch_as<Lanes, States, kAny, kAny, 0>(p, stream);
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
  // fewer lanes need fewer sums, loads and stores, more lanes make more warps
  const long long warps_of_four = static_cast<long long>(a.I) * a.sequences * 4 / 32;
  const int lanes = a.lanes                            ? a.lanes
                    : warps_of_four >= 16LL * processors ? 4
                    : warps_of_four >= 8LL * processors  ? 8
                                                         : 16;
  return lanes == 4   ? launch_scan<4, 4>(a, stream)
         : lanes == 8 ? launch_scan<8, 2>(a, stream)
                      : launch_scan<16, 1>(a, stream);
}
