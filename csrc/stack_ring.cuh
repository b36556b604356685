// Weights of a stack of linears on their way through shared memory: one warp has the bulk copy engine bring them, layer
// after layer, into a ring of stages that the other warps empty. Nothing but room holds it back, so weights arrive while the
// others wait for each other.
//
// A block owns neighbouring rows of each matrix. A stage holds a few of them, whole and as they lie in memory, so that one copy
// brings them, and their group scales. Sixteen rows, a strip, are multiplied together: two to eight stages.
#pragma once

#include <cstdint>

#include "linear_skinny_plan.h"
#include "stack.h"
#include "tma.cuh"

namespace quamba::stack {

constexpr int kMaxStages = 32;
constexpr int kOctet = 8;           // rows that belong to one block
constexpr int kStrip = 16;          // rows that are multiplied together
constexpr int kStageBytes = 10240;  // of rows in a stage, at most
constexpr int kShares = 16;         // of a stage in arrivals of those who have used it
constexpr int kStep = skinny::kStepBytes;

// A matrix of every layer.
struct Matrix {
  int O, K, row_bytes, steps;  // steps of 64 bytes
  // powers of two, by their logarithms: numbers of the launch are divided by them in every turn
  int stage_rows_log, strip_stages_log;
  int parts_log;    // of K, a warp each
  int scale_bytes;  // group scales of a row, one a step

  __host__ __device__ __forceinline__ int stage_rows() const { return 1 << stage_rows_log; }
  __host__ __device__ __forceinline__ int strip_stages() const { return 1 << strip_stages_log; }
  __host__ __device__ __forceinline__ int parts() const { return 1 << parts_log; }
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
};

// `count` stages, an even number; stage n of the whole run of a kernel lies in slot n % count. Slots are an odd multiple of 64
// bytes apart, so that rows of neighbours share no bank.
struct Ring {
  uint32_t full, empty;  // barriers
  char* stages;
  int count, bytes;

  __device__ __forceinline__ void init() const {
    for (int s = 0; s < count; ++s) init_barrier(full + 8 * s, 1), init_barrier(empty + 8 * s, kShares);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
};

// A place in the ring: its slot, and the parity of its round. That tells two rounds apart and no more, so who waits for a stage
// has to have seen the one before it in its slot: another that came later does not do, since copies end out of order.
struct Stage {
  int slot;
  unsigned parity;

  __device__ __forceinline__ void advance(const Ring& ring, int by) {
    for (slot += by; slot >= ring.count; slot -= ring.count) parity ^= 1;
  }
};

// Ask L2 for elements that lie side by side from a multiple of 16 bytes on.
__device__ __forceinline__ void ask_for(const void* data, int count, int element) {
  if (data && count > 0)
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(data), "r"((count * element + 15) / 16 * 16)
                 : "memory");
}

// Copies at even distances. What blocks pass on waits in L2 behind copies that memory has not answered yet, so that those must
// not all be asked for when a turn has emptied the ring: they are spread over a layer's time, as the one before has shown it.
// A layer that something else has held up is not taken for one.
struct Pace {
  static constexpr unsigned kMost = 4096;
  unsigned cycles = 0, next, began;

  __device__ __forceinline__ Pace() { next = began = clock(); }

  // At the begin of a layer of so many copies.
  __device__ __forceinline__ void measure(unsigned copies, unsigned percent) {
    const unsigned now = clock();
    cycles = min((now - began) / 100 * percent / copies, kMost), began = now;
  }

  __device__ __forceinline__ void keep() {
    unsigned now = clock();
    while (next - now - 1 < cycles) now = clock();  // false, too, where the clock has jumped
    next = now + cycles;
  }
};

// A lane brings what the block has of a matrix, from `stage` on. Slots are free in the first round.
__device__ __forceinline__ void bring(const Ring& ring, const Matrix& m, const Share& share, const void* w,
                                      const void* scales, Stage& stage, Pace& pace) {
  const char* from = static_cast<const char*>(w) + static_cast<int64_t>(share.first) * m.row_bytes;
  const char* of_scales = static_cast<const char*>(scales) + static_cast<int64_t>(share.first) * m.scale_bytes;
  const int bytes = m.row_bytes << m.stage_rows_log, scale_bytes = m.scale_bytes << m.stage_rows_log;
#pragma unroll 1
  for (int row = 0; row < share.rows; row += m.stage_rows()) {
    const uint32_t full = ring.full + 8 * stage.slot, to = shared_address(ring.stages + stage.slot * ring.bytes);
    wait(ring.empty + 8 * stage.slot, stage.parity ^ 1);
    pace.keep();
    arrive_expecting(full, bytes + scale_bytes);
    bulk_copy(to, from, bytes, full);
    if (scale_bytes) bulk_copy(to + bytes, of_scales, scale_bytes, full);
    stage.advance(ring, 1), from += bytes, of_scales += scale_bytes;
  }
}

}  // namespace quamba::stack
