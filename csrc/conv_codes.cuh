// The convolution where weights, state and outputs are int8 codes and a kernel has four taps: what a quantised model runs.
//
// The last four inputs of a channel are the bytes of a word, its taps those of another, and the sum is one instruction.
#pragma once

#include <algorithm>
#include <type_traits>

#include "conv_runs.cuh"
#include "launch.cuh"
#include "quads.cuh"

namespace quamba::conv {

constexpr int kThreads = 64, kPast = 3;
constexpr int kAhead = 4;       // tokens whose loads are on their way
constexpr int kResident = 768;  // threads of a multiprocessor, for which registers are few enough and runs long enough

// X: the type of x; 16-bit floats are rounded by in_scale.
template <int X>
__global__ void __launch_bounds__(kThreads, kResident / kThreads) convolve_codes(const __grid_constant__ Conv p) {
  const QuambaConv& a = p.a;
  const int first = 4 * (blockIdx.x * 32 + threadIdx.x % 32), row = blockIdx.z;
  const long long wanted = (static_cast<long long>(blockIdx.y) * (blockDim.x / 32) + threadIdx.x / 32) * p.run;
  launch_dependents();
  if (first >= a.C || wanted >= a.T) return;

  float limit[4], inverse[4], rest[4];  // of inputs: 127 scales, 1 / scale as the sum of two floats
  float sum_step[4], bias_step[4], sum_power[4], bias_power[4];  // from sums to 1 / 254 of a code, and to powers of 2
  int taps[4];
  {
    const float4 none = make_float4(0.f, 0.f, 0.f, 0.f);
    auto scales = [&](const float* data, int count) {
      if (data && count > 1) return constant_quad(data, QUAMBA_F32, first);
      const float one = data ? __ldg(data) : 1.f;
      return make_float4(one, one, one, one);
    };
    const float4 in = X == QUAMBA_I8 ? scales(a.x_scale, a.x_scale_count) : scales(a.in_scale, a.in_scale_count);
    const float4 weight = scales(a.weight_scale, a.C), out = scales(a.out_scale, a.out_scale_count);
    const float4 bias = a.bias ? constant_quad(a.bias, a.bias_dtype, first) : none;
    const float ins[4] = {in.x, in.y, in.z, in.w}, outs[4] = {out.x, out.y, out.z, out.w};
    const float weights[4] = {weight.x, weight.y, weight.z, weight.w}, biases[4] = {bias.x, bias.y, bias.z, bias.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      limit[j] = 127.f * ins[j], inverse[j] = reciprocal_approximate(ins[j]);
      rest[j] = __fmaf_rn(-inverse[j], ins[j], 1.f) * inverse[j];
      const float factor = ins[j] * weights[j], step = reciprocal_approximate(outs[j]) * (1.f / 254.f);
      sum_step[j] = factor * step, bias_step[j] = biases[j] * step;
      sum_power[j] = factor * -kLog2e, bias_power[j] = biases[j] * -kLog2e;
    }
    const int4 words = __ldg(reinterpret_cast<const int4*>(static_cast<const signed char*>(a.weight) + 4LL * first));
    taps[0] = words.x, taps[1] = words.y, taps[2] = words.z, taps[3] = words.w;
  }
  wait_for_previous_kernel();
  int t = static_cast<int>(cut(a, wanted, row));
  const int end = static_cast<int>(cut(a, wanted + p.run, row));
  if (t >= end) return;

  using Raw = std::conditional_t<X == QUAMBA_I8, unsigned, uint2>;
  const char* const x = static_cast<const char*>(a.x) + (row * a.batch_stride + first) * size_of(X);
  const int x_step = static_cast<int>(a.token_stride) * size_of(X);
  auto at = [&](int token) { return x + static_cast<long long>(token) * x_step; };
  auto load = [](const char* from) { return __ldcg(reinterpret_cast<const Raw*>(from)); };
  unsigned window[4];
  auto enter = [&](Raw raw) {  // a token into the windows
    if constexpr (X == QUAMBA_I8) {
#pragma unroll
      for (int j = 0; j < 4; ++j) window[j] = __byte_perm(window[j], raw, 0x321 | (4 + j) << 12);
    } else {
      const float2 low = pair_of<X == QUAMBA_F16>(raw.x), high = pair_of<X == QUAMBA_F16>(raw.y);
      const float v[4] = {low.x, low.y, high.x, high.y};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float near = fminf(fmaxf(v[j], -limit[j]), limit[j]);
        const float quotient = __fmaf_rn(near, inverse[j], __fmul_rn(near, rest[j]));  // as a division rounds it
        window[j] = __byte_perm(window[j], __float_as_uint(__fadd_rn(quotient, kRounder)), 0x4321);
      }
    }
  };
  auto pack = [](unsigned i, unsigned j, unsigned k, unsigned l, int byte) {  // a byte of each
    const int two = byte | (4 + byte) << 4;
    return __byte_perm(__byte_perm(i, j, two), __byte_perm(k, l, two), 0x5410);
  };
  auto step = [&](Raw raw) {
    enter(raw);
    unsigned codes[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int bits = __dp4a(static_cast<int>(window[j]), taps[j], __float_as_int(kRounder));  // a float beside the sum
      const float sum = __fadd_rn(__int_as_float(bits), -kRounder);
      const float share = reciprocal_approximate(1.f + exp2_approximate(__fmaf_rn(sum, sum_power[j], bias_power[j])));
      codes[j] = code_bits(share, __fmaf_rn(sum, sum_step[j], bias_step[j]));
    }
    return pack(codes[0], codes[1], codes[2], codes[3], 0);
  };
  auto begin_at = [&](int token, int begin, int stop, int index) {
    unsigned* const state =
        reinterpret_cast<unsigned*>(static_cast<char*>(a.state) + static_cast<long long>(index) * kPast * a.C + first);
    auto input = [&](int from) {  // a token of the sequence or of the state, which lies before it
      if (from >= begin) return enter(load(at(from)));
      const unsigned word = a.state ? __ldcg(state + (kPast + from - begin) * (a.C / 4)) : 0u;
#pragma unroll
      for (int j = 0; j < 4; ++j) window[j] = __byte_perm(window[j], word, 0x321 | (4 + j) << 12);
    };
    if (token == begin && a.state) {
      for (int i = 0; i < kPast; ++i) input(stop - kPast + i);
      const unsigned last[4] = {window[0], window[1], window[2], window[3]};
      for (int i = 0; i < kPast; ++i) input(token - kPast + i);
#pragma unroll
      for (int i = 0; i < kPast; ++i) state[i * (a.C / 4)] = pack(last[0], last[1], last[2], last[3], i + 1);
    } else {
      for (int i = 0; i < kPast; ++i) input(token - kPast + i);
    }
  };

