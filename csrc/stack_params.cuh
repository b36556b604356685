// What the kernel over a stack of Mamba2 blocks (ssd_stack.cuh) is given.
#pragma once

#include "decode_state.cuh"
#include "hadamard.cuh"
#include "stack_products.cuh"

namespace quamba::stack {

using decode::Row;

constexpr int kThreads = kTeam + 128;  // registers are handed over by groups of four warps
// Of a thread of the team, and of the others: together what a launch of kThreads gets, 96 each.
constexpr int kManyRegisters = 112, kFewRegisters = 32;
static_assert(kTeam * kManyRegisters + 128 * kFewRegisters <= 96 * kThreads, "more registers than there are");
constexpr int kN = 128, kMostRows = 64;  // d_state; rows of the state that a block has, at most
constexpr int kQuads = 4;                // of a row of activations that a thread has, at most
constexpr int kRun = 128;                // channels of a warp's quads
constexpr int kMostLayers = 64;
constexpr int kScratch = 2 * kWarps;  // floats
constexpr int kAhead = 8;             // blocks that may be missing when all begin to ask, where all have rows

// Groups of a norm: how many, runs of kRun channels in each (a power of two where there are several), 1 / their channels.
struct Groups {
  int count, runs;
  float share;
};

struct Params {
  QuambaDecode mixer;
  Matrix matrix[2];    // in_proj, out_proj
  const float* x;      // the residual stream
  float* y;
  unsigned* projected;  // what in_proj makes: 16 bits, and 16 of the layer's number
  float* u;             // what the mixer makes, before its norm; the last bit is the parity of the layer's number
  float* residual;      // likewise
  unsigned* counts;     // blocks that have passed on u, or the residual, in all layers together
  Groups groups[2];    // of the norms before them
  Rotation rotation;
  int layers;
  int rows, blocks;    // of the state: of a block; blocks of a group
  int stages, stage_bytes, x_bytes, sums_bytes, row_floats;
  int ahead;
  int ask_pace, pace;  // percent of a layer's time, for asking L2 for its weights and for bringing them
  float eps;
  QuambaStackLayer layer[kMostLayers];
};

}  // namespace quamba::stack
