// How a few-token linear is cut into thread blocks. Plain C++: no device is touched here.
//
// A step is 64 bytes of a weight row (64 int8 or 128 int4 weights), a strip is 16 rows. A block is wm x wk warps: wm
// along the rows, wk along K, each warp with `strips` strips. Where rows are few, `splits` blocks of a cluster share K.
#pragma once

#include <algorithm>

namespace quamba::skinny {

constexpr int kStepBytes = 64;
constexpr int kMaxWarps = 8;
constexpr int kMailboxBytes = 16;  // the first of shared memory: they count what other blocks send
constexpr int kMaxTokens = 64;     // of a block
constexpr int kHeaderBytes = kMailboxBytes + kMaxTokens * 4;  // and a scale of x for each token
constexpr int kStages = 4;         // chunks of x in shared memory where it does not stay

struct Shape {
  int M, O, K;
  int row_bytes;  // of a weight row
  int x_bytes;    // of an element of x
  bool operator==(const Shape& s) const {
    return M == s.M && O == s.O && K == s.K && row_bytes == s.row_bytes && x_bytes == s.x_bytes;
  }
};

struct Device {
  int sms, shared_per_sm, shared_per_block, threads_per_sm, registers_per_sm;
  bool clusters;
};

// What a compiled kernel fixes: strips a warp, tiles of 8 tokens, steps a chunk, chunks of weights that wait in shared
// memory (0: one chunk waits in registers), registers a thread, warps a block.
struct Variant {
  int strips, token_tiles, depth, ring, registers, max_warps;

  int ring_bytes(int threads) const { return threads * 32 * strips * depth * ring; }
};

struct Plan {
  int strips, wm, wk, splits;  // wm is a power of two
  int groups;        // blocks along the rows (times splits); each takes tiles of rows group, group + groups, ...
  int tiles;         // of 16 * strips * wm rows
  int token_blocks;  // of 8 * token_tiles tokens
  int steps, split_steps, warp_steps, chunks;  // of K, of a block, of a warp; chunks of `depth` steps of a warp
  int ring;          // of the variant
  bool resident;     // x stays in shared memory; else kStages chunks take turns
  int x_slots;       // tokens that shared memory has room for
  int stage_bytes, shared_bytes;
  int blocks_per_sm;  // that run at a time; more may fit, which leaves room for the next kernel to prefetch
  double cost;       // bytes that a multiprocessor could have read in the time expected

  int threads() const { return 32 * wm * wk; }
  int blocks() const { return groups * splits * token_blocks; }
};

// What a choice is narrowed to; -1 is free.
struct Forced {
  int strips = -1, wm = -1, wk = -1, splits = -1, resident = -1, ring = -1, blocks = -1;