  char* y = static_cast<char*>(a.y) + (row * a.T + t) * a.C + first;
  while (t < end) {
    const Sequence s = find_sequence(a, t, row);
    const int stop = min(end, static_cast<int>(s.end));
    const char* from = at(t);
    int left = stop - t;
    Raw raw[kAhead];
#pragma unroll
    for (int u = 0; u < kAhead; ++u)
      if (u < left) raw[u] = load(from + u * x_step);
    begin_at(t, static_cast<int>(s.begin), static_cast<int>(s.end), s.index);
    for (; left >= kAhead; left -= kAhead, y += kAhead * a.C) {
      from += kAhead * x_step;
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        const Raw own = raw[u];
        if (kAhead + u < left) raw[u] = load(from + u * x_step);
        *reinterpret_cast<unsigned*>(y + u * a.C) = step(own);
      }
    }
#pragma unroll 1
    for (; left > 0; --left, from += x_step, y += a.C) *reinterpret_cast<unsigned*>(y) = step(load(from));
    t = stop;
  }
}

// Whether a call is of this kind, beyond what holds for every call.
inline bool of_codes(const Conv& p) {
  const QuambaConv& a = p.a;
  return a.W == 4 && a.weight_dtype == QUAMBA_I8 && a.out_scale && p.whole_x && p.whole_y && p.whole_state &&
         in_quads(a.weight, QUAMBA_F32) && in_quads(a.in_scale, QUAMBA_F32) && in_quads(a.x_scale, QUAMBA_F32) &&
         in_quads(a.weight_scale, QUAMBA_F32) && in_quads(a.out_scale, QUAMBA_F32) && in_quads(a.bias, a.bias_dtype) &&
         a.T < (1 << 30) && a.token_stride < (1 << 22) && a.C < (1 << 22) &&
         (a.in_scale ? size_of(a.x_dtype) == 2 : a.x_dtype == QUAMBA_I8);
}

inline int run_codes(Conv p, int processors, void* stream) {
  const QuambaConv& a = p.a;
  constexpr int kWarps = kThreads / 32, kMany = 64, kMost = 512;
  auto up = [](long long n, long long by) { return (n - 1) / by + 1; };
  // runs so long that all blocks find room at once, where that fills the GPU; else short ones, many times over
  const long long places = processors * (kResident / kThreads), across = up(a.C / 4, 32), beside = across * a.B;
  const long long down = std::max(places / beside, 1LL), filling = up(a.T, down * kWarps);
  const bool at_once = down * beside <= places && down * beside * 8 >= places * 7 && filling <= kMost;
  p.run = static_cast<int>(up(std::max(at_once ? filling : kMany, up(a.T, 60000LL * kWarps)), kAhead)) * kAhead;
  const dim3 grid(static_cast<unsigned>(across), static_cast<unsigned>(up(up(a.T, p.run), kWarps)),
                  static_cast<unsigned>(a.B));
  auto kernel = a.x_dtype == QUAMBA_I8    ? convolve_codes<QUAMBA_I8>
                : a.x_dtype == QUAMBA_F16 ? convolve_codes<QUAMBA_F16>
                                          : convolve_codes<QUAMBA_BF16>;
  return launch(kernel, p, grid, kThreads, stream);
}

}  // namespace quamba::conv
