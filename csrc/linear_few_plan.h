// How a linear over few tokens is cut up on Hopper: tokens of a tile, blocks that share its columns, and blocks on
// a multiprocessor.
#pragma once

#include "linear.h"

namespace quamba::few {

constexpr int kTileO = 128, kTileK = 128, kMaxSplits = 8, kMaxBlocks = 3;

struct Plan {
  int tokens, splits, blocks;  // tokens 0: none fits
};

// Clusters of each size that run at a time, for each number of blocks on a multiprocessor.
struct Limits {
  int clusters[kMaxBlocks + 1][kMaxSplits + 1];
};

// Estimated time, in steps of a block: clusters that do not fit wait for another wave, the first bytes' way from memory
// costs as much as four steps, blocks that share a multiprocessor slow each other, and a sum over the cluster grows with
// it. Fitted to the times of all plans on an H100.
inline float cost(const QuambaLinear& a, const Plan& plan, int clusters, int multiprocessors) {
  const int tiles = (a.M + plan.tokens - 1) / plan.tokens * ((a.O + kTileO - 1) / kTileO);
  const int steps = (a.K + kTileK - 1) / kTileK, waves = (tiles + clusters - 1) / clusters;
  const int at_a_time = (tiles < clusters ? tiles : clusters) * plan.splits;
  const float crowd = at_a_time > multiprocessors ? static_cast<float>(at_a_time) / multiprocessors - 1.f : 0.f;
  const int share = (steps + plan.splits - 1) / plan.splits;
  return waves * (share * (1.f + 0.15f * crowd) + 4.f) + 0.8f * plan.splits + 0.25f * plan.blocks;
}

inline Plan choose(const QuambaLinear& a, const Limits (&limits)[3]) {
  const int steps = (a.K + kTileK - 1) / kTileK, i = a.M <= 16 ? 0 : a.M <= 32 ? 1 : 2;
  Plan best{0, 0, 0};
  float least = 0;
  for (int blocks = 1; blocks <= kMaxBlocks; ++blocks)
    for (int splits = 1; splits <= kMaxSplits && splits <= steps; ++splits) {
      if (!limits[i].clusters[blocks][splits]) continue;
      const Plan plan{16 << i, splits, blocks};
      const float taken = cost(a, plan, limits[i].clusters[blocks][splits], limits[i].clusters[1][1]);
      if (!best.tokens || taken < least) best = plan, least = taken;
    }
  return best;
}

}  // namespace quamba::few
