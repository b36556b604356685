// How a linear over 9 to 256 tokens is cut up on Hopper: tokens of a tile, and blocks that share its columns.
#pragma once

#include <algorithm>

#include "linear.h"

namespace quamba::few {

constexpr int kTileO = 128, kTileK = 128, kMaxSplits = 8;

struct Plan {
  int tokens, splits;
};

// Estimated time, in steps of a block: blocks beyond the slots wait for another wave, and a sum over the cluster and
// the first bytes' way from memory cost some steps each.
inline float cost(const QuambaLinear& a, int tokens, int splits, int slots) {
  const int tiles = (a.M + tokens - 1) / tokens * ((a.O + kTileO - 1) / kTileO), steps = (a.K + kTileK - 1) / kTileK;
  const int waves = (tiles * splits + slots - 1) / slots;
  return static_cast<float>(waves) * ((steps + splits - 1) / splits + 4.f) + (splits > 1 ? 2.f : 0.f);
}

inline Plan choose(const QuambaLinear& a, int slots) {
  Plan best{a.M <= 16 ? 16 : a.M <= 32 ? 32 : 64, 1};
  const int steps = (a.K + kTileK - 1) / kTileK;
  for (int splits = 2; splits <= std::min(kMaxSplits, steps); ++splits)
    if (cost(a, best.tokens, splits, slots) < cost(a, best.tokens, best.splits, slots)) best.splits = splits;
  return best;
}

}  // namespace quamba::few
