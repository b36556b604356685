// What heads of a group share in the SSD scan on Hopper, chunk by chunk, and dt as decays and weights.
#include "ssd_chunks_sm90.cuh"

namespace quamba::ssd::hopper {
namespace {

constexpr int kThreads = kSharingThreads, kHeads = 16;  // of a block that turns to dt: a sector holds so many
constexpr unsigned kRehearsals = 256;       // blocks: each multiprocessor's first ones

// B and C of a group as operands, and their products, at place ``at`` of all. Not real: nothing of it is left.
__device__ __forceinline__ void share(const Params& p, const Place& place, long long at, int group,
                                      unsigned char* shared, bool real) {
  constexpr int kPieces = kTokens * kN / 8, kEach = kPieces / kThreads;  // of 16 bits
  __shared__ float most[3][kThreads / 32];
  const QuambaSsdScan& a = p.a;
  auto greatest = [](float x, float y) { return fmaxf(x, y); };
  int exponents[2];
#pragma unroll
  for (int is_c = 0; is_c < 2; ++is_c) {
    const int type = is_c ? a.c_dtype : a.b_dtype, size = size_of(type);
    const long long token = is_c ? a.c_token : a.b_token;
    const long long row = (is_c ? place.batch * a.c_batch + group * a.c_group
                                : place.batch * a.b_batch + group * a.b_group) + place.first * token;
    const unsigned char* from = static_cast<const unsigned char*>(is_c ? a.c : a.b) + row * size;
    auto load = [&](int row, int piece) {
      return place.first + row < place.end ? __ldcg(reinterpret_cast<const uint4*>(from + row * token * size) + piece)
                                           : make_uint4(0, 0, 0, 0);
    };
    unsigned char* const operand = shared + is_c * kOperands;
    if (type == QUAMBA_I8) {
      uint4 v[kEach / 2];
#pragma unroll
      for (int k = 0; k < kEach / 2; ++k) v[k] = load((threadIdx.x + k * kThreads) / 8, threadIdx.x % 8);
#pragma unroll
      for (int k = 0; k < kEach / 2; ++k)
        store_codes<kTokens>(operand, (threadIdx.x + k * kThreads) / 8, threadIdx.x % 8, v[k]);
      exponents[is_c] = 0;
    } else {
      uint4 v[kEach];
      float largest = 0.f;
#pragma unroll
      for (int k = 0; k < kEach; ++k) v[k] = load((threadIdx.x + k * kThreads) / 16, threadIdx.x % 16);
#pragma unroll
      for (int k = 0; k < kEach; ++k) largest = fmaxf(largest, largest_of(v[k], type));
      const int e = scale_of(block_reduce(largest, most[is_c], greatest)), piece = threadIdx.x % 16;
#pragma unroll
      for (int k = 0; k < kEach; ++k) {
        const int row = (threadIdx.x + k * kThreads) / 16;
        *reinterpret_cast<uint4*>(operand + place_in<kTokens>(row, piece / 2, piece % 2)) =
            scaled_halves(v[k], type, power_of_two(-e));
      }
      exponents[is_c] = e;
    }
  }
  share_products(p, at, shared, most[2], {exponents[0], exponents[1]}, real);
}

// Blocks of a slot: one for each group, then kHeads heads each. What takes longest is to fetch instructions, so the
// first blocks go through the motions once, for an empty place, before their turn comes.
__global__ void __launch_bounds__(kThreads) ssd_chunks(const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) unsigned char shared[];
  const QuambaSsdScan& a = p.a;
  const int blocks = a.G + (a.H - 1) / kHeads + 1, block = blockIdx.x % blocks;
  const long long slot = blockIdx.x / blocks;
  launch_dependents();
#pragma unroll 1
  for (int real = blockIdx.x < kRehearsals ? 0 : 1; real < 2; ++real) {
    Place place{0, 0, 0};
    if (real) {
      wait_for_previous_kernel();
      const long long states = static_cast<long long>(a.sequences) * a.H * (p.cuts - 1);
      const long long threads = static_cast<long long>(gridDim.x) * kThreads;
      for (long long i = static_cast<long long>(blockIdx.x) * kThreads + threadIdx.x; i < states; i += threads)
        p.flags[i] = 0;
      place = place_of<kTokens>(a, slot);
      if (place.first >= place.end) return;
    }
    if (block >= a.G) {
      const int first = (block - a.G) * kHeads + threadIdx.x / 32;
#pragma unroll
      for (int i = 0; i < kHeads; i += kThreads / 32)
        if (first + i < a.H) steps<kTokens, true>(p, place, slot, first + i, real);
    } else {
      share(p, place, slot * a.G + block, block, shared, real);
      __syncthreads();  // what is shared has been read
    }
  }
}

}  // namespace

int launch_inputs(const Params& p, void* stream) {
  const long long grid = p.slots * (p.a.G + (p.a.H - 1) / kHeads + 1);
  if (grid > 0x7fffffffLL) return QUAMBA_UNSUPPORTED;
  const int shared = 2 * kOperands;
  return grid ? launch(ssd_chunks, p, dim3(static_cast<unsigned>(grid)), kThreads, stream, shared) : QUAMBA_OK;
}

}  // namespace quamba::ssd::hopper
