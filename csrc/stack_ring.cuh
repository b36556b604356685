// Weights of a stack of linears on their way through shared memory: one warp has the bulk copy engine bring them, layer
// after layer, into a ring of stages that the other warps empty. Nothing but room holds it back, so weights arrive while the
// others wait for each other.
//
// A block owns neighbouring rows of each matrix. A stage holds a run along K of a strip of 16 of them, and their group
// scales.
#pragma once

#include <cstdint>

#include "linear_skinny_plan.h"
#include "stack.h"
#include "tma.cuh"

namespace quamba::stack {

constexpr int kMaxStages = 32;
constexpr int kOctet = 8;        // rows that belong to one block
constexpr int kStrip = 16;       // rows of a stage
constexpr int kRunBytes = 640;   // of a row in a stage, at most
constexpr int kParts = 2;        // shares of a stage, a warp each
constexpr int kStep = skinny::kStepBytes;

// A matrix of every layer.
struct Matrix {
  int O, K, row_bytes, steps;  // steps of 64 bytes
  int runs, run_steps;         // equal runs
  int pitch;                   // between rows of a stage: an odd multiple of 64 bytes, so that two rows share no bank
  int scale_bytes;             // group scales of a row, one a step
};

// What a block has of it.
struct Share {
  int first, rows;

  __device__ __forceinline__ Share(const Matrix& m) {
    const int octets = m.O / kOctet;
    const int begin = static_cast<int>(static_cast<int64_t>(octets) * blockIdx.x / gridDim.x);
    const int end = static_cast<int>(static_cast<int64_t>(octets) * (blockIdx.x + 1) / gridDim.x);
    first = begin * kOctet, rows = (end - begin) * kOctet;
  }

  __device__ __forceinline__ int strips() const { return (rows + kStrip - 1) / kStrip; }
};

// `count` stages; stage n of the whole run of a kernel lies in slot n % count.
struct Ring {
  uint32_t full, empty;  // barriers
  char* stages;
  int count, bytes;

  __device__ __forceinline__ void init() const {
    for (int s = 0; s < count; ++s) init_barrier(full + 8 * s, 1), init_barrier(empty + 8 * s, kParts);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
};

// A place in the ring: its slot, and the parity of its round.
struct Stage {
  int slot;
  unsigned parity;

  // `by` at most the ring's stages
  __device__ __forceinline__ void advance(const Ring& ring, int by) {
    slot += by;
    if (slot >= ring.count) slot -= ring.count, parity ^= 1;
  }
};

// How L2 is to treat the weights: they are read once.
__device__ __forceinline__ uint64_t evict_first() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

__device__ __forceinline__ void bulk_copy(uint32_t to, const void* from, int bytes, uint32_t barrier, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
          to),
      "l"(from), "r"(bytes), "r"(barrier), "l"(policy)
      : "memory");
}

// Ask L2 for elements that lie side by side from a multiple of 16 bytes on.
__device__ __forceinline__ void ask_for(const void* data, int count, int element) {
  if (data)
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(data), "r"((count * element + 15) / 16 * 16) : "memory");
}

// A warp brings what the block has of a matrix, from `stage` on. Slots are free in the first round.
__device__ __forceinline__ void bring(const Ring& ring, const Matrix& m, const Share& share, const void* w,
                                      const void* scales, Stage& stage) {
  const int lane = threadIdx.x % 32;
  const uint64_t policy = evict_first();
#pragma unroll 1
  for (int first = 0; first < share.rows; first += kStrip) {
    const int row = share.first + first, rows = min(kStrip, share.rows - first);
#pragma unroll 1
    for (int run = 0; run < m.runs; ++run, stage.advance(ring, 1)) {
      const int bytes = m.run_steps * kStep, at = run * bytes;
      const uint32_t full = ring.full + 8 * stage.slot, to = shared_address(ring.stages + stage.slot * ring.bytes);
      wait(ring.empty + 8 * stage.slot, stage.parity ^ 1);
      if (lane == 0) arrive_expecting(full, rows * (bytes + m.scale_bytes));
      __syncwarp();
      if (lane < rows)
        bulk_copy(to + lane * m.pitch, static_cast<const char*>(w) + static_cast<int64_t>(row + lane) * m.row_bytes + at,
                  bytes, full, policy);
      if (lane == kStrip && m.scale_bytes)
        bulk_copy(to + kStrip * m.pitch, static_cast<const char*>(scales) + static_cast<int64_t>(row) * m.scale_bytes,
                  rows * m.scale_bytes, full, policy);
    }
  }
}

}  // namespace quamba::stack
