// The selective scan of selective_scan.cu for 16 states where a multiprocessor has a block of 40 channels to itself.
//
// What a lane reads of B and C serves two or three channels there, so that shared memory, which hands a word a cycle
// to each lane, has less to do. Of the four warps that keep states, one a scheduler, two keep two quads of channels
// and two keep three. Eight more work ahead, six of them on the schedulers of the former: they bring dt x, dt after
// the softplus and D x to shared memory, and take the outputs from there.
#pragma once

#include "expansion.cuh"
#include "launch.cuh"
#include "quads.cuh"
#include "scan.h"
#include "softplus.cuh"

namespace quamba::selective {

struct Scan {
  QuambaScan a;
  int blocks;  // of channels
  bool whole_x, whole_dt, whole_b, whole_c, whole_z, whole_y;
  Expansion expansion;
};

// y silu(z), z on the grid of its scales where it has any; int8 is on it already.
__device__ __forceinline__ float4 gated(float4 y, float4 z, float4 scale, bool scaled, bool codes) {
  if (scaled && !codes) z = each([](float v, float s) { return code_on(v, make_grid(s)); }, z, scale);
  if (scaled) z = each([](float v, float s) { return __fmul_rn(v, s); }, z, scale);
  return each([](float v, float g) { return v * silu(g); }, y, z);
}

// Tokens and channels that one block of a sequence has.
struct Part {
  long long batch, begin, tokens;
  int sequence, block;
};

__device__ __forceinline__ Part part_of(const Scan& p, int channels) {
  const int sequence = blockIdx.x / p.blocks;
  Part s{sequence, 0, p.a.T, sequence, static_cast<int>(blockIdx.x - sequence * p.blocks) * channels};
  if (p.a.cu_seqlens) {
    s.batch = 0;
    s.begin = min(max(static_cast<long long>(__ldg(p.a.cu_seqlens + sequence)), 0LL), p.a.T);
    s.tokens = max(min(static_cast<long long>(__ldg(p.a.cu_seqlens + sequence + 1)), p.a.T) - s.begin, 0LL);
  }
  return s;
}

namespace ahead {

constexpr int kN = 16, kLanes = 8, kStates = 4, kQuads = 10, kChannels = 4 * kQuads, kTile = 48;  // kStates: warps
constexpr int kAhead = 256, kAtWork = 32 * kStates + kAhead;
constexpr int kThreads = 32 * 14;  // a warp's number modulo 4 is its scheduler's; two have nothing to do
constexpr int kPitch = kChannels + 4;  // of outputs, whose tokens meet in no bank

// Behind the last token of a tile lies room for one that is read, as what comes next, and not used.
struct Shared {
  float4 rates[2][kTile / 2 + 1][4][kQuads];  // dt, dt x of two tokens, by the place of a channel in its quad
  float4 columns[2][kTile + 1][kLanes];       // B, B, C, C of two states
  float outputs[3][kTile][kPitch];            // D x, to which C h is added
};

__device__ __forceinline__ void tile_ends() { asm volatile("bar.sync 1, %0;" ::"n"(kAtWork) : "memory"); }

// The states of Quads channels a lane, two of each.
template <int Quads>
__device__ __forceinline__ void keep(const Scan& p, const Part& s, Shared& shared, int first_quad) {
  const QuambaScan& a = p.a;
  const int lane = threadIdx.x % kLanes, own = threadIdx.x % 32 / kLanes;
  const float c_scale = a.c_scale ? __ldg(a.c_scale) : 1.f;
  float decay[Quads][2], h[Quads][2], before[Quads][4];
  auto channel = [&](int c) { return s.block + 4 * (first_quad + c) + own; };
  auto state_at = [&](int c) { return (static_cast<long long>(s.sequence) * a.I + channel(c)) * kN + 2 * lane; };
#pragma unroll
  for (int c = 0; c < Quads; ++c) {
    const bool exists = channel(c) < a.I;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float* const rate = a.A + static_cast<long long>(channel(c)) * kN + 2 * lane + i;
      decay[c][i] = exists ? kLog2e * __uint_as_float(constant_word(rate)) : 0.f;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) before[c][i] = 0.f;
  }
  wait_for_previous_kernel();
#pragma unroll
  for (int c = 0; c < Quads; ++c)
#pragma unroll
    for (int i = 0; i < 2; ++i) h[c][i] = channel(c) < a.I && a.state ? __ldcg(a.state + state_at(c) + i) : 0.f;
  // Sums over the lanes for eight tokens are halved as they come, and finished while the next eight are computed.
  auto place = [&](int buffer, int group) { return &shared.outputs[buffer][group + lane][4 * first_quad + own]; };
  float* pending = place(2, 0);
  auto halve = [&](int step) {
    const bool upper = lane & step;
#pragma unroll
    for (int c = 0; c < Quads; ++c)
#pragma unroll
      for (int i = 0; i < step; ++i) {
        const float sent = upper ? before[c][i] : before[c][i + step];
        const float kept = upper ? before[c][i + step] : before[c][i];
        before[c][i] = kept + __shfl_xor_sync(~0u, sent, step);
      }
  };
  auto finish = [&] {
    halve(2), halve(1);
#pragma unroll
    for (int c = 0; c < Quads; ++c) pending[4 * c] = __fmaf_rn(c_scale, before[c][0], pending[4 * c]);
  };
  // The exponentials of a token are on their way while the token before it is computed, those of a group's first token
  // since the group before.
  float4 rates[Quads], column;
  float powers[Quads][2];
  auto raise = [&](int c, float dt) {
    powers[c][0] = exp2_approximate(dt * decay[c][0]), powers[c][1] = exp2_approximate(dt * decay[c][1]);
  };
  const long long tiles = (s.tokens + kTile - 1) / kTile;
  int buffer = 0, third = 0;
  tile_ends();
  for (long long tile = 0; tile < tiles; ++tile) {
    const float4* rate = &shared.rates[buffer][0][own][first_quad];
    const float4* column_at = &shared.columns[buffer][0][lane];
    column = *column_at;
#pragma unroll
    for (int c = 0; c < Quads; ++c) rates[c] = rate[c];
#pragma unroll
    for (int c = 0; c < Quads; ++c) raise(c, rates[c].x);
#pragma unroll 1
    for (int group = 0; group < kTile; group += kLanes) {
      float sums[Quads][4];
#pragma unroll
      for (int u = 0; u < kLanes; ++u) {
        if (u == 2) finish();
        column_at += kLanes, rate += u % 2 * 4 * kQuads;
        const float4 now = column;
        column = *column_at;  // of the next token
#pragma unroll
        for (int c = 0; c < Quads; ++c) {
          const float dt_x = u % 2 ? rates[c].w : rates[c].y;
          const float power[2] = {powers[c][0], powers[c][1]};
          if (u % 2) rates[c] = rate[c];
          raise(c, u % 2 ? rates[c].x : rates[c].z);
          h[c][0] = __fmaf_rn(power[0], h[c][0], dt_x * now.x);
          h[c][1] = __fmaf_rn(power[1], h[c][1], dt_x * now.y);
          const float sum = __fmaf_rn(now.w, h[c][1], now.z * h[c][0]);
          if (u < 4) {
            sums[c][u] = sum;
          } else {
            const bool upper = lane & 4;
            const float sent = upper ? sums[c][u - 4] : sum, kept = upper ? sum : sums[c][u - 4];
            before[c][u - 4] = kept + __shfl_xor_sync(~0u, sent, 4);
          }
        }
      }
      pending = place(third, group);
    }
    buffer ^= 1, third = third == 2 ? 0 : third + 1;
    tile_ends();
  }
  if (tiles) finish();
  tile_ends();
#pragma unroll
  for (int c = 0; c < Quads; ++c)
    if (channel(c) < a.I) *reinterpret_cast<float2*>(a.last + state_at(c)) = make_float2(h[c][0], h[c][1]);
}

// The warps that work ahead, by a thread of them: it has a quad of channels of two tokens, and four of B and of C.
template <int Float, bool Codes>
__device__ __forceinline__ void stage_and_store(const Scan& p, const Part& s, Shared& shared, int thread) {
  constexpr int kType = Codes ? QUAMBA_I8 : Float;
  static_assert(kTile / 2 * kQuads <= kAhead && kTile * kN / 4 <= kAhead);
  const QuambaScan& a = p.a;
  const int quad = thread % kQuads, row = thread / kQuads * 2, first = s.block + 4 * quad;
  const int count = row < kTile ? min(a.I - first, 4) : 0;
  const int column = thread % (kN / 4), column_row = thread / (kN / 4);
  // x stands for x_scale x and b for b_scale b, so that codes are multiplied by the least: dt x and D x take the scales
  const float b_scale = a.b_scale ? __ldg(a.b_scale) : 1.f;
  auto times = [](float v, float w) { return v * w; };
  const float4 x_scale = load_scales(a.x_scale, a.x_scale_count > 1, first, count, 1.f);
  const float4 skip = each(times, load_quad(a.D, a.D_dtype, first, count, false), x_scale);
  const float4 x_factor = each([&](float v, float) { return v * b_scale; }, x_scale, x_scale);
  float4 bias = make_float4(0.f, 0.f, 0.f, 0.f);
  if (a.dt_bias) bias = load_quad(a.dt_bias, a.dt_bias_dtype, first, count, false);

  auto bytes_at = [](const void* data, int type, long long at) {
    return static_cast<const unsigned char*>(data) + at * size_of(type);
  };
  const long long x_token = a.x_token * size_of(kType), dt_token = a.dt_token * size_of(Float);
  const unsigned char* x = bytes_at(a.x, kType, s.batch * a.x_batch + (s.begin + row) * a.x_token + first);
  const unsigned char* dt = bytes_at(a.dt, Float, s.batch * a.dt_batch + (s.begin + row) * a.dt_token + first);
  const unsigned char* b = bytes_at(a.b, kType, s.batch * a.b_batch + (s.begin + column_row) * a.b_token + 4 * column);
  const unsigned char* c = bytes_at(a.c, kType, s.batch * a.c_batch + (s.begin + column_row) * a.c_token + 4 * column);
  const long long b_tile = kTile * a.b_token * size_of(kType), c_tile = kTile * a.c_token * size_of(kType);
  unsigned short* y = static_cast<unsigned short*>(a.y) + (s.batch * a.T + s.begin + row) * a.I + first;
  const long long y_tile = static_cast<long long>(kTile) * a.I;
  const unsigned char* z = bytes_at(a.z, Float, s.batch * a.z_batch + (s.begin + row) * a.z_token + first);
  const long long z_token = a.z_token * size_of(Float);
  const float4 z_scale = load_scales(a.z_scale, a.z_scale_count > 1, first, count, 1.f);
  uint4 raw_x[2], raw_dt[2], raw_z[2], raw_b, raw_c;
  auto fetch = [&](int here) {  // a tile of so many tokens
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int there = row + i < here ? count : 0;
      raw_x[i] = load_raw(x + i * x_token, kType, 0, there, true);
      raw_dt[i] = load_raw(dt + i * dt_token, Float, 0, there, true);
    }
    const int there = column_row < here ? 4 : 0;
    raw_b = load_raw(b, kType, 0, there, true), raw_c = load_raw(c, kType, 0, there, true);
    x += kTile * x_token, dt += kTile * dt_token, b += b_tile, c += c_tile;
  };
  auto stage = [&](int here, int buffer, int third) {
    if (row < kTile) {
      float4 rate[2], step[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float4 v = to_floats(raw_x[i], kType);
        *reinterpret_cast<float4*>(&shared.outputs[third][row + i][4 * quad]) = each(times, v, skip);
        rate[i] = each([](float v, float b) { return softplus(v + b); }, to_floats(raw_dt[i], Float), bias);
        if (row + i >= here) rate[i] = make_float4(0.f, 0.f, 0.f, 0.f);  // beyond the last token states are left alone
        step[i] = each(times, rate[i], each(times, v, x_factor));
      }
      auto& to = shared.rates[buffer][row / 2];
      to[0][quad] = make_float4(rate[0].x, step[0].x, rate[1].x, step[1].x);
      to[1][quad] = make_float4(rate[0].y, step[0].y, rate[1].y, step[1].y);
      to[2][quad] = make_float4(rate[0].z, step[0].z, rate[1].z, step[1].z);
      to[3][quad] = make_float4(rate[0].w, step[0].w, rate[1].w, step[1].w);
    }
    if (column_row < kTile) {
      const float4 v = to_floats(raw_b, kType), w = to_floats(raw_c, kType);
      float4* const to = &shared.columns[buffer][column_row][2 * column];
      to[0] = make_float4(v.x, v.y, w.x, w.y), to[1] = make_float4(v.z, v.w, w.z, w.w);
    }
  };
  auto fetch_gate = [&](int here) {
    if (!a.z) return;
#pragma unroll
    for (int i = 0; i < 2; ++i) raw_z[i] = load_raw(z + i * z_token, Float, 0, row + i < here ? count : 0, true);
    z += kTile * z_token;
  };
  auto store = [&](int here, int third) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (row + i >= here) continue;
      float4 v = *reinterpret_cast<const float4*>(&shared.outputs[third][row + i][4 * quad]);
      if (a.z) v = gated(v, to_floats(raw_z[i], Float), z_scale, a.z_scale, false);
      store_quad(y + i * a.I, Float, 0, v, count, true);
    }
    y += y_tile;
  };

  // While a tile is computed, the one after it is staged, and what the one before the last became is stored.
  const int whole = static_cast<int>(s.tokens / kTile), rest = static_cast<int>(s.tokens - 1ll * whole * kTile);
  const int tiles = whole + (rest > 0);
  auto here = [&](int tile) { return tile < whole ? kTile : tile == whole ? rest : 0; };
  wait_for_previous_kernel();
  fetch(here(0));
  stage(here(0), 0, 0);
  fetch(here(1));
  tile_ends();
  int buffer = 1, third = 1;
  for (int tile = 0; tile <= tiles; ++tile) {
    if (tile >= 2) store(kTile, third);
    if (tile >= 1) fetch_gate(here(tile - 1));
    if (tile + 1 == tiles) launch_dependents();  // blocks that come sooner gather where no block of this kernel is
    if (tile + 1 < tiles) {
      stage(here(tile + 1), buffer, third);
      fetch(here(tile + 2));
    }
    buffer ^= 1, third = third == 2 ? 0 : third + 1;
    tile_ends();
  }
  if (tiles) store(here(tiles - 1), third);
}

