// What the SSD scan makes of its inputs chunk by chunk: B and C as operands in fp16, once for all heads of a group, and
// dt as decays and weights.
#include "ssd_scan_steps.cuh"

namespace quamba::ssd {
namespace {

constexpr int kThreads = 128, kHeads = 16;  // of a block that turns to dt: a sector holds so many

// Blocks of a slot: B and C of each group, then kHeads heads each.
template <int N, int Tokens>
__global__ void __launch_bounds__(kThreads) operands(const __grid_constant__ Params p) {
  constexpr int kPieces = Tokens * N / 8, kEach = (kPieces + kThreads - 1) / kThreads;  // of 16 bits
  __shared__ float most[kThreads / 32];
  const QuambaSsdScan& a = p.a;
  launch_dependents();
  wait_for_previous_kernel();
  const int blocks = 2 * a.G + (a.H - 1) / kHeads + 1, block = blockIdx.x % blocks;
  const long long slot = blockIdx.x / blocks;
  const long long states = static_cast<long long>(a.sequences) * a.H * (p.cuts - 1);
  const long long threads = static_cast<long long>(gridDim.x) * kThreads;
  for (long long i = static_cast<long long>(blockIdx.x) * kThreads + threadIdx.x; i < states; i += threads)
    p.flags[i] = 0;
  const Place place = place_of<Tokens>(a, slot);
  if (place.first >= place.end) return;
  if (block >= 2 * a.G) {
    const int first = (block - 2 * a.G) * kHeads + threadIdx.x / 32;
#pragma unroll
    for (int i = 0; i < kHeads; i += kThreads / 32)
      if (first + i < a.H) steps<Tokens>(p, place, slot, first + i);
    return;
  }
  const bool is_c = block % 2;
  const int group = block / 2;
  const long long batch = place.batch, first = place.first, end = place.end;

  const int type = is_c ? a.c_dtype : a.b_dtype, size = size_of(type);
  const long long token = is_c ? a.c_token : a.b_token;
  const long long row = is_c ? batch * a.c_batch + group * a.c_group : batch * a.b_batch + group * a.b_group;
  const unsigned char* from = static_cast<const unsigned char*>(is_c ? a.c : a.b) + (row + first * token) * size;
  const long long at = (slot * a.G + group) * 2 + is_c;
  unsigned char* to = const_cast<unsigned char*>(p.operands) + at * kOperand<N, Tokens>;
  int* exponent = const_cast<int*>(p.exponents) + at;
  auto load = [&](int row, int piece) {
    return first + row < end ? __ldcg(reinterpret_cast<const uint4*>(from + row * token * size) + piece)
                             : make_uint4(0, 0, 0, 0);
  };
  if (type == QUAMBA_I8) {
    constexpr int kOfCodes = N / 16;
#pragma unroll
    for (int i = threadIdx.x; i < kPieces / 2; i += kThreads)
      store_codes<Tokens>(to, i / kOfCodes, i % kOfCodes, load(i / kOfCodes, i % kOfCodes));
    if (threadIdx.x == 0) *exponent = 0;
    return;
  }
  uint4 v[kEach];
  float largest = 0.f;
#pragma unroll
  for (int k = 0; k < kEach; ++k) {
    const int i = threadIdx.x + k * kThreads;
    v[k] = i < kPieces ? load(i / (N / 8), i % (N / 8)) : make_uint4(0, 0, 0, 0);
    largest = fmaxf(largest, largest_of(v[k], type));
  }
  const int e = scale_of(block_reduce(largest, most, [](float x, float y) { return fmaxf(x, y); }));
#pragma unroll
  for (int k = 0; k < kEach; ++k) {
    const int i = threadIdx.x + k * kThreads, piece = i % (N / 8);
    if (i < kPieces)
      *reinterpret_cast<uint4*>(to + place_in<Tokens>(i / (N / 8), piece / 2, piece % 2)) =
          scaled_halves(v[k], type, power_of_two(-e));
  }
  if (threadIdx.x == 0) *exponent = e;
}

template <int N, int Tokens>
int launch_chunks(const Params& p, void* stream) {
  const long long grid = p.slots * (2 * p.a.G + (p.a.H - 1) / kHeads + 1);
  if (grid > 0x7fffffffLL) return QUAMBA_UNSUPPORTED;
  return grid ? launch(operands<N, Tokens>, p, dim3(static_cast<unsigned>(grid)), kThreads, stream) : QUAMBA_OK;
}

}  // namespace

int launch_operands(const Params& p, int tokens, void* stream) {
  switch (p.a.N) {
    case 16: return launch_chunks<16, 64>(p, stream);
    case 32: return launch_chunks<32, 64>(p, stream);
    case 64: return launch_chunks<64, 64>(p, stream);
    case 128: return tokens == 64 ? launch_chunks<128, 64>(p, stream) : launch_chunks<128, 32>(p, stream);
    case 256: return launch_chunks<256, 32>(p, stream);
    default: return QUAMBA_UNSUPPORTED;
  }
}

}  // namespace quamba::ssd
