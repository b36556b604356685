// What x_proj gives, [dt | B | C], as codes in one pass: dt with a scale for each token, in the order of scan_rates.cu,
// B and C with one each. A warp has two tokens, a lane eight neighbours of each.
#include "launch.cuh"
#include "quads.cuh"
#include "scan.h"

namespace {

using namespace quamba;

constexpr int kWarps = 8, kOctet = 8;

template <int X>
__global__ void __launch_bounds__(32 * kWarps) scan_codes(const __grid_constant__ QuambaScanCodes a) {
  const int lane = threadIdx.x % 32, ranks = a.rank / kOctet, columns = a.N / kOctet;  // in octets
  const int all = ranks + 2 * columns, batch = blockIdx.y;
  const long long pair = static_cast<long long>(blockIdx.x) * kWarps + threadIdx.x / 32, blocks = (a.T - 1) / 16 + 1;
  launch_dependents();
  wait_for_previous_kernel();
  if (2 * pair >= a.T) return;
  RawOctet raw[2] = {};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const long long row = batch * a.T + 2 * pair + i;
    if (lane >= all || 2 * pair + i >= a.T) continue;
    const auto* x = reinterpret_cast<const uint4*>(static_cast<const char*>(a.x) + row * all * kOctet * size_of(X));
    raw[i].low = __ldcg(x + lane * size_of(X) / 2);
    if (X == QUAMBA_F32) raw[i].high = __ldcg(x + 2 * lane + 1);
  }
  uint2 codes[2];
  float scales[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const Octet v = octet_of(raw[i], X);
    auto largest = [](float4 q) { return fmaxf(fmaxf(fabsf(q.x), fabsf(q.y)), fmaxf(fabsf(q.z), fabsf(q.w))); };
    float scale = lane < ranks ? fmaxf(largest(v.low), largest(v.high)) : 0.f;
#pragma unroll
    for (int step = 16; step; step /= 2) scale = fmaxf(scale, __shfl_xor_sync(~0u, scale, step));
    scales[i] = scale = scale > 0.f ? __fdiv_rn(scale, 127.f) : 1.f;
    if (lane >= ranks && lane < all && a.columns) scale = __ldg(lane < ranks + columns ? a.b_scale : a.c_scale);
    const Grid grid = make_grid(scale);
    auto code = [&](float x, float) { return code_on(x, grid); };
    codes[i] = make_uint2(to_raw(each(code, v.low, v.low), QUAMBA_I8).x,
                          to_raw(each(code, v.high, v.high), QUAMBA_I8).x);
  }
  const long long block = batch * blocks + pair / 8;
  if (lane == 0) reinterpret_cast<float2*>(a.rank_scale)[block * 8 + pair % 8] = make_float2(scales[0], scales[1]);
  if (lane < ranks) {
    const long long at = (block * (ranks / 4) + lane / 4) * 32 + pair % 8 * 4 + lane % 4;
    static_cast<uint4*>(a.rank_codes)[at] = make_uint4(codes[0].x, codes[1].x, codes[0].y, codes[1].y);
  } else if (lane < all && a.columns) {
#pragma unroll
    for (int i = 0; i < 2; ++i)
      if (2 * pair + i < a.T)
        static_cast<uint2*>(a.columns)[(batch * a.T + 2 * pair + i) * 2 * columns + lane - ranks] = codes[i];
  }
}

}  // namespace

extern "C" int quamba_scan_codes(const QuambaScanCodes* args, void* stream) {
  const QuambaScanCodes& a = *args;
  auto octets_at = [](const void* data) { return reinterpret_cast<unsigned long long>(data) % 16 == 0; };
  if (a.B < 1 || a.B > 65535 || a.T < 1 || a.T > 0x7fffffffLL || a.rank < 32 || a.rank % 32 ||
      a.rank > QUAMBA_SCAN_RANK || a.N < kOctet || a.N % kOctet || a.rank + 2 * a.N > 32 * kOctet || !octets_at(a.x) ||
      !octets_at(a.rank_codes) || !octets_at(a.rank_scale) || !octets_at(a.columns) ||
      (a.columns && (!a.b_scale || !a.c_scale)))
    return QUAMBA_UNSUPPORTED;
  const dim3 grid(static_cast<unsigned>((a.T - 1) / (2 * kWarps) + 1), a.B);
  switch (a.x_dtype) {
    case QUAMBA_F32: return launch(scan_codes<QUAMBA_F32>, a, grid, 32 * kWarps, stream);
    case QUAMBA_F16: return launch(scan_codes<QUAMBA_F16>, a, grid, 32 * kWarps, stream);
    case QUAMBA_BF16: return launch(scan_codes<QUAMBA_BF16>, a, grid, 32 * kWarps, stream);
    default: return QUAMBA_UNSUPPORTED;
  }
}
