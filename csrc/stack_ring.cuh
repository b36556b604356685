// Weights of a stack of linears on their way through shared memory: one warp has the bulk copy engine bring them, layer
// after layer, into a ring of stages that the other warps empty. Where the ring has no room, memory does not stand still:
// another warp asks L2 for the next stages. So weights arrive while the others wait for each other.
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
constexpr int kStageBytes = 16384;  // of rows in a stage, at most
constexpr int kLead = 8;            // stages that L2 is asked for ahead of the ring, at most
constexpr int kAskPace = 82;        // percent of a layer's time for that: from 90 on a late layer makes the next one later
constexpr int kShares = 16;         // of a stage in arrivals of those who have used it
constexpr int kStep = skinny::kStepBytes;
constexpr int kBarrierBytes = 16 * kMaxStages + 128;  // the ring's barriers and counts, and a few of others

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
  uint32_t full, empty;     // barriers
  uint32_t asked, brought;  // counts of stages: that L2 has been asked for, that are on their way from there
  char* stages;
  int count, bytes;

  __device__ __forceinline__ Ring(char* shared, int count, int bytes)
      : full(shared_address(shared)),
        empty(full + 8 * kMaxStages),
        asked(full + 16 * kMaxStages),
        brought(asked + 4),
        stages(shared + kBarrierBytes),
        count(count),
        bytes(bytes) {}

  __device__ __forceinline__ uint32_t other_barrier(int i) const { return asked + 8 + 8 * i; }

  __device__ __forceinline__ void init() const {
    for (int s = 0; s < count; ++s) init_barrier(full + 8 * s, 1), init_barrier(empty + 8 * s, kShares);
    asm volatile("st.shared.v2.u32 [%0], {%1, %1};" ::"r"(asked), "r"(0) : "memory");
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
  if (data && count > 0) prefetch_bulk(data, (count * element + 15) / 16 * 16);
}

// Copies at even distances. What blocks pass on waits in L2 behind copies that have not been answered yet, so that those must
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

// What is copied of a block's share of a matrix: some stages, one after another.
struct Copies {
  const char *w, *scales;
  int bytes, scale_bytes, stages;

  __device__ __forceinline__ Copies(const Matrix& m, int first, int rows, const void* w, const void* scales)
      : w(static_cast<const char*>(w) + static_cast<int64_t>(first) * m.row_bytes),
        scales(static_cast<const char*>(scales) + static_cast<int64_t>(first) * m.scale_bytes),
        bytes(m.row_bytes << m.stage_rows_log),
        scale_bytes(m.scale_bytes << m.stage_rows_log),
        stages(rows >> m.stage_rows_log) {}
};

// Counts by which two warps keep step.
__device__ __forceinline__ void publish(uint32_t count) {
  asm volatile("red.relaxed.cta.shared::cta.add.u32 [%0], 1;" ::"r"(count) : "memory");
}

__device__ __forceinline__ void await_more(uint32_t count, int than) {
  int v;
  do {
    asm volatile("ld.relaxed.cta.shared::cta.u32 %0, [%1];" : "=r"(v) : "r"(count) : "memory");
  } while (v <= than);
}

// A warp that asks L2 for stages, or brings them to the ring once the other has asked. All of its lanes go through the motions:
// copies of a lane that the compiler does not know to be one take three times the instructions, and those hold up the next.
template <bool ASK, bool SCALES>
struct Courier {
  Stage stage{0, 0};
  Pace pace;
  int number = 0;
  uint64_t policy = evict_first();

  // Slots are free in the first round.
  __device__ __forceinline__ void carry(const Ring& ring, Copies c) {
#pragma unroll 1
    for (; c.stages > 0; --c.stages) {
      if constexpr (ASK) {
        await_more(ring.brought, number - kLead);
        pace.keep();
        if (elected()) {
          prefetch_bulk(c.w, c.bytes);
          if (SCALES) prefetch_bulk(c.scales, c.scale_bytes);
          publish(ring.asked);
        }
      } else {
        const uint32_t full = ring.full + 8 * stage.slot, to = shared_address(ring.stages) + stage.slot * ring.bytes;
        wait(ring.empty + 8 * stage.slot, stage.parity ^ 1);
        await_more(ring.asked, number);
        pace.keep();
        if (elected()) {
          arrive_expecting(full, c.bytes + c.scale_bytes);
          bulk_copy(to, c.w, c.bytes, full, policy);
          if (SCALES) bulk_copy(to + c.bytes, c.scales, c.scale_bytes, full, policy);
          publish(ring.brought);
        }
        if (++stage.slot == ring.count) stage.slot = 0, stage.parity ^= 1;
      }
      ++number, c.w += c.bytes, c.scales += c.scale_bytes;
    }
  }
};

}  // namespace quamba::stack
