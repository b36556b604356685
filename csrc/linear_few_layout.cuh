// What a block of linear_few has in shared memory, and what the kernel is like for each type and number of tokens.
#pragma once

#include <algorithm>

#include "linear_few_finish.cuh"
#include "linear_few_plan.h"

namespace quamba::few {

// What a block has room for, of the cells that it receives, from itself too: its share of each of the splits, in as many
// parts as the columns of a step are folded.
constexpr int mail_bytes(int tokens, int splits, int folds) {
  return ((tokens + 7) / 8 * (kTileO / 32 / folds) + splits - 1) / splits * splits * folds * kCellBytes;
}

constexpr int most_mail(int tokens, int folds) {
  int most = 0;
  for (int splits = 1; splits <= kMaxSplits; ++splits) most = std::max(most, mail_bytes(tokens, splits, folds));
  return most;
}

// How a launch is cut. inverse: 2^16 / splits rounded up. halves: those of a step may lie in two groups.
struct Cut {
  int stages, mail, scales, inverse;  // mail, scales: bytes of a block and of a stage
  bool halves, overlaid;

  __device__ __forceinline__ int split(int n) const { return n * inverse >> 16; }  // n / splits, n below 2^13
};

// kBlocks: at most so many on a multiprocessor, for their registers; how many there are is a matter of their memory.
// kOverlaid: cells arrive where the stages were, once all blocks of the cluster are done with theirs; kMayOverlay: or
// where there is no room for both, or a block has many more steps than it has stages otherwise.
// kOrdered: the loading warp puts int8 x in the order in which codes lie in a word, which spares half the unpacking;
// with more tokens, or for a folded tile, whose blocks have few steps, it comes too late. It adds x up, too, for weights
// that are multiplied as unsigned numbers. kWhole: a lane has whole words (operand_w4.cuh). kGrouped: products of codes,
// which groups scale, by mma.sync (linear_few_grouped.cuh); kSummed: by wgmma.
// kPiece: columns that are unpacked at a time, as registers allow. kAlone: a warp waits for each product, and has
// registers for one piece; others are at work meanwhile. kAhead: stages whose loads are issued by code of their own,
// which is faster where it is in the caches: in a chain of the kernel, as few tokens have, but not behind a long one.
// Form: kThree blocks of 64 tokens on a multiprocessor; or a tile is kFold times as many columns, each part of which has
// a warpgroup, by as much fewer channels: more tiles, which smaller clusters share, fill multiprocessors more evenly.
enum class Form { kPlain, kThree, kFolded };

template <class Element, bool Packed, int TileM, Form kForm = Form::kPlain>
struct Layout {
  static constexpr bool kDense = kForm == Form::kThree;
  static_assert(!kDense || Packed && TileM == 64);
  static constexpr int kFold = kForm == Form::kFolded ? 2 : 1, kChannels = kTileO / kFold, kColumns = kTileK * kFold;
  static_assert(kFold == 1 || Packed && TileM <= 16);
  static constexpr bool kHalf = sizeof(Element) == 2;
  static constexpr bool kOverlaid = TileM == 128;
  static constexpr bool kMayOverlay = TileM == 64 && (kDense || !Packed || !kHalf);
  static constexpr bool kGrouped = Packed && kHalf && TileM == 8;
  static constexpr bool kSummed = Packed && kHalf && TileM == 16;
  static constexpr bool kOrdered = Packed && !kHalf && TileM <= 16 && kFold == 1;
  static constexpr bool kWhole = Packed && kHalf || kOrdered;
  static constexpr bool kAlone = kHalf && kDense;
  static constexpr int kPiece = kDense || (kHalf ? TileM == 16 || TileM == 32 : TileM == 128) ? 32 : 64;
  static constexpr int kBlocks =
      kSummed ? 4 : TileM < 64 || TileM == 64 && (kDense || !Packed) ? 3 : TileM == 64 || !kHalf ? 2 : 1;
  static constexpr int kAhead = TileM > 16 ? 1 : 4;
  static constexpr int kWBytes = kTileO * kTileK / (Packed ? 2 : 1);
  static constexpr int kXBytes = TileM * kColumns * static_cast<int>(sizeof(Element));
  static constexpr int kMaxStages = 10;
  static constexpr int kBarrierBytes = 8 * (2 + (kOrdered ? 4 : 2) * kMaxStages) + (kOrdered ? TileM * 4 : 0);  // and sums
  static_assert(!kOverlaid && !kMayOverlay || 3 * (kWBytes + kXBytes) >= most_mail(TileM, kFold),
                "a plan has three stages");

  static constexpr int shared_bytes(int blocks) { return (228 / blocks - 1) * 1024; }  // the system takes 1 KB of each
  static constexpr int scale_bytes(bool halves) { return Packed ? (halves ? 2 : 1) * kTileO * 4 : 0; }
  // 1 KB aligns what TMA writes
  static constexpr int stages(int blocks, int mail, bool halves, bool overlaid = kOverlaid) {
    const int room = shared_bytes(blocks) - (overlaid ? 0 : mail) - kBarrierBytes - 1024;
    return std::min(room / (kWBytes + kXBytes + scale_bytes(halves)), kMaxStages);
  }
};

}  // namespace quamba::few
