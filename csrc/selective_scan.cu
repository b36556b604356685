// Mamba1's selective scan: h <- exp(dt A) h + dt x B, y = C h + D x, for every channel and state; or y silu(z).
//
// What bounds it is the exponential: one for each token, channel and state, 16 a cycle and multiprocessor, where the rest
// is four multiply-adds; the bytes are a quarter of that time. Cutting time into chunks that run at once, and joining
// them afterwards, needs each exponential twice. So time is not cut: a channel's states are shared out over the lanes of
// a warp, 8 lanes of 2 states or 4 lanes of 4, each exponential is taken once, and what is added are sums over the lanes,
// for as many tokens at a time as there are lanes: a butterfly that halves the number of values at every step costs 7
// shuffles for 8 tokens.
//
// A block stages tiles of 32 tokens in shared memory: dt after the softplus and dt x for its channels, B and C for all.
// The next tile is on its way while one is computed. The sums of some tokens are added up while the next are computed.
#include <type_traits>

#include "selective_scan_ahead.cuh"

namespace {

using namespace quamba;
using namespace quamba::selective;

constexpr int kThreads = 128, kTokens = 32;
constexpr int kWide = 24;  // lanes: those of selective_scan_ahead.cuh, for three channels

// Lanes x States = N. Float: the type of dt and y, and of x, B and C unless these are Codes, all rows lying in whole quads;
// or kAny, for any types.
template <int Lanes, int States, int Float, bool Codes>
__global__ void __launch_bounds__(kThreads, Float == kAny ? 3 : 5) selective_scan(const __grid_constant__ Scan p) {
  constexpr int N = Lanes * States, kChannels = kThreads / Lanes;
  constexpr int kType = Codes ? QUAMBA_I8 : Float;
  constexpr bool kWhole = Float != kAny;
  constexpr int kQuads = kChannels / 4;                               // of channels
  constexpr int kItems = kTokens * kQuads / kThreads;                 // quads of channels a thread stages
  constexpr int kRows = N / 4;                                        // quads of B, and of C, a token
  constexpr int kRowItems = (kTokens * kRows + kThreads - 1) / kThreads;
  constexpr int kPitch = kChannels + 32 / Lanes;  // so that a butterfly's results fall into different banks
  constexpr int kPlanes = States / 2;
  __shared__ float4 rates[2][kTokens / 2][kChannels + 1];  // dt, dt x of two tokens
  __shared__ float4 columns[2][kTokens][kPlanes][Lanes];   // B, B, C, C of two states; or planes of four
  __shared__ __align__(16) float outputs[2][kTokens][kPitch];

  const QuambaScan& a = p.a;
  const int thread = threadIdx.x, lane = thread % Lanes, own = thread / Lanes;
  launch_dependents();
  wait_for_previous_kernel();
  const auto [batch, begin, tokens, sequence, block] = part_of(p, kChannels);
  const int channel = block + own;
  const bool exists = channel < a.I;
  const int quad = thread % kQuads, first = block + 4 * quad, count = min(a.I - first, 4);
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
  auto times = [](float v, float w) { return v * w; };
  const float4 x_scale = load_scales(a.x_scale, a.x_scale_count > 1, first, count, 1.f);
  const float4 skip = each(times, load_quad(a.D, a.D_dtype, first, count, false), x_scale);
  const float4 x_factor = each([&](float v, float) { return v * b_scale; }, x_scale, x_scale);
  float4 bias = make_float4(0.f, 0.f, 0.f, 0.f);
  if (a.dt_bias) bias = load_quad(a.dt_bias, a.dt_bias_dtype, first, count, false);
  long long z_at = batch * a.z_batch + (begin + row) * a.z_token + first;
  const int z_type = kWhole ? Float : a.z_dtype;

  uint4 raw_x[kItems], raw_dt[kItems], raw_b[kRowItems], raw_c[kRowItems], raw_z[kItems];
  auto fetch = [&](int left) {  // of the tokens that are left, the next tile
    constexpr int kApart = kThreads / kQuads, kColumnsApart = kThreads / kRows;  // rows between a thread's items
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      const int there = static_cast<int>(row) + k * kApart < left ? count : 0;
      raw_x[k] = load_raw_as<kType>(a.x, a.x_dtype, x_at + k * kApart * a.x_token, there, kWhole || p.whole_x);
      raw_dt[k] =
          load_raw_as<Float>(a.dt, a.dt_dtype, dt_at + k * kApart * a.dt_token, there, kWhole || p.whole_dt);
    }
#pragma unroll
    for (int k = 0; k < kRowItems; ++k) {
      const int item = static_cast<int>(column_row) + k * kColumnsApart;
      const int there = item < kTokens && item < left ? 4 : 0;
      raw_b[k] = load_raw_as<kType>(a.b, a.b_dtype, b_at + k * kColumnsApart * a.b_token, there, kWhole || p.whole_b);
      raw_c[k] = load_raw_as<kType>(a.c, a.c_dtype, c_at + k * kColumnsApart * a.c_token, there, kWhole || p.whole_c);
    }
    x_at += x_step, dt_at += dt_step, b_at += b_step, c_at += c_step;
  };
  auto fetch_gate = [&](int here) {  // of a tile that is computed
    if (!a.z) return;
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      const int apart = k * (kThreads / kQuads);
      raw_z[k] = load_raw(a.z, z_type, z_at + apart * a.z_token, static_cast<int>(row) + apart < here ? count : 0,
                          kWhole || p.whole_z);
    }
    z_at += kTokens * a.z_token;
  };
  float4 skipped[kItems];  // D x
  auto stage = [&](int left, int buffer) {
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      const int t = static_cast<int>(row) + k * (kThreads / kQuads);
      const float4 x = to_floats(raw_x[k], kWhole ? kType : a.x_dtype);
      skipped[k] = each(times, x, skip);
      float4 dt = make_float4(0.f, 0.f, 0.f, 0.f), dt_x = dt;  // beyond the last token dt = 0 leaves the states alone
      if (t < left) {
        dt = each([](float v, float b) { return softplus(v + b); }, to_floats(raw_dt[k], kWhole ? Float : a.dt_dtype), bias);
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
      const float4 b = to_floats(raw_b[k], kWhole ? kType : a.b_dtype);
      const float4 c = to_floats(raw_c[k], kWhole ? kType : a.c_dtype);
      if constexpr (States == 2) {
        columns[buffer][t][0][2 * q] = make_float4(b.x, b.y, c.x, c.y);
        columns[buffer][t][0][2 * q + 1] = make_float4(b.z, b.w, c.z, c.w);
      } else {
        columns[buffer][t][0][q] = b;
        columns[buffer][t][1][q] = c;
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
    float before[Lanes];  // a lane's sums over its states, for tokens whose sums over the lanes are to be taken
    auto advance = [&](int group, float (&sums)[Lanes]) {
#pragma unroll
      for (int u = 0; u < Lanes; ++u) {
        const int t = group + u;
        const float4 rate = rates[buffer][t / 2][own];
        const float dt = u % 2 ? rate.z : rate.x, dt_x = u % 2 ? rate.w : rate.y;
        float b[States], c[States];
        const float4 v = columns[buffer][t][0][lane];
        if constexpr (States == 2) {
          b[0] = v.x, b[1] = v.y, c[0] = v.z, c[1] = v.w;
        } else {
          const float4 w = columns[buffer][t][1][lane];
          b[0] = v.x, b[1] = v.y, b[2] = v.z, b[3] = v.w, c[0] = w.x, c[1] = w.y, c[2] = w.z, c[3] = w.w;
        }
        float sum = 0.f;
#pragma unroll
        for (int s = 0; s < States; ++s) {
          h[s] = __fmaf_rn(exp2_approximate(dt * decay[s]), h[s], dt_x * b[s]);
          sum = s ? __fmaf_rn(c[s], h[s], sum) : c[s] * h[s];
        }
        sums[u] = sum;
      }
    };
    auto add_up = [&](int group) {  // lane j of a channel ends up with the sum over all lanes for token j
#pragma unroll
      for (int step = Lanes / 2; step; step /= 2) {
        const bool upper = lane & step;
#pragma unroll
        for (int i = 0; i < step; ++i) {
          const float sent = upper ? before[i] : before[i + step], kept = upper ? before[i + step] : before[i];
          before[i] = kept + __shfl_xor_sync(~0u, sent, step);
        }
      }
      outputs[buffer][group + lane][own] = before[0];
    };
    advance(0, before);
    int group = Lanes;
#pragma unroll 1
    for (; group < here; group += Lanes) {
      float sums[Lanes];
      advance(group, sums);
      add_up(group - Lanes);
#pragma unroll
      for (int u = 0; u < Lanes; ++u) before[u] = sums[u];
    }
    fetch_gate(here);  // as late as this to save registers
    add_up(group - Lanes);
    float4 added[kItems];
#pragma unroll
    for (int k = 0; k < kItems; ++k) added[k] = skipped[k];
    if (next) stage(next, buffer ^ 1);
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      const int t = static_cast<int>(row) + k * (kThreads / kQuads);
      if (t >= here) continue;
      float4 y = each([&](float v, float w) { return __fmaf_rn(c_scale, w, v); }, added[k],
                      *reinterpret_cast<const float4*>(&outputs[buffer][t][4 * quad]));
      if (a.z) {
        const float4 scale = load_scales(a.z_scale, a.z_scale_count > 1, first, count, 1.f);
        y = gated(y, to_floats(raw_z[k], z_type), scale, a.z_scale, z_type == QUAMBA_I8);
      }
      store_quad(a.y, kWhole ? Float : a.y_dtype, y_at + static_cast<long long>(k * (kThreads / kQuads)) * a.I, y, count, kWhole || p.whole_y);
    }
    y_at += static_cast<long long>(kTokens) * a.I;
    buffer ^= 1;
  }
  if (exists)
#pragma unroll
    for (int s = 0; s < States; ++s) a.last[at + s] = h[s];
}

