// How a linear over 9 to 256 tokens is cut up on Hopper: tokens of a tile, and blocks that share its columns.
#pragma once

#include "linear.h"

namespace quamba::few {

constexpr int kTileO = 128, kTileK = 128, kMaxSplits = 8;

struct Plan {
  int tokens, splits;  // tokens 0: none fits
};

// Clusters of each size that run at a time.
struct Limits {
  int clusters[kMaxSplits + 1];
};

// Estimated time, in steps of a block: clusters that do not fit wait for another wave, and a sum over the cluster and
// the first bytes' way from memory cost some steps each.
inline float cost(const QuambaLinear& a, int tokens, int splits, int clusters) {
  const int tiles = (a.M + tokens - 1) / tokens * ((a.O + kTileO - 1) / kTileO), steps = (a.K + kTileK - 1) / kTileK;
  const int waves = (tiles + clusters - 1) / clusters;
  return static_cast<float>(waves) * ((steps + splits - 1) / splits + 4.f) + (splits > 1 ? 2.f : 0.f);
}

// The cheapest plan with the fewest tokens that hold all of M, or with 64.
inline Plan choose(const QuambaLinear& a, const Limits (&limits)[3]) {
  const int steps = (a.K + kTileK - 1) / kTileK, i = a.M <= 16 ? 0 : a.M <= 32 ? 1 : 2;
  Plan best{0, 0};
  float least = 0;
  for (int splits = 1; splits <= kMaxSplits && splits <= steps; ++splits) {
    if (!limits[i].clusters[splits]) continue;
    const float taken = cost(a, 16 << i, splits, limits[i].clusters[splits]);
    if (!best.tokens || taken < least) best = {16 << i, splits}, least = taken;
  }
  return best;
}

}  // namespace quamba::few
