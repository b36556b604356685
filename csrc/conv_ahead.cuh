// The convolution of a prompt where rows lie in whole quads and kernels have four taps: what a model runs. The next
// tokens are on their way while one is computed, and runs are as long as lets all blocks find room at once.
//
// Taps says what codes or floats are: a window of the last inputs, to which `enter` adds a token of x (Raw) or of the
// state (Kept) and from which `kept` takes one, and `step`, a token's outputs (Out).
#pragma once

#include <algorithm>

#include "conv_runs.cuh"
#include "launch.cuh"
#include "quads.cuh"

namespace quamba::conv {

constexpr int kThreads = 64, kPast = 3;
constexpr int kPieces = 16;     // of a thread that expands
constexpr int kAhead = 4;       // tokens whose loads are on their way
constexpr int kResident = 768;  // threads of a multiprocessor, for which registers are few enough and runs long enough

template <class Taps>
__global__ void __launch_bounds__(kThreads, kResident / kThreads) convolve(const __grid_constant__ Conv p) {
  using Raw = typename Taps::Raw;
  using Kept = typename Taps::Kept;
  using Out = typename Taps::Out;
  const QuambaConv& a = p.a;
  const int first = 4 * (blockIdx.x * 32 + threadIdx.x % 32), row = blockIdx.z;
  const long long wanted = (static_cast<long long>(blockIdx.y) * (blockDim.x / 32) + threadIdx.x / 32) * p.run;
  launch_dependents();
  if (blockIdx.y >= static_cast<unsigned>(p.down))
    return expand<kPieces>(p.expansion, ((blockIdx.y - p.down) * gridDim.z + blockIdx.z) * gridDim.x + blockIdx.x,
                           threadIdx.x, kThreads, [] { wait_for_previous_kernel(); });
  if (first >= a.C || wanted >= a.T) return;

  Taps taps(a, first);
  wait_for_previous_kernel();
  int t = static_cast<int>(cut(a, wanted, row));
  const int end = static_cast<int>(cut(a, wanted + p.run, row));
  if (t >= end) return;

  constexpr int kIn = sizeof(Raw) / 4, kOut = sizeof(Out) / 4;  // bytes of an element
  const char* const x = static_cast<const char*>(a.x) + (row * a.batch_stride + first) * kIn;
  const int x_step = static_cast<int>(a.token_stride) * kIn, y_step = a.C * kOut;
  auto at = [&](int token) { return x + static_cast<long long>(token) * x_step; };
  auto load = [](const char* from) { return __ldcg(reinterpret_cast<const Raw*>(from)); };
  auto begin_at = [&](int token, int begin, int stop, int index) {
    if (token - begin >= kPast) {  // all loads before the first use
      Raw before[kPast];
#pragma unroll
      for (int i = 0; i < kPast; ++i) before[i] = load(at(token - kPast + i));
#pragma unroll
      for (int i = 0; i < kPast; ++i) taps.enter(before[i]);
      return;
    }
    Kept* const state = static_cast<Kept*>(a.state) + (static_cast<long long>(index) * kPast * a.C + first) / 4;
    auto input = [&](int from) {  // a token of the sequence or of the state, which lies before it
      if (from >= begin) return taps.enter(load(at(from)));
      taps.enter_kept(a.state ? __ldcg(state + (kPast + from - begin) * (a.C / 4)) : Kept{});
    };
    for (int i = 0; i < kPast; ++i) input(stop - kPast + i);
    const typename Taps::Window last = taps.window;
    for (int i = 0; i < kPast; ++i) input(token - kPast + i);
    if (token != begin || !a.state) return;
#pragma unroll
    for (int i = 0; i < kPast; ++i) state[i * (a.C / 4)] = Taps::kept(last, i);
  };

  char* y = static_cast<char*>(a.y) + ((row * a.T + t) * a.C + first) * kOut;
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
    for (; left >= kAhead; left -= kAhead, y += kAhead * y_step) {
      from += kAhead * x_step;
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        const Raw own = raw[u];
        if (kAhead + u < left) raw[u] = load(from + u * x_step);
        *reinterpret_cast<Out*>(y + u * y_step) = taps.step(own);
      }
    }
#pragma unroll 1
    for (; left > 0; --left, from += x_step, y += y_step) *reinterpret_cast<Out*>(y) = taps.step(load(from));
    t = stop;
  }
}

// Whether a call is of this kind, beyond what holds for every call and for codes or floats.
inline bool in_whole_quads(const Conv& p) {
  const QuambaConv& a = p.a;
  return a.W == 4 && p.whole_x && p.whole_y && p.whole_state && in_quads(a.weight_scale, QUAMBA_F32) &&
         in_quads(a.bias, a.bias_dtype) && a.T < (1 << 30) && a.token_stride < (1 << 22) && a.C < (1 << 22);
}

inline int run_ahead(void (*kernel)(Conv), Conv p, int processors, void* stream) {
  const QuambaConv& a = p.a;
  constexpr int kWarps = kThreads / 32, kMany = 64, kMost = 512;
  auto up = [](long long n, long long by) { return (n - 1) / by + 1; };
  // runs so long that all blocks find room at once, where that fills the GPU; else short ones, many times over
  const long long places = processors * (kResident / kThreads), across = up(a.C / 4, 32), beside = across * a.B;
  const long long down = std::max(places / beside, 1LL), filling = up(a.T, down * kWarps);
  const bool at_once = down * beside <= places && down * beside * 8 >= places * 7 && filling <= kMost;
  p.run = static_cast<int>(up(std::max(at_once ? filling : kMany, up(a.T, 60000LL * kWarps)), kAhead)) * kAhead;
  p.down = static_cast<int>(up(up(a.T, p.run), kWarps));
  p.expansion = expansion_of(a.expansion);
  const long long blocks = p.expansion.blocks(kThreads, kPieces), rows = blocks ? up(blocks, beside) : 0;
  const bool rides = p.down + rows <= 65535;
  const dim3 grid(static_cast<unsigned>(across), static_cast<unsigned>(p.down + (rides ? rows : 0)),
                  static_cast<unsigned>(a.B));
  const int status = launch(kernel, p, grid, kThreads, stream);
  return status != QUAMBA_OK || rides ? status : expand_alone(a.expansion, stream);
}

}  // namespace quamba::conv
