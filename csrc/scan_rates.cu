// dt_proj of a prompt: y = x w^T of few columns, whose results are many times the bytes of x and w. So weights stay in
// registers while tokens pass by, and nothing goes through shared memory: codes lie as operands (scan_codes.cu), and
// the channels of a warp are dealt out to its tiles so that a lane ends up with eight neighbours.
#include <algorithm>

#include "launch.cuh"
#include "quads.cuh"
#include "scan.h"

namespace {

using namespace quamba;

constexpr int kWarps = 8, kTiles = 4, kChannels = 8 * kTiles;  // of a warp: tiles of 8 channels
constexpr int kBlocks = 2;                                     // on a multiprocessor

struct Rates {
  QuambaScanRates a;
  int blocks, share;  // of 16 tokens: of a sequence, of a block of threads
};

// Steps: of 32 columns.
template <int Steps, bool Half>
__global__ void __launch_bounds__(32 * kWarps, kBlocks) scan_rates(const __grid_constant__ Rates p) {
  const QuambaScanRates& a = p.a;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int first = (blockIdx.x * kWarps + threadIdx.x / 32) * kChannels, own = first + 8 * t;
  launch_dependents();
  uint2 w[kTiles][Steps];
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
    const int channel = min(first + g / 2 * 8 + 2 * j + g % 2, a.I - 1);
    const auto* row = static_cast<const unsigned char*>(a.w) + static_cast<long long>(channel) * a.rank + 8 * t;
#pragma unroll
    for (int k = 0; k < Steps; ++k) w[j][k] = constant_pair(row + 32 * k);
  }
  const bool exists = own < a.I;
  float w_scale[8], bias[8];
#pragma unroll
  for (int i = 0; i < 8; i += 4) {
    const float4 s = load_quad(a.w_scale, QUAMBA_F32, own + i, exists ? 4 : 0, true);
    float4 b = make_float4(0.f, 0.f, 0.f, 0.f);
    if (a.bias) b = load_quad(a.bias, a.bias_dtype, own + i, exists ? 4 : 0, true);
    w_scale[i] = s.x, w_scale[i + 1] = s.y, w_scale[i + 2] = s.z, w_scale[i + 3] = s.w;
    bias[i] = b.x, bias[i + 1] = b.y, bias[i + 2] = b.z, bias[i + 3] = b.w;
  }
  wait_for_previous_kernel();
  const int begin = blockIdx.y * p.share, end = min(begin + p.share, p.blocks);
  const long long before = static_cast<long long>(blockIdx.z) * p.blocks + begin;
  const uint4* codes = static_cast<const uint4*>(a.rank_codes) + before * Steps * 32 + lane;
  const float2* scales = reinterpret_cast<const float2*>(a.rank_scale) + before * 8 + g;
  auto* y = static_cast<unsigned short*>(a.dt) + (blockIdx.z * a.T + begin * 16 + 2 * g) * a.I + own;
  uint4 x[Steps];
  float2 scale;
  auto fetch = [&] {
#pragma unroll
    for (int k = 0; k < Steps; ++k) x[k] = __ldca(codes + 32 * k);
    scale = __ldca(scales);
    codes += 32 * Steps, scales += 8;
  };
  if (begin < end) fetch();
  for (int block = begin; block < end; ++block) {
    int sums[kTiles][4];
#pragma unroll
    for (int j = 0; j < kTiles; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[j][i] = __float_as_int(kRounder);  // a float without a conversion
#pragma unroll
    for (int k = 0; k < Steps; ++k)
#pragma unroll
      for (int j = 0; j < kTiles; ++j) mma_s8(sums[j], x[k].x, x[k].y, x[k].z, x[k].w, w[j][k].x, w[j][k].y);
    const float token_scale[2] = {scale.x, scale.y};
    if (block + 1 < end) fetch();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      unsigned out[kTiles];
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        float v[2];
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const float sum = __int_as_float(sums[j][2 * i + c]) - kRounder;
          v[c] = __fmul_rn(__fmul_rn(sum, token_scale[i]), w_scale[2 * j + c]);
          if (a.bias) v[c] = __fadd_rn(v[c], bias[2 * j + c]);
        }
        if constexpr (Half) {
          const __half2 pair = __floats2half2_rn(v[0], v[1]);
          out[j] = reinterpret_cast<const unsigned&>(pair);
        } else {
          const __nv_bfloat162 pair = __floats2bfloat162_rn(v[0], v[1]);
          out[j] = reinterpret_cast<const unsigned&>(pair);
        }
      }
      if (exists && 16 * block + 2 * g + i < a.T)
        *reinterpret_cast<uint4*>(y + i * a.I) = make_uint4(out[0], out[1], out[2], out[3]);
    }
    y += 16ll * a.I;
  }
}

template <int Steps>
int launch_steps(const Rates& p, dim3 grid, void* stream) {
  return launch(p.a.dt_dtype == QUAMBA_F16 ? scan_rates<Steps, true> : scan_rates<Steps, false>, p, grid, 32 * kWarps,
                stream);
}

}  // namespace

extern "C" int quamba_scan_rates(const QuambaScanRates* args, void* stream) {
  const QuambaScanRates& a = *args;
  auto aligned = [](const void* p) { return reinterpret_cast<unsigned long long>(p) % 16 == 0; };
  auto is_float = [](int type) { return type == QUAMBA_F32 || type == QUAMBA_F16 || type == QUAMBA_BF16; };
  if (a.B < 1 || a.B > 65535 || a.T < 1 || a.T > 1 << 30 || a.I < 8 || a.I % 8 || a.rank < 32 || a.rank % 32 ||
      a.rank > QUAMBA_SCAN_RANK || (a.bias && !is_float(a.bias_dtype)) ||
      (a.dt_dtype != QUAMBA_F16 && a.dt_dtype != QUAMBA_BF16) || !aligned(a.rank_codes) || !aligned(a.rank_scale) ||
      !aligned(a.w) || !aligned(a.w_scale) || !aligned(a.bias) || !aligned(a.dt))
    return QUAMBA_UNSUPPORTED;
  int processors = 0;
  if (cudaError_t error = device_attribute(cudaDevAttrMultiProcessorCount, processors); error != cudaSuccess)
    return error;
  const int across = (a.I - 1) / (kWarps * kChannels) + 1, blocks = static_cast<int>((a.T - 1) / 16 + 1);
  const int shares = std::min(std::max(kBlocks * processors / (across * a.B), 1), blocks);
  const Rates p{a, blocks, (blocks - 1) / shares + 1};
  const dim3 grid(across, (blocks - 1) / p.share + 1, a.B);
  switch (a.rank / 32) {
    case 1: return launch_steps<1>(p, grid, stream);
    case 2: return launch_steps<2>(p, grid, stream);
    case 3: return launch_steps<3>(p, grid, stream);
    case 4: return launch_steps<4>(p, grid, stream);
    default: return launch_steps<5>(p, grid, stream);
  }
}