constexpr int kPieces = 24;  // of a thread that expands

// Blocks beyond those of the scan expand a weight, on multiprocessors that it leaves idle.
template <int Float, bool Codes>
__global__ void __launch_bounds__(kThreads, 1) selective_scan_ahead(const __grid_constant__ Scan p) {
  extern __shared__ __align__(16) unsigned char bytes[];
  Shared& shared = *reinterpret_cast<Shared*>(bytes);
  if (const unsigned blocks = p.blocks * p.a.sequences; blockIdx.x >= blocks)
    return expand<kPieces>(p.expansion, blockIdx.x - blocks, threadIdx.x, kThreads,
                           [] { wait_for_previous_kernel(); });
  if (p.a.cu_seqlens) wait_for_previous_kernel();
  const Part s = part_of(p, kChannels);
  const int warp = threadIdx.x / 32, scheduler = warp % 4;
  if (warp >= kStates) {
    const int row = warp / 4 - 1;
    if (row > 0 && scheduler > 1) return;
    const int own = row ? kStates + 2 * (row - 1) + scheduler : scheduler;
    stage_and_store<Float, Codes>(p, s, shared, 32 * own + threadIdx.x % 32);
  } else if (scheduler < 2) {
    keep<2>(p, s, shared, 2 * warp);
  } else {
    keep<3>(p, s, shared, 3 * warp - 2);
  }
}

template <int Float, bool Codes>
int launch_as(Scan p, void* stream) {
  const long long blocks = static_cast<long long>(p.blocks) * p.a.sequences;
  int processors = 0;
  if (cudaError_t error = device_attribute(cudaDevAttrMultiProcessorCount, processors); error != cudaSuccess)
    return error;
  // on an H100 175 tokens last as long as a block that expands, or longer
  if (blocks < processors) p.expansion.leave_few(kThreads, kPieces, processors - blocks, p.a.T / 175, processors);
  const long long grid = blocks + p.expansion.blocks(kThreads, kPieces);
  if (grid > 0x7fffffffLL) return QUAMBA_UNSUPPORTED;
  const auto kernel = selective_scan_ahead<Float, Codes>;
  constexpr int kShared = sizeof(Shared);
  if (cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
      error != cudaSuccess)
    return error;
  // a multiprocessor has room for one block, so that those which start early are shared out evenly
  return launch(kernel, p, dim3(static_cast<unsigned>(grid)), kThreads, stream, kShared);
}

}  // namespace ahead
}  // namespace quamba::selective
