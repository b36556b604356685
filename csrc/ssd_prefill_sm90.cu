// The convolution of a prompt on Hopper, and what the SSD scan makes of B, C and dt before it begins: in one launch.
//
// B and C are convolved by blocks of a chunk each, which have them in shared memory at once, where they become operands and
// are multiplied; they never reach memory as codes. Other blocks turn dt to decays and weights. Both kinds come first and are
// done before the last of those that convolve x, so they take no time of their own.
#include <algorithm>

#include "conv_codes.cuh"
#include "conv_halves.cuh"
#include "ssd_chunks_sm90.cuh"

extern "C" int quamba_causal_conv1d(const QuambaConv* args, void* stream);
extern "C" int quamba_ssd_scan(const QuambaSsdScan* args, void* stream);
extern "C" long long quamba_ssd_scan_workspace(const QuambaSsdScan* args);

namespace quamba::ssd::hopper {
namespace {

constexpr int kThreads = kSharingThreads, kWarps = kThreads / 32;
constexpr int kRuns = kWarps / 2, kRun = kTokens / kRuns;  // of a chunk: warps take turns at B and C
constexpr int kResident = conv::kResident / kThreads;      // blocks of a multiprocessor

constexpr int kHeads = 128, kPitchOfHead = kTokens + 1;  // that a block has dt of at a time; floats of one
constexpr int kShared = std::max(2 * kOperands, 4 * kHeads * kPitchOfHead);

struct Prefill {
  Conv conv;  // of all channels, but only those of x are stored
  Params scan;
  unsigned chunks, slots, across;  // blocks of the first kind and of the second; blocks beside each other of the third
};

// B and C of a chunk and group.
template <class Taps>
__device__ __forceinline__ void convolve_chunk(const Prefill& all, unsigned at, unsigned char* shared) {
  __shared__ float most[2][kWarps];
  const Params& p = all.scan;
  const QuambaSsdScan& a = p.a;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, is_c = warp % 2;
  const int group = at % a.G, first = a.H * kP + (is_c * a.G + group) * kN + 4 * lane;
  const Place place = place_of<kTokens>(a, at / a.G);
  const int row = static_cast<int>(place.batch), tokens = static_cast<int>(a.T);
  const int begin = static_cast<int>(place.first) + warp / 2 * kRun;
  conv::Channels<Taps> channels(all.conv.a, first, row);
  wait_for_previous_kernel();
  typename Taps::Raw raw[kRun];
#pragma unroll
  for (int u = 0; u < kRun; ++u)
    if (begin + u < tokens) raw[u] = channels.load(channels.at(begin) + u * channels.step());
  if (begin < tokens) channels.begin_at(begin, 0, tokens, row);
  unsigned char* const operand = shared + is_c * kOperands;
  auto put = [&](int u, uint2 four) {
    *reinterpret_cast<uint2*>(operand + place_in<kTokens>(warp / 2 * kRun + u, lane / 4, lane / 2 % 2) + lane % 2 * 8) = four;
  };
  int exponents[2] = {0, 0};
  if constexpr (sizeof(typename Taps::Out) == 4) {
#pragma unroll
    for (int u = 0; u < kRun; ++u) {
      unsigned codes = 0;
      if (begin + u < tokens) codes = channels.taps.step(raw[u]);
      put(u, codes_to_halves(codes));
    }
  } else {
    float largest = 0.f;
#pragma unroll
    for (int u = 0; u < kRun; ++u) {
      raw[u] = begin + u < tokens ? channels.taps.step(raw[u]) : uint2{};
      largest = fmaxf(largest, largest_of(make_uint4(raw[u].x, raw[u].y, 0, 0), a.b_dtype));
    }
    const unsigned of_warp = __reduce_max_sync(~0u, __float_as_uint(largest));
    if (lane == 0) most[0][warp] = __uint_as_float(of_warp);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float of_all = 0.f;
#pragma unroll
      for (int w = i; w < kWarps; w += 2) of_all = fmaxf(of_all, most[0][w]);
      exponents[i] = scale_of(of_all);
    }
    const float factor = power_of_two(-exponents[is_c]);
#pragma unroll
    for (int u = 0; u < kRun; ++u) {
      const uint4 scaled = scaled_halves(make_uint4(raw[u].x, raw[u].y, 0, 0), a.b_dtype, factor);
      put(u, make_uint2(scaled.x, scaled.y));
    }
  }
  share_products(p, at, shared, most[1], exponents, true);
}

// dt of a chunk as decays and weights: by way of shared memory, or each head would wait for memory. A warp reads every eighth
// token, a lane four heads of it.
__device__ __forceinline__ void convert_dt(const Params& p, const Place& place, long long slot, float* shared) {
  constexpr int kEach = kTokens / kWarps;
  const QuambaSsdScan& a = p.a;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const bool half = a.dt_dtype == QUAMBA_F16;
  for (int from = 0; from < a.H; from += kHeads) {
    const int heads = min(a.H - from, kHeads), count = heads - 4 * lane;
    const long long first = place.batch * a.dt_batch + (place.first + warp) * a.dt_token + from + 4 * lane;
    if (from) __syncthreads();  // what is shared has been read
    uint2 raw[kEach];
#pragma unroll
    for (int k = 0; k < kEach; ++k)
      if (count > 0 && place.first + warp + k * kWarps < place.end)
        raw[k] = __ldcg(reinterpret_cast<const uint2*>(static_cast<const unsigned short*>(a.dt) + first +
                                                       k * kWarps * a.dt_token));
    if (count > 0) {
      float* const to = shared + 4 * lane * kPitchOfHead + warp;
#pragma unroll
      for (int k = 0; k < kEach; ++k) {
        const float2 low = halves_to_floats(raw[k].x, half), high = halves_to_floats(raw[k].y, half);
        const float four[4] = {low.x, low.y, high.x, high.y};
#pragma unroll
        for (int j = 0; j < 4; ++j) to[j * kPitchOfHead + k * kWarps] = four[j];
      }
    }
    __syncthreads();
#pragma unroll 1
    for (int head = 2 * warp; head < heads; head += 2 * kWarps)
#pragma unroll
      for (int i = head; i < head + 2; ++i)
        if (i < heads)
          steps_of<kTokens, true>(p, place, slot, from + i, [&](int token) { return shared[i * kPitchOfHead + token]; });
  }
}

template <class Taps>
__global__ void __launch_bounds__(kThreads, kResident) ssd_convolve(const __grid_constant__ Prefill all) {
  extern __shared__ __align__(1024) unsigned char shared[];
  const Params& p = all.scan;
  launch_dependents();
  unsigned block = blockIdx.x;
  if (block < all.chunks) return convolve_chunk<Taps>(all, block, shared);
  block -= all.chunks;
  const int warp = threadIdx.x / 32;
  if (block < all.slots) {
    wait_for_previous_kernel();
    const long long states = static_cast<long long>(p.a.sequences) * p.a.H * (p.cuts - 1);
    for (long long i = static_cast<long long>(block) * kThreads + threadIdx.x; i < states; i += all.slots * kThreads)
      p.flags[i] = 0;
    convert_dt(p, place_of<kTokens>(p.a, block), block, reinterpret_cast<float*>(shared));
    return;
  }
  block -= all.slots;
  const unsigned row = block / all.across;
  const int first = 4 * (block % all.across * 32 + threadIdx.x % 32);
  const unsigned down = static_cast<unsigned>(all.conv.down), sequence = row / down;
  const long long wanted = (static_cast<long long>(row % down) * kWarps + warp) * all.conv.run;
  if (first < p.a.H * kP && wanted < p.a.T)
    conv::convolve_run<Taps>(all.conv, first, static_cast<int>(sequence), wanted);
}

// Whether the kernel stands for the convolution and for the scan's first launch.
bool convolves(const Conv& conv, const Params& p) {
  const QuambaConv& c = conv.a;
  const QuambaSsdScan& a = p.a;
  const long long inner = static_cast<long long>(a.H) * kP;
  return serves(a) && !c.cu_seqlens && !a.cu_seqlens && a.T > 0 && a.x_dtype == a.b_dtype && a.x_dtype == a.c_dtype &&
         c.B == a.sequences && c.T == a.T && c.C == inner + 2LL * a.G * kN &&
         size_of(a.dt_dtype) == 2 && a.H % 4 == 0 && in_quads(a.dt, a.dt_dtype, a.dt_token, a.dt_batch) &&
         (conv::of_codes(conv) ? c.x_dtype != QUAMBA_I8 : conv::of_halves(conv));
}

int launch_convolve(Conv conv, const Params& p, void* stream) {
  int processors = 0;
  if (cudaError_t error = device_attribute(cudaDevAttrMultiProcessorCount, processors); error != cudaSuccess)
    return error;
  auto up = [](long long n, long long by) { return (n - 1) / by + 1; };
  const bool codes = conv::of_codes(conv), half = conv.a.x_dtype == QUAMBA_F16;
  const long long across = up(p.a.H * kP / 4, 32), beside = across * conv.a.B, chunks = p.slots * p.a.G;
  const long long places = static_cast<long long>(processors) * kResident - chunks - p.slots;
  conv.run = conv::run_of(p.a.T, kWarps, beside, std::max(places, 1LL));
  conv.down = static_cast<int>(up(up(p.a.T, conv.run), kWarps));
  const long long grid = chunks + p.slots + beside * conv.down;
  if (grid > 0x7fffffffLL) return QUAMBA_UNSUPPORTED;
  const Prefill all{conv, p, static_cast<unsigned>(chunks), static_cast<unsigned>(p.slots),
                    static_cast<unsigned>(across)};
  auto kernel = codes ? half ? ssd_convolve<conv::Codes<QUAMBA_F16>> : ssd_convolve<conv::Codes<QUAMBA_BF16>>
                      : half ? ssd_convolve<conv::Halves<true>> : ssd_convolve<conv::Halves<false>>;
  return launch(kernel, all, dim3(static_cast<unsigned>(grid)), kThreads, stream, kShared);
}

}  // namespace
}  // namespace quamba::ssd::hopper

extern "C" long long quamba_ssd_prefill_workspace(const QuambaSsdPrefill* args) {
  return quamba_ssd_scan_workspace(&args->scan);
}

extern "C" int quamba_ssd_prefill(const QuambaSsdPrefill* args, void* stream) {
  using namespace quamba;
  QuambaSsdScan a = args->scan;
  a.workspace = args->workspace, a.workspace_bytes = args->workspace_bytes;
  ssd::Params p;
  if (!takes(args->conv) || !ssd::prepare(a, p)) return QUAMBA_UNSUPPORTED;
  const Conv conv = conv_of(args->conv, 0);
  if (ssd::hopper::convolves(conv, p)) {
    const int status = ssd::hopper::launch_convolve(conv, p, stream);
    return status == QUAMBA_OK ? ssd::hopper::launch_scan(p, stream) : status;
  }
  const int status = quamba_causal_conv1d(&args->conv, stream);
  return status == QUAMBA_OK ? quamba_ssd_scan(&a, stream) : status;
}
