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

// Four channels of a row of x, from `first` on, and what is known of them. Made before the wait: it reads constants.
template <class Taps>
class Channels {
 public:
  using Raw = typename Taps::Raw;
  using Kept = typename Taps::Kept;

  Taps taps;

  __device__ __forceinline__ Channels(const QuambaConv& a, int first, int row)
      : taps(a, first), a_(a), first_(first), x_(static_cast<const char*>(a.x) + (row * a.batch_stride + first) * kIn),
        step_(static_cast<int>(a.token_stride) * kIn) {}

  __device__ __forceinline__ const char* at(int token) const { return x_ + static_cast<long long>(token) * step_; }
  __device__ __forceinline__ int step() const { return step_; }  // bytes from a token to the next
  static __device__ __forceinline__ Raw load(const char* from) { return __ldcg(reinterpret_cast<const Raw*>(from)); }

  // The window before a token of the sequence `index`, which lasts from begin to stop; the first token leaves its state.
  __device__ __forceinline__ void begin_at(int token, int begin, int stop, int index) {
    if (token - begin >= kPast) {  // all loads before the first use
      Raw before[kPast];
#pragma unroll
      for (int i = 0; i < kPast; ++i) before[i] = load(at(token - kPast + i));
#pragma unroll
      for (int i = 0; i < kPast; ++i) taps.enter(before[i]);
      return;
    }
    Kept* const state = static_cast<Kept*>(a_.state) + (static_cast<long long>(index) * kPast * a_.C + first_) / 4;
    auto input = [&](int from) {  // a token of the sequence or of the state, which lies before it
      if (from >= begin) return taps.enter(load(at(from)));
      taps.enter_kept(a_.state ? __ldcg(state + (kPast + from - begin) * (a_.C / 4)) : Kept{});
    };
    for (int i = 0; i < kPast; ++i) input(stop - kPast + i);
    const typename Taps::Window last = taps.window;
    for (int i = 0; i < kPast; ++i) input(token - kPast + i);
    if (token != begin || !a_.state) return;
#pragma unroll
    for (int i = 0; i < kPast; ++i) state[i * (a_.C / 4)] = Taps::kept(last, i);
  }

 private:
  static constexpr int kIn = sizeof(Raw) / 4;  // bytes of an element

  const QuambaConv& a_;
  const int first_;
  const char* const x_;
  const int step_;
};

// A run of tokens, from `wanted` on, of four channels; y: where outputs of the row's first token would lie, y_step: bytes
// from a token to the next.
template <class Taps>
__device__ __forceinline__ void convolve_run(const QuambaConv& a, int first, int row, long long wanted, int run, char* y,
                                             int y_step) {
  using Raw = typename Taps::Raw;
  using Out = typename Taps::Out;
  Channels<Taps> channels(a, first, row);
  wait_for_previous_kernel();
  int t = static_cast<int>(cut(a, wanted, row));
  const int end = static_cast<int>(cut(a, wanted + run, row));
  if (t >= end) return;

  const int x_step = channels.step();
  y += static_cast<long long>(t) * y_step;
  while (t < end) {
    const Sequence s = find_sequence(a, t, row);
    const int stop = min(end, static_cast<int>(s.end));
    const char* from = channels.at(t);
    int left = stop - t;
    Raw raw[kAhead];
#pragma unroll
    for (int u = 0; u < kAhead; ++u)
      if (u < left) raw[u] = channels.load(from + u * x_step);
    channels.begin_at(t, static_cast<int>(s.begin), static_cast<int>(s.end), s.index);
    for (; left >= kAhead; left -= kAhead, y += kAhead * y_step) {
      from += kAhead * x_step;
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        const Raw own = raw[u];
        if (kAhead + u < left) raw[u] = channels.load(from + u * x_step);
        *reinterpret_cast<Out*>(y + u * y_step) = channels.taps.step(own);
      }
    }
#pragma unroll 1
    for (; left > 0; --left, from += x_step, y += y_step)
      *reinterpret_cast<Out*>(y) = channels.taps.step(channels.load(from));
    t = stop;
  }
}

template <class Taps>
__global__ void __launch_bounds__(kThreads, kResident / kThreads) convolve(const __grid_constant__ Conv p) {
  const int first = 4 * (blockIdx.x * 32 + threadIdx.x % 32), row = blockIdx.z;
  const long long wanted = (static_cast<long long>(blockIdx.y) * (blockDim.x / 32) + threadIdx.x / 32) * p.run;
  launch_dependents();
  if (blockIdx.y >= static_cast<unsigned>(p.down))
    return expand<kPieces>(p.expansion, ((blockIdx.y - p.down) * gridDim.z + blockIdx.z) * gridDim.x + blockIdx.x,
                           threadIdx.x, kThreads, [] { wait_for_previous_kernel(); });
  constexpr int kOut = sizeof(typename Taps::Out) / 4;  // bytes of an element
  if (first < p.a.C && wanted < p.a.T)
    convolve_run<Taps>(p.a, first, row, wanted, p.run,
                       static_cast<char*>(p.a.y) + (row * p.a.T * p.a.C + first) * kOut, p.a.C * kOut);
}

// Whether a call is of this kind, beyond what holds for every call and for codes or floats.
inline bool in_whole_quads(const Conv& p) {
  const QuambaConv& a = p.a;
  return a.W == 4 && p.whole_x && p.whole_y && p.whole_state && in_quads(a.weight_scale, QUAMBA_F32) &&
         in_quads(a.bias, a.bias_dtype) && a.T < (1 << 30) && a.token_stride < (1 << 22) && a.C < (1 << 22);
}

// How long runs are, for blocks of so many warps and columns of so many of them, which find so many places at once: as
// long as lets them fill these, but not more than `most`; else `many` tokens, many times over.
inline int run_of(long long T, int warps, long long columns, long long places, int many, int most) {
  auto up = [](long long n, long long by) { return (n - 1) / by + 1; };
  const long long down = std::max(places / columns, 1LL), filling = up(T, down * warps);
  const bool at_once = down * columns <= places && down * columns * 8 >= places * 7 && filling <= most;
  return static_cast<int>(up(std::max(at_once ? filling : many, up(T, 60000LL * warps)), kAhead)) * kAhead;
}

inline int run_ahead(void (*kernel)(Conv), Conv p, int processors, void* stream) {
  const QuambaConv& a = p.a;
  constexpr int kWarps = kThreads / 32;
  auto up = [](long long n, long long by) { return (n - 1) / by + 1; };
  const long long across = up(a.C / 4, 32), beside = across * a.B;
  p.run = run_of(a.T, kWarps, beside, processors * (kResident / kThreads), 64, 512);
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
