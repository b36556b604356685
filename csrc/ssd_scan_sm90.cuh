// The SSD scan on Hopper for heads of 64 channels and 128 states: ssd_scan.cuh with less to do for each chunk.
//
// What no head owns is made once for all of a group, by the launch before: B and C as operands, and the products C B^T
// that heads see decayed. A block takes up to two heads of a group over a segment. Four warps for each head keep its
// state; four more work ahead of them and fill a ring of chunks: the copy engine brings what heads share, the warps
// themselves x, which stays as it came until a warp holds it as a left operand, and M, the decayed C B^T.
//
// Of a sequence that is cut into segments a block first makes, from a state of zero, a piece of the states that outputs
// begin with, tells others, and then, with what the blocks before it left, makes the outputs of its segment. A state that
// only outputs read has weights of one term, one that stays has two.
#pragma once

#include "ssd_scan_steps.cuh"
#include "tma.cuh"

namespace quamba::ssd::hopper {

constexpr int kN = 128, kP = 64, kTokens = 64, kPanel = kTokens * kPitch;
constexpr int kMost = 2;    // heads of a block
constexpr int kStages = 3;  // chunks on their way
constexpr int kOperands = kOperand<kN, kTokens>;

// C B^T below and on the diagonal: blocks of 16 x 16 in fp16, as the lanes of a warp hold them. Four warps share them:
// warp w takes (w, w), (w + 1, w) or for the last warp (3, 0), and the first two (w + 2, w).
constexpr int kBlocks = 10, kBlockBytes = 512;
__device__ __forceinline__ int block_row(int turn, int warp) { return turn == 1 && warp == 3 ? 3 : warp + turn; }
__device__ __forceinline__ int block_column(int turn, int warp) { return turn == 1 && warp == 3 ? 0 : warp; }

// Of a slot and group: B, C, C B^T.
constexpr int kSlotBytes = 2 * kOperands + kBlocks * kBlockBytes;
static_assert(kSlotBytes % 1024 == 0, "operands begin where a swizzle begins");

// Floats of a head and slot: its record, and the decay up to each token.
constexpr int kHeadRecord = kRecord<kTokens> + kTokens;

inline bool serves(const QuambaSsdScan& a) { return kHopper && a.N == kN && a.P == kP; }

// Blocks of a segment of all sequences.
inline long long blocks_of(const QuambaSsdScan& a) {
  return static_cast<long long>((a.H / a.G - 1) / kMost + 1) * a.G * a.sequences;
}

int launch_inputs(const Params& p, void* stream);
int launch_scan(const Params& p, void* stream);

}  // namespace quamba::ssd::hopper
