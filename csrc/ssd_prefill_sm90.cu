// The convolution of a prompt on Hopper, and what the SSD scan makes of B, C and dt before it begins: in one launch.
//
// B and C are convolved by blocks of a chunk each, which have them in shared memory at once, where they become operands
// and are multiplied; they never reach memory as codes. Other blocks turn dt to decays and weights. Both kinds come first
// and are done before those that convolve x, so they take little time of their own.
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

constexpr int kLeast = 1024;  // tokens of a sequence, of which fewer would leave warps without a run
constexpr int kStaged = 2 * kN;  // channels of B and C
// Heads of which a block has dt at a time, and floats of each.
constexpr int kHeads = 128, kPitchOfHead = kTokens + 1;
constexpr int kShared = std::max(2 * kOperands, 4 * kHeads * kPitchOfHead);

struct Prefill {
  Conv conv;  // of all channels, but only those of x are stored
  Params scan;
  unsigned chunks, slots, across;  // blocks of the first kind and of the second; blocks beside each other of the third
};

// B and C of a chunk and group, which are staged in shared memory a token after the other, as operands there.
template <bool Codes>
__device__ __forceinline__ void share_staged(const Params& p, const Place& place, long long at, unsigned char* shared) {
  __shared__ float most[3][kWarps];
  constexpr int kRow = kStaged * (Codes ? 1 : 2) / 16, kEach = kTokens * kRow / kThreads;  // pieces of 16 bytes
  const int piece = threadIdx.x % kRow, first = threadIdx.x / kRow, is_c = piece / (kRow / 2);
  unsigned char* const operand = shared + is_c * kOperands;
  uint4 v[kEach];
  __syncthreads();
#pragma unroll
  for (int k = 0; k < kEach; ++k) {
    v[k] = reinterpret_cast<const uint4*>(shared)[threadIdx.x + k * kThreads];
    if (place.first + first + k * (kThreads / kRow) >= place.end) v[k] = make_uint4(0, 0, 0, 0);
  }
  int exponents[2] = {0, 0};
  if constexpr (Codes) {
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kEach; ++k)
      store_codes<kTokens>(operand, first + k * (kThreads / kRow), piece % (kRow / 2), v[k]);
  } else {
    float largest = 0.f;
#pragma unroll
    for (int k = 0; k < kEach; ++k) largest = fmaxf(largest, largest_of(v[k], p.a.b_dtype));
#pragma unroll
    for (int step = kRow / 4; step; step /= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, step));
    if (threadIdx.x % (kRow / 2) == 0) most[is_c][threadIdx.x / 32] = largest;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float of_all = 0.f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) of_all = fmaxf(of_all, most[i][w]);
      exponents[i] = quamba::ssd::scale_of(of_all);
    }
    const float factor = power_of_two(-exponents[is_c]);
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      const int row = first + k * (kThreads / kRow), block = piece % (kRow / 2) / 2;
      *reinterpret_cast<uint4*>(operand + place_in<kTokens>(row, block, piece % 2)) =
          scaled_halves(v[k], p.a.b_dtype, factor);
    }
  }
  share_products(p, at, shared, most[2], exponents, true);
}

// dt of a chunk as decays and weights: by way of shared memory, or each head would wait for memory. A warp reads every
// eighth token, a lane four heads of it.
__device__ __forceinline__ void convert_dt(const Params& p, const Place& place, long long slot, float* shared) {
  constexpr int kEach = kTokens / kWarps;
  const QuambaSsdScan& a = p.a;
  const unsigned short* const dt = static_cast<const unsigned short*>(a.dt);
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
        raw[k] = __ldcg(reinterpret_cast<const uint2*>(dt + first + k * kWarps * a.dt_token));
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

// All blocks that convolve run the same code, since what is fetched for a few of them alone would make them late.
template <class Taps>
__global__ void __launch_bounds__(kThreads, kResident) ssd_convolve(const __grid_constant__ Prefill all) {
  constexpr int kOut = sizeof(typename Taps::Out) / 4;  // bytes of an element
  extern __shared__ __align__(1024) unsigned char shared[];
  const Params& p = all.scan;
  const QuambaSsdScan& a = p.a;
  const QuambaConv& c = all.conv.a;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  unsigned block = blockIdx.x;
  if (block >= all.chunks && block < all.chunks + all.slots) {
    launch_dependents();
    wait_for_previous_kernel();
    block -= all.chunks;
    const long long states = static_cast<long long>(a.sequences) * a.H * (p.cuts - 1);
    for (long long i = static_cast<long long>(block) * kThreads + threadIdx.x; i < states; i += all.slots * kThreads)
      p.flags[i] = 0;
    return convert_dt(p, place_of<kTokens>(a, block), block, reinterpret_cast<float*>(shared));
  }
  const bool shares = block < all.chunks;
  Place place{0, 0, 0};
  int first, row, run, y_step;
  long long wanted;
  char* y;
  if (shares) {
    const int group = block % a.G, is_c = warp % 2;
    place = place_of<kTokens>(a, block / a.G);
    first = a.H * kP + (is_c * a.G + group) * kN + 4 * lane, row = static_cast<int>(place.batch);
    run = kRun, wanted = place.first + warp / 2 * kRun, y_step = kStaged * kOut;
    y = reinterpret_cast<char*>(shared) + (is_c * kN + 4 * lane) * kOut - place.first * y_step;
  } else {
    launch_dependents();
    block -= all.chunks + all.slots;
    const unsigned beside = block / all.across, down = static_cast<unsigned>(all.conv.down);
    first = 4 * (block % all.across * 32 + lane), row = static_cast<int>(beside / down), run = all.conv.run;
    wanted = (static_cast<long long>(beside % down) * kWarps + warp) * run, y_step = c.C * kOut;
    y = static_cast<char*>(c.y) + (row * c.T * c.C + first) * kOut;
    if (first >= a.H * kP) return;
  }
  if (wanted < a.T) conv::convolve_run<Taps>(c, first, row, wanted, run, y, y_step);
  if (!shares) return;
  // not earlier: blocks of the scan, of which a multiprocessor holds one, would gather on those that are free by now
  launch_dependents();
  share_staged<kOut == 1>(p, place, block, shared);
}

// Whether the kernel stands for the convolution and for the scan's first launch.
bool convolves(const Conv& conv, const Params& p) {
  const QuambaConv& c = conv.a;
  const QuambaSsdScan& a = p.a;
  const long long inner = static_cast<long long>(a.H) * kP;
  return serves(a) && !c.cu_seqlens && !a.cu_seqlens && a.T >= kLeast && c.T == a.T && c.B == a.sequences &&
         c.C == inner + 2LL * a.G * kN && a.x_dtype == a.b_dtype && a.x_dtype == a.c_dtype &&
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
  // longer runs would leave idle what the other blocks leave early
  conv.run = conv::run_of(p.a.T, kWarps, beside, std::max(places, 1LL), 32, 32);
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
