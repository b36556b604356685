// How a linear over few tokens is cut up on Hopper: tokens of a tile, blocks that share its columns, and blocks on
// a multiprocessor.
#pragma once

#include <cmath>

#include "linear.h"

namespace quamba::few {

constexpr int kTileO = 128, kTileK = 128, kMaxSplits = 8, kMaxBlocks = 4, kTiles = 7, kFirstFolded = 5;

// Tiles are 128 channels by 128 columns, for 8, 16, 32, 64 and 128 tokens; then, for 8 and 16, folded ones.

struct Plan {
  int tokens, channels, splits, blocks;  // tokens 0: none fits
};

// Clusters of each size that run at a time, for each number of blocks on a multiprocessor.
struct Limits {
  int clusters[kMaxBlocks + 1][kMaxSplits + 1];
};

// Tiles that cover so many channels.
inline int across(int O, int channels = kTileO) { return (O + channels - 1) / channels; }

// What a plan costs, in steps of a block that is alone on its multiprocessor and has 128 channels and at most 64 tokens:
// a step of 128 tokens or of a folded tile; the first bytes' way from memory, once a wave; each block more beside it; how
// far the fullest multiprocessor counts where blocks are shared out unevenly; a sum over the cluster, for each of its
// blocks; a block that may share.
struct Rates {
  float other, wave, crowd, uneven, split, block;
};

// Whether tiles of 128 tokens may serve. They fill shared memory where x has 16 bits, so that the next kernel of a step
// finds no room beside them: there only beyond 128 tokens, where the choice is between them and the GEMM.
inline bool may_be_wide(const QuambaLinear& a) { return a.M > (a.x_dtype == QUAMBA_I8 ? 64 : 128); }

// Whether a wide linear over int4 weights has three blocks of 64 tokens on a multiprocessor: with so many tiles that two
// would be shared out unevenly, for int8 x so few that they take one wave, and so many that what follows, which finds no
// room beside three, loses less.
inline bool dense(const QuambaLinear& a, bool packed, int multiprocessors) {
  if (!packed || a.M <= 32 || a.M > 64) return false;
  const int tiles = across(a.O);
  if (a.x_dtype != QUAMBA_I8) return 5 * tiles > 3 * multiprocessors;
  return 4 * tiles > 3 * multiprocessors && tiles <= 3 * multiprocessors;
}

// Whether tiles of fewer channels are worth a look: only as long as the others are not several a multiprocessor.
inline bool may_fold(const QuambaLinear& a, bool packed, int multiprocessors) {
  return packed && a.M <= 16 && across(a.O) <= multiprocessors;
}

// Fitted to the times of all plans on an H100.
inline Rates rates(const QuambaLinear& a, bool packed, bool three) {
  const bool codes = a.x_dtype == QUAMBA_I8;
  if (three) return codes ? Rates{0.f, 0.3f, 0.5f, 0.15f, 0.06f, 0.65f} : Rates{0.f, 0.6f, 0.44f, 0.15f, 0.04f, 2.f};
  if (packed && a.M <= 16 && a.M > 8 && !codes) return {0.f, 6.f, 0.75f, 0.f, 0.15f, 1.3f};
  if (packed && a.M <= 16) return {0.f, 17.f, 0.85f, 0.f, 0.08f, 0.65f};
  if (!packed && may_be_wide(a)) return {1.72f, 27.f, 1.39f, 1.f, 0.63f, 11.1f};
  if (!packed) return {0.f, 4.f, 0.5f, 0.f, 0.1f, 2.f};
  if (!may_be_wide(a)) return {0.f, 4.f, 0.15f, 0.f, 0.8f, 0.25f};
  return codes ? Rates{1.7f, 8.f, 0.6f, 0.2f, 0.8f, 0.3f} : Rates{1.3f, 4.4f, 0.67f, 1.f, 0.93f, 0.4f};
}

// The same where tiles may be folded, for those that are and those that are not.
inline Rates rates_beside_folded(const QuambaLinear& a, bool folded) {
  static constexpr Rates kRates[2][2][2] = {
      // 16 bits, up to 8 tokens and up to 16
      {{{0.f, 1.3f, 0.77f, 0.02f, 0.65f, 0.25f}, {1.17f, 1.5f, 0.82f, 0.02f, 0.31f, 0.17f}},
       {{0.f, 1.9f, 0.85f, 0.17f, 0.01f, 0.12f}, {0.96f, 2.8f, 0.57f, 0.53f, 0.05f, 0.06f}}},
      // codes
      {{{0.f, 3.1f, 0.99f, 0.01f, 0.f, 0.17f}, {1.4f, 0.25f, 0.68f, 0.25f, 0.29f, 0.33f}},
       {{0.f, 0.6f, 0.87f, 0.f, 0.04f, 0.64f}, {1.09f, 1.f, 0.71f, 0.6f, 0.06f, 0.95f}}}};
  return kRates[a.x_dtype == QUAMBA_I8][a.M > 8][folded];
}

// Of a tile along K: one of fewer channels has more columns.
inline int steps(int K, int channels) {
  const int columns = kTileO * kTileK / channels;
  return (K + columns - 1) / columns;
}

inline float cost(const QuambaLinear& a, const Plan& plan, const Rates& r, int clusters, int multiprocessors) {
  const int tiles = (a.M + plan.tokens - 1) / plan.tokens * across(a.O, plan.channels);
  const int share = (steps(a.K, plan.channels) + plan.splits - 1) / plan.splits;
  auto wave = [&](int count) {  // of clusters that run at a time
    float each = static_cast<float>(count * plan.splits) / multiprocessors;
    const float fullest = plan.tokens > 16 ? std::ceil(each) : plan.blocks;
    each = each > 1.f ? each + r.uneven * (fullest - each) : 1.f;
    const float step = plan.tokens > 64 || plan.channels < kTileO ? r.other : 1.f;
    return share * step * (1.f + r.crowd * (each - 1.f)) + r.wave;
  };
  const int last = tiles % clusters;
  return tiles / clusters * wave(clusters) + (last ? wave(last) : 0.f) + r.split * plan.splits + r.block * plan.blocks;
}

inline Plan choose(const QuambaLinear& a, bool packed, const Limits (&limits)[kTiles]) {
  const int first = a.M <= 8 ? 0 : a.M <= 16 ? 1 : a.M <= 32 ? 2 : 3;
  const int multiprocessors = limits[3].clusters[1][1];
  const bool three = dense(a, packed, multiprocessors) && limits[3].clusters[3][1];
  const bool folds = may_fold(a, packed, multiprocessors);
  const int from = three ? 3 : 1, to = three ? 3 : first == 3 && (packed || may_be_wide(a)) ? 2 : kMaxBlocks;
  Plan best{0, 0, 0, 0};
  float least = 0;
  const int tiles = across(a.O);
  // several waves leave nothing to share
  const int most = three && tiles > 3 * limits[3].clusters[3][1] ? 1 : kMaxSplits;
  auto consider = [&](int i, int tokens, int channels) {
    const Rates r = folds ? rates_beside_folded(a, channels < kTileO) : rates(a, packed, three);
    for (int blocks = from; blocks <= to; ++blocks)
      for (int splits = 1; splits <= most && splits <= steps(a.K, channels); ++splits) {
        if (!limits[i].clusters[blocks][splits]) continue;
        const Plan plan{tokens, channels, splits, blocks};
        const float taken = cost(a, plan, r, limits[i].clusters[blocks][splits], multiprocessors);
        if (!best.tokens || taken < least) best = plan, least = taken;
      }
  };
  for (int i = first; i <= (may_be_wide(a) ? 4 : first); ++i) consider(i, 8 << i, kTileO);
  if (folds) consider(kFirstFolded + first, 8 << first, kTileO / 2);
  return best;
}

}  // namespace quamba::few
