// Causal depthwise convolution, SiLU and quantisation over tokens that lie one after the other.
//
// A thread takes four channels through a run of tokens with the last three inputs in registers, so x is read once but
// for three tokens a run. Narrower kernels have leading taps of zero. This kernel serves any types and sizes; codes,
// and 16-bit floats alone, have faster ones.
#include "conv_codes.cuh"
#include "conv_halves.cuh"
#include "launch.cuh"
#include "quads.cuh"

namespace {

using namespace quamba;

constexpr int kWarps = 4, kWidth = kMostTaps, kPast = kWidth - 1, kLeast = 8;

// X: the type of x. Rounds: x becomes int8 on its way in. Whole: rows of x and y lie in whole quads.
template <int X, bool Rounds, bool Whole>
__global__ void __launch_bounds__(32 * kWarps, 4) causal_conv1d(const __grid_constant__ Conv p) {
  constexpr int kAhead = 8;  // tokens whose loads go out together
  constexpr int kStateType = Rounds ? QUAMBA_I8 : X;
  const QuambaConv& a = p.a;
  const int first = 4 * (blockIdx.x * 32 + threadIdx.x % 32), lead = kWidth - a.W;
  const int count = Whole ? (first < a.C ? 4 : 0) : min(a.C - first, 4);
  const long long wanted = (static_cast<long long>(blockIdx.y) * (blockDim.x / 32) + threadIdx.x / 32) * p.run;
  const long long here = blockIdx.z * a.batch_stride + first, row = static_cast<long long>(blockIdx.z) * a.T;
  launch_dependents();
  wait_for_previous_kernel();
  if (count <= 0 || wanted >= a.T) return;

  const int z = static_cast<int>(blockIdx.z);
  long long t = cut(a, wanted, z);
  const long long end = cut(a, wanted + p.run, z);
  if (t >= end) return;

  const int in_step = a.in_scale_count > 1, x_step = a.x_scale_count > 1;
  const float4 in_scale = load_scales(Rounds ? a.in_scale : nullptr, in_step, first, count, 1.f);
  const float4 in_inverse = each([](float s, float) { return reciprocal_approximate(s); }, in_scale, in_scale);
  float4 tap[kWidth];
  {
    const float4 x_scale = load_scales(a.x_scale, x_step, first, count, 1.f);
    const float4 weight_scale = load_scales(a.weight_scale, 1, first, count, 1.f);
    const float4 factor =
        each([](float w, float x, float in) { return w * (x * in); }, weight_scale, x_scale, in_scale);
    float taps[4][kWidth];  // [channel]
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const long long at = static_cast<long long>(first + j) * a.W;
      const float4 w = load_quad(a.weight, a.weight_dtype, at, j < count ? a.W : 0, p.whole_weight);
      taps[j][0] = lead == 0 ? w.x : 0.f;
      taps[j][1] = lead == 0 ? w.y : lead == 1 ? w.x : 0.f;
      taps[j][2] = lead == 0 ? w.z : lead == 1 ? w.y : w.x;
      taps[j][3] = lead == 0 ? w.w : lead == 1 ? w.z : w.y;
    }
#pragma unroll
    for (int w = 0; w < kWidth; ++w)
      tap[w] = make_float4(taps[0][w] * factor.x, taps[1][w] * factor.y, taps[2][w] * factor.z, taps[3][w] * factor.w);
  }
  float4 bias = make_float4(0.f, 0.f, 0.f, 0.f);
  if (a.bias) bias = load_quad(a.bias, a.bias_dtype, first, count, false);
  const float4 out_scale = load_scales(a.out_scale, a.out_scale_count > 1, first, count, 1.f);
  const float4 out_inverse = each([](float s, float) { return __frcp_rn(s); }, out_scale, out_scale);

  auto enter = [&](uint4 raw) {
    float4 v;
    if constexpr (size_of(X) == 2) {
      const float2 low = pair_of<X == QUAMBA_F16>(raw.x), high = pair_of<X == QUAMBA_F16>(raw.y);
      v = make_float4(low.x, low.y, high.x, high.y);
    } else {
      v = to_floats(raw, X);
    }
    if (Rounds)
      v = each([](float x, float s, float r) { return code_on(x, Grid{s, r, __fmul_rn(127.f, s)}); }, v, in_scale,
               in_inverse);
    return v;
  };
  auto load = [&](long long at, bool exists) {
    return load_raw(a.x, X, here + at * a.token_stride, exists ? count : 0, Whole || p.whole_x);
  };
  auto state_at = [&](const Sequence& s, int i) {  // the i-th of the last three inputs
    return (static_cast<long long>(s.index) * (a.W - 1) + i - lead) * a.C + first;
  };
  auto input = [&](long long at, const Sequence& s) {  // of any token of a sequence, or of the W - 1 before it
    if (at >= s.begin) return enter(load(at, true));
    const int i = kPast + static_cast<int>(at - s.begin);
    return load_quad(a.state, kStateType, state_at(s, max(i, lead)), a.state && i >= lead ? count : 0, p.whole_state);
  };
  float4 past[kPast];
  auto begin_at = [&](long long at, const Sequence& s) {
#pragma unroll
    for (int i = 0; i < kPast; ++i)
      past[i] = i >= lead ? input(at - kPast + i, s) : make_float4(0.f, 0.f, 0.f, 0.f);
    if (at != s.begin || !a.state) return;
    float4 last[kPast];
#pragma unroll
    for (int i = 0; i < kPast; ++i)
      last[i] = i >= lead ? input(s.end - kPast + i, s) : make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
    for (int i = 0; i < kPast; ++i)
      if (i >= lead) store_quad(a.state, kStateType, state_at(s, i), last[i], count, p.whole_state);
  };

