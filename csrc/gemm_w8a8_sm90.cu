// y = (x w^T) * x_scale * w_scale + bias + residual for many rows on Hopper: which tile serves a problem fastest.
#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <limits>

#include "finish.cuh"
#include "gemm_w8a8_choice.h"

namespace quamba::w8a8 {

using Families = Choices (*[])();
constexpr Families kFamilies = {large_tiles, wide_tiles, small_tiles, split_tiles};

int multiprocessors() {
  int device = 0, count = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess)
    return 0;
  return count;
}

// Estimated cycles: whole waves of tiles, or for stream-K the tiles' work spread evenly. In a pingpong two tiles share
// a multiprocessor, and what follows the last main loop shows. An epilogue takes as long as its bytes.
float cycles(const Choice& c, const QuambaLinear& a, int sms) {
  auto up = [](long long n, long long d) { return (n + d - 1) / d; };
  auto bytes = [](int type) { return type == QUAMBA_F32 ? 4 : 2; };
  long long rows = up(up(a.M, c.tile_m), c.cluster) * c.cluster, tiles = rows * up(a.O, c.tile_n);
  float tile = up(a.K, 128) * 128.f * c.tile_m * c.tile_n / (4096.f * c.rate);
  float moved = (a.out_scale ? 2 : bytes(a.y_dtype)) + (a.residual ? bytes(a.residual_dtype) : 0), more = moved / 2.f;
  if (c.kind == 's') {
    float sum = 2 * tiles < sms ? 20000.f : 4000.f;  // the fewer the tiles, the more blocks add to one in turn
    return tile * tiles / sms + more * c.extra * up(tiles, sms) + sum;
  }
  long long waves = up(tiles, sms / c.cluster * c.cluster);
  if (c.kind == 'n' && (waves > 1 || a.residual)) return std::numeric_limits<float>::infinity();
  if (c.kind == 'p' || c.kind == 'n') {
    float finish = more * c.tile_m * c.tile_n / 4.f;
    return waves * std::max(tile + c.extra, (tile + finish) / 2.f) + finish;
  }
  return waves * (tile + more * c.extra);
}

#ifdef QUAMBA_TUNE
const Choice* tile_at(int i) {
  for (auto family : kFamilies)
    for (const Choice& c : family())
      if (i-- == 0) return &c;
  return nullptr;
}
#endif

const Choice& best(const QuambaLinear& a, int sms) {
#ifdef QUAMBA_TUNE
  if (const char* forced = std::getenv("QUAMBA_TILE"))
    if (const Choice* c = tile_at(std::atoi(forced))) return *c;
#endif
  const Choice* found = large_tiles().begin();
  for (auto family : kFamilies)
    for (const Choice& c : family())
      if (cycles(c, a, sms) < cycles(*found, a, sms)) found = &c;
  return *found;
}

bool serves(const QuambaLinear& a) {
  return a.x_dtype == QUAMBA_I8 && a.x_scale && a.w_scale && a.K > 0 && a.K % 32 == 0 && quamba::can_finish(a);
}

}  // namespace quamba::w8a8

extern "C" long long quamba_linear_w8a8_gemm_workspace(const QuambaLinear* a) {
  using namespace quamba::w8a8;
  int sms = serves(*a) ? multiprocessors() : 0;
  return sms ? best(*a, sms).workspace(*a, sms) : 0;
}

extern "C" int quamba_linear_w8a8_gemm(const QuambaLinear* a, void* stream) {
  using namespace quamba::w8a8;
  if (!serves(*a)) return QUAMBA_UNSUPPORTED;
  int sms = multiprocessors();
  if (!sms) return cudaErrorInvalidDevice;
  return best(*a, sms).launch(*a, sms, static_cast<cudaStream_t>(stream));
}

#ifdef QUAMBA_TUNE
extern "C" int quamba_linear_w8a8_gemm_tiles() {
  int count = 0;
  while (quamba::w8a8::tile_at(count)) ++count;
  return count;
}
extern "C" void quamba_linear_w8a8_gemm_tile(int i, int* out) {
  const auto& c = *quamba::w8a8::tile_at(i);
  out[0] = c.tile_m, out[1] = c.tile_n, out[2] = c.cluster, out[3] = c.kind;
}
#endif