  bool allows(const Plan& p, const Variant& v) const {
    const auto fits = [](int wanted, int value) { return wanted < 0 || wanted == value; };
    return fits(strips, v.strips) && fits(ring, v.ring) && fits(wm, p.wm) && fits(wk, p.wk) && fits(splits, p.splits) &&
           fits(resident, p.resident);
  }
};

inline int ceil_div(int a, int b) { return (a + b - 1) / b; }

// The sizes that follow from the free choices. False: it does not fit the device.
inline bool complete(Plan& p, const Shape& s, const Device& d, const Variant& v) {
  const int rows = 16 * v.strips * p.wm, k_step = s.K / s.row_bytes * kStepBytes;
  const int tokens = std::min(s.M, 8 * v.token_tiles);
  p.strips = v.strips;
  p.tiles = ceil_div(s.O, rows);
  p.token_blocks = ceil_div(s.M, 8 * v.token_tiles);
  p.steps = ceil_div(s.row_bytes, kStepBytes);
  p.split_steps = ceil_div(p.steps, p.splits);
  if (p.splits != ceil_div(p.steps, p.split_steps)) return false;  // a block without work
  p.warp_steps = ceil_div(p.split_steps, p.wk);
  if (p.wk != ceil_div(p.split_steps, p.warp_steps)) return false;
  p.chunks = ceil_div(p.warp_steps, v.depth);
  p.x_slots = v.token_tiles > 1 ? 8 * v.token_tiles : tokens + tokens % 2;
  p.stage_bytes = p.wk * v.depth * p.x_slots * k_step * s.x_bytes;
  const int gathered = p.splits > 1 ? p.splits * ceil_div(tokens, p.splits) : 0;
  const int sums = (p.wk * tokens + gathered) * (rows + 4) * 4;
  p.ring = v.ring;
  p.shared_bytes = kHeaderBytes + v.ring_bytes(p.threads()) + (p.resident ? p.chunks : kStages) * p.stage_bytes + sums;
  if (!p.resident && (v.ring || p.chunks < 2)) return false;
  if (p.shared_bytes > d.shared_per_block) return false;
  // registers are given out by quarters of a multiprocessor, eight a thread at a time
  const int warps = 4 * (d.registers_per_sm / 4 / (32 * ((v.registers + 7) / 8 * 8)));
  p.blocks_per_sm = std::min({d.shared_per_sm / (p.shared_bytes + 1024), warps / (p.wm * p.wk),
                              d.threads_per_sm / p.threads()});
  return p.blocks_per_sm > 0;
}

// Blocks along the rows: all in one wave, each with the same number of tiles where that can be.
inline void spread(Plan& p, const Device& d) {
  const int slots = std::max(1, p.blocks_per_sm * d.sms / (p.splits * p.token_blocks));
  p.groups = ceil_div(p.tiles, ceil_div(p.tiles, slots));
}

// A model of the time, in bytes that a multiprocessor reads meanwhile at its share of the bandwidth (on an H100 about
// 23 KB a microsecond). It ranks plans; it does not predict.
inline double cost(const Plan& p, const Shape& s, const Device& d, const Variant& v) {
  const double tile = 16.0 * v.strips * p.wm * std::min(s.row_bytes, p.split_steps * kStepBytes);
  const int per_block = ceil_div(p.tiles, p.groups), per_sm = ceil_div(p.blocks(), d.sms);
  const double mean = static_cast<double>(s.O) * s.row_bytes * p.token_blocks / d.sms;
  const double worst = tile * per_block * per_sm;
  const double ramp = std::min(per_sm, p.blocks_per_sm) * p.threads() / 32 *
                      std::min(p.warp_steps * per_block, v.depth * std::max(1, v.ring)) * v.strips * 1024.0;
  const double memory = (0.5 * mean + 0.5 * worst) * (1 + 10e3 / std::min(ramp, worst));
  // mma instructions a strip and step, at 2 clocks each, in bytes of one multiprocessor's share
  const double mma = (s.x_bytes == 2 ? 8 : s.row_bytes == s.K ? 2 : 4) * 2.0 * 13;
  const double active = std::min(1.0, std::min(per_sm, p.blocks_per_sm) * p.threads() / 32 / 8.0);
  const double arithmetic = worst / 1024 * v.token_tiles * mma / active;
  const double x = static_cast<double>(p.x_slots) * s.K / p.splits * s.x_bytes * per_sm * (p.resident ? 1 : per_block);
  const double fixed = (p.splits > 1 ? 6e3 * (1 + per_block) : 0) + 1.5e3 * per_block + 150.0 * p.wk * p.wm +
                       (p.resident ? 0 : 300.0 * p.chunks * per_block);
  return std::max(memory, arithmetic) + 0.3 * x + fixed;
}

// The cheapest plan of one variant; its cost is negative when none fits.
inline Plan choose(const Shape& s, const Device& d, const Forced& forced, const Variant& v) {
  Plan best{};
  best.cost = -1;
  for (int wm = 1; wm <= v.max_warps; wm *= 2)
    for (int wk = 1; wm * wk <= v.max_warps; ++wk)
      for (int splits = 1; splits <= (d.clusters ? 8 : 1); splits *= 2)
        for (int resident = 0; resident < 2; ++resident) {
          Plan p{};
          p.wm = wm, p.wk = wk, p.splits = splits, p.resident = resident;
          if (!forced.allows(p, v) || !complete(p, s, d, v)) continue;
          if (forced.blocks > 0) p.blocks_per_sm = std::min(p.blocks_per_sm, forced.blocks);
          spread(p, d);
          p.cost = cost(p, s, d, v);
          if (best.cost < 0 || p.cost < best.cost) best = p;
        }
  return best;
}

}  // namespace quamba::skinny