template <int Lanes, int States, int Float, bool Codes>
int launch_as(const Scan& p, void* stream) {
  const long long grid = static_cast<long long>(p.blocks) * p.a.sequences;
  if (grid > 0x7fffffffLL) return QUAMBA_UNSUPPORTED;
  // not before the kernel ahead has ended: blocks that start while its own still run are shared out unevenly
  return launch(selective_scan<Lanes, States, Float, Codes>, p, dim3(static_cast<unsigned>(grid)), kThreads,
                stream, 0, false);
}

// Wide: by the kernel of selective_scan_ahead.cuh, where it serves.
template <int Lanes, int States>
int launch_scan(const QuambaScan& a, void* stream, bool wide = false) {
  const bool dense = a.I % 4 == 0;
  const Scan p{a,
               (a.I - 1) / (wide ? ahead::kChannels : kThreads / Lanes) + 1,
               dense && in_quads(a.x, a.x_dtype, a.x_token, a.x_batch),
               dense && in_quads(a.dt, a.dt_dtype, a.dt_token, a.dt_batch),
               in_quads(a.b, a.b_dtype, a.b_token, a.b_batch),
               in_quads(a.c, a.c_dtype, a.c_token, a.c_batch),
               dense && in_quads(a.z, a.z_dtype, a.z_token, a.z_batch),
               dense && in_quads(a.y, a.y_dtype),
               expansion_of(a.expansion)};
  if constexpr (Lanes * States == 16) {
    const bool whole = p.whole_x && p.whole_dt && p.whole_b && p.whole_c && p.whole_y, half = a.dt_dtype == QUAMBA_F16;
    const bool gate_fits = !a.z || (p.whole_z && a.z_dtype == a.dt_dtype);
    auto all = [&](int type) { return a.x_dtype == type && a.b_dtype == type && a.c_dtype == type; };
    auto launch = [&](auto type, auto codes) {
      constexpr int kFloat = decltype(type)::value;
      constexpr bool kCodes = decltype(codes)::value;
      return wide ? ahead::launch_as<kFloat, kCodes>(p, stream)
                  : expand_after(launch_as<Lanes, States, kFloat, kCodes>(p, stream), a.expansion, stream);
    };
    constexpr std::integral_constant<int, QUAMBA_F16> kHalf;
    constexpr std::integral_constant<int, QUAMBA_BF16> kBrain;
    if (whole && gate_fits && a.y_dtype == a.dt_dtype && a.dt_dtype != QUAMBA_F32) {
      if (all(QUAMBA_I8)) return half ? launch(kHalf, std::true_type{}) : launch(kBrain, std::true_type{});
      if (all(a.dt_dtype)) return half ? launch(kHalf, std::false_type{}) : launch(kBrain, std::false_type{});
    }
    if (Lanes != 8 || wide) return launch_scan<8, 2>(a, stream);  // one for any types is enough
  }
  return expand_after(launch_as<Lanes, States, kAny, false>(p, stream), a.expansion, stream);
}

}  // namespace