  Sequence s = find_sequence(a, t, z);
  begin_at(t, s);
  auto step = [&](uint4 raw, long long at) {  // a token, whose outputs lie at ``at``
    const float4 now = enter(raw);
    auto add = [](float sum, float x, float w) { return __fmaf_rn(x, w, sum); };
    float4 y = each(add, bias, past[0], tap[0]);
    y = each(add, y, past[1], tap[1]);
    y = each(add, y, past[2], tap[2]);
    y = each(add, y, now, tap[3]);
    if (a.out_scale) {
      y = each([](float v, float inverse) { return saturate_code(silu(v) * inverse); }, y, out_inverse);
      store_quad(a.y, QUAMBA_I8, at, y, count, Whole || p.whole_y);
    } else {
      y = each([](float v, float) { return silu(v); }, y, y);
      store_quad(a.y, a.y_dtype, at, y, count, Whole || p.whole_y);
    }
    past[0] = past[1];
    past[1] = past[2];
    past[2] = now;
  };
  while (t < end) {
    if (t >= s.end) {
      s = find_sequence(a, t, z);
      begin_at(t, s);
    }
    const long long stop = min(end, s.end);
    long long at = (row + t) * a.C + first;
    if (t + kAhead <= stop) {
      uint4 raw[kAhead];
      auto fetch = [&] {
#pragma unroll
        for (int u = 0; u < kAhead; ++u) raw[u] = load(t + u, true);
      };
      fetch();
      do {  // the next tokens are on their way while these are computed
        uint4 these[kAhead];
#pragma unroll
        for (int u = 0; u < kAhead; ++u) these[u] = raw[u];
        t += kAhead;
        if (t + kAhead <= stop) fetch();
#pragma unroll
        for (int u = 0; u < kAhead; ++u, at += a.C) step(these[u], at);
      } while (t + kAhead <= stop);
    }
#pragma unroll 1
    for (; t < stop; ++t, at += a.C) step(load(t, true), at);
  }
}

template <int X, bool Rounds>
int launch_as(const Conv& p, dim3 grid, int threads, void* stream) {
  return launch(p.whole_x && p.whole_y ? causal_conv1d<X, Rounds, true> : causal_conv1d<X, Rounds, false>, p, grid,
                threads, stream);
}

template <int X>
int launch_as(const Conv& p, dim3 grid, int threads, void* stream) {
  return p.a.in_scale ? launch_as<X, true>(p, grid, threads, stream) : launch_as<X, false>(p, grid, threads, stream);
}

int run_codes(const Conv& p, int processors, void* stream) {
  using namespace conv;
  auto kernel = p.a.x_dtype == QUAMBA_I8    ? convolve<Codes<QUAMBA_I8>>
                : p.a.x_dtype == QUAMBA_F16 ? convolve<Codes<QUAMBA_F16>>
                                            : convolve<Codes<QUAMBA_BF16>>;
  return run_ahead(kernel, p, processors, stream);
}

int run_halves(const Conv& p, int processors, void* stream) {
  using namespace conv;
  return run_ahead(p.a.x_dtype == QUAMBA_F16 ? convolve<Halves<true>> : convolve<Halves<false>>, p, processors, stream);
}

}  // namespace

extern "C" int quamba_causal_conv1d(const QuambaConv* args, void* stream) {
  const QuambaConv& a = *args;
  if (!takes(a)) return QUAMBA_UNSUPPORTED;
  int processors = 0;
  if (cudaError_t error = device_attribute(cudaDevAttrMultiProcessorCount, processors); error != cudaSuccess)
    return error;
  const long long quads = (a.C - 1) / 4 + 1;
  // runs that fill the GPU, and that a grid can count
  long long run = a.T * quads * a.B / (static_cast<long long>(processors) * 512);
  run = run < 128 ? run : 128;
  const long long fewest = a.T / (60000LL * kWarps);
  run = ((run > fewest ? run : fewest) / kLeast + 1) * kLeast;
  const Conv p = conv_of(a, static_cast<int>(run));
  if (conv::of_codes(p)) return run_codes(p, processors, stream);
  if (conv::of_halves(p)) return run_halves(p, processors, stream);
  const long long runs = (a.T - 1) / run + 1;
  const int warps = static_cast<int>(runs < kWarps ? runs : kWarps);
  const dim3 grid(static_cast<unsigned>((quads - 1) / 32 + 1), static_cast<unsigned>((runs - 1) / warps + 1),
                  static_cast<unsigned>(a.B));
  const int status = [&]() -> int {
    switch (a.x_dtype) {
      case QUAMBA_I8: return launch_as<QUAMBA_I8, false>(p, grid, 32 * warps, stream);
      case QUAMBA_F32: return launch_as<QUAMBA_F32>(p, grid, 32 * warps, stream);
      case QUAMBA_F16: return launch_as<QUAMBA_F16>(p, grid, 32 * warps, stream);
      case QUAMBA_BF16: return launch_as<QUAMBA_BF16>(p, grid, 32 * warps, stream);
      default: return QUAMBA_UNSUPPORTED;
    }
  }();
  return expand_after(status, a.expansion, stream);
}