extern "C" int quamba_selective_scan(const QuambaScan* args, void* stream) {
  const QuambaScan& a = *args;
  auto is_float = [](int type) { return type == QUAMBA_F32 || type == QUAMBA_F16 || type == QUAMBA_BF16; };
  if (a.I < 1 || a.T < 0 || a.sequences < 1 || (a.cu_seqlens && a.T > 0x7fffffffLL) || !is_float(a.dt_dtype) ||
      !is_float(a.y_dtype) || !is_float(a.D_dtype) || (a.dt_bias && !is_float(a.dt_bias_dtype)) ||
      (a.z && !is_float(a.z_dtype) && !(a.z_dtype == QUAMBA_I8 && a.z_scale)) ||
      (a.expansion.y && !expands(a.expansion)))
    return QUAMBA_UNSUPPORTED;
  if (a.N == 8) return launch_scan<4, 2>(a, stream);
  if (a.N == 32) return launch_scan<8, 4>(a, stream);
  if (a.N != 16) return QUAMBA_UNSUPPORTED;
  int processors = 0;
  if (cudaError_t error = device_attribute(cudaDevAttrMultiProcessorCount, processors); error != cudaSuccess)
    return error;
  // four lanes need fewer shuffles and loads, eight make twice the warps
  const long long warps_of_four = static_cast<long long>(a.I) * a.sequences * 4 / 32;
  auto turns = [&](int channels) {  // blocks of a multiprocessor
    return (((a.I - 1) / channels + 1LL) * a.sequences - 1) / processors + 1;
  };
  const long long tokens = a.cu_seqlens ? a.T / a.sequences : a.T;
  // measured with a block of 40 channels for nearly every multiprocessor, where three of 16 took their turns on some
  const bool wide = tokens >= 4 * ahead::kTile && turns(ahead::kChannels) == 1 && turns(kThreads / 8) > 2;
  const int lanes = a.lanes ? a.lanes : wide ? kWide : warps_of_four >= 16LL * processors ? 4 : 8;
  return lanes == 4 ? launch_scan<4, 4>(a, stream) : launch_scan<8, 2>(a, stream, lanes == kWide);
}
