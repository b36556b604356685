// gate_output where y and z have 16 bits and one Hadamard matrix rotates the whole row of I = Top x 256 channels: what a
// quantised model runs.
//
// A warp takes tiles of 256 channels, eight neighbours a lane, and rotates each by the tensor cores as H X H, H the
// Sylvester matrix of order 16: X is the second operand of the first product, whose result lies as the first operand of
// the second does. Every factor is split into two of tf32, which keeps 22 bits. Then each thread takes one or two
// columns of all Top tiles through shared memory and the base matrix (with what is left of the factors 2), from where the
// codes leave. The factor of a norm over the whole row is taken on the way out, those of groups (whole tiles) as a
// column is read.
#pragma once

#include <type_traits>

#include "hadamard.cuh"
#include "launch.cuh"
#include "mma.cuh"
#include "quads.cuh"
#include "rowwise.h"

namespace quamba::gate {

constexpr int kTile = 256, kLane = 8;  // channels of a tile, of a lane in it

struct Halves {
  QuambaGate a;
  float gain;
  // Constants of the rotation, which come from outside because ptxas would put moves of registers in the place of operands
  // that it knows: the bits of a float that tf32 has, and the signs of four operands.
  unsigned upper = 0xffffe000u;
  float signs[4] = {1.f, 1.f, 1.f, -1.f};
};

constexpr int odd_part(int n) { return n % 2 ? n : odd_part(n / 2); }

// Order of the base matrix among the factors of Top: 12 or 20, or 1 for a power of two.
template <int Top>
constexpr int base_of() {
  return odd_part(Top) == 1 ? 1 : 4 * odd_part(Top);
}

// v <- v H over the tiles.
template <int Top>
__device__ __forceinline__ void rotate_tiles(float (&v)[Top]) {
  constexpr int kBase = base_of<Top>(), kTwos = Top / kBase;
  if constexpr (kBase == 1) {
    butterfly(v);
  } else {
#pragma unroll
    for (int two = 0; two < kTwos; ++two) {
      float column[kBase];
#pragma unroll
      for (int b = 0; b < kBase; ++b) column[b] = v[b * kTwos + two];
      multiply_base(column);
#pragma unroll
      for (int b = 0; b < kBase; ++b) v[b * kTwos + two] = column[b];
    }
    if constexpr (kTwos > 1)
#pragma unroll
      for (int b = 0; b < kBase; ++b) {
        float twos[kTwos];
#pragma unroll
        for (int i = 0; i < kTwos; ++i) twos[i] = v[b * kTwos + i];
        butterfly(twos);
#pragma unroll
        for (int i = 0; i < kTwos; ++i) v[b * kTwos + i] = twos[i];
      }
  }
}

// Columns of a thread: more would not fit its registers.
template <int Top>
constexpr int columns() {
  return Top <= 20 ? 2 : 1;
}

template <int Top>
constexpr int threads() {
  return kTile / columns<Top>();
}

// Blocks of a multiprocessor: 16 warps, whose registers are enough to work on several tiles at once.
template <int Top>
constexpr int resident() {
  return 512 / threads<Top>();
}

// Where channel bits 0, 1, 5, 2, 3, 4, 6, 7 (from the lowest) of a tile lie in shared memory: a lane stores quads, and the
// eight lanes of a store fall into different banks.
__device__ __forceinline__ int place(int at) { return at ^ (at >> 6 & 1) << 2 ^ (at >> 7) << 4; }
__device__ __forceinline__ int channel_at(int at) { return (at & 0xc3) | (at & 0x38) >> 1 | (at & 4) << 3; }

// A float as the sum of two with 11 significant bits.
struct Split {
  float high, low;
};

__device__ __forceinline__ Split split(float v, unsigned upper) {
  const float high = __uint_as_float(__float_as_uint(v) & upper);
  return {high, v - high};
}

// Rotates tiles, of which a lane has the channels from 8 lane on. Bits 1 to 4 of a channel are summed over by the first
// product, the others by the second.
class TileRotation {
 public:
  __device__ __forceinline__ TileRotation(int lane, const Halves& p) : upper_(p.upper) {
    const int q = lane % 4, g = lane / 4;
    const float one = __popc(q & g >> 1) % 2 ? -1.f : 1.f;
#pragma unroll
    for (int k = 0; k < 2; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i) signs_[k][i] = (k && g % 2 ? -one : one) * p.signs[i];
    at_ = place(8 * g + 64 * q);
    flip_ = g % 2 ? 0x80008000u : 0u;
  }

  __device__ __forceinline__ void operator()(const float (&v)[kLane], float* tile) const {
    float middle[2][4] = {};
#pragma unroll
    for (int k = 0; k < 2; ++k)
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        const float(&h)[4] = signs_[k];
        const Split a = split(v[4 * k + t], upper_), b = split(v[4 * k + 2 + t], upper_);
        mma_tf32(middle[t], h[0], h[1], h[2], h[3], a.high, b.high);
        mma_tf32(middle[t], h[0], h[1], h[2], h[3], a.low, b.low);
      }
    float out[2][4] = {};
    second(middle, out);
#pragma unroll
    for (int t = 0; t < 2; ++t)
      *reinterpret_cast<float4*>(tile + (at_ ^ 4 * t)) = make_float4(out[t][0], out[t][1], out[t][2], out[t][3]);
  }

  // The same of channels as they lie in memory, whose types need no splitting: the first product sums over bits 0, 2, 3
  // and 4, so that a word is an operand.
  template <bool Half>
  __device__ __forceinline__ void raw(const uint4& v, float* tile) const {
    constexpr unsigned kBoth = 0x80008000u, kUpper = 0x80000000u, kOnes = Half ? 0x3c003c00u : 0x3f803f80u;
    const unsigned low = kOnes | (__float_as_uint(signs_[0][0]) >> 31) * kBoth, high = low ^ flip_;
    float middle[2][4] = {}, out[2][4] = {};
    auto first = [&](float (&d)[4], unsigned a, unsigned b) {
      if constexpr (Half)
        mma_f16(d, low, low ^ kUpper, high, high ^ kUpper, a, b);
      else
        mma_bf16(d, low, low ^ kUpper, high, high ^ kUpper, a, b);
    };
    first(middle[0], v.x, v.z), first(middle[1], v.y, v.w);
    second(middle, out);
#pragma unroll
    for (int t = 0; t < 2; ++t)
      *reinterpret_cast<float4*>(tile + (at_ ^ 4 * t)) = make_float4(out[t][0], out[t][2], out[t][1], out[t][3]);
  }

 private:
  __device__ __forceinline__ void second(const float (&middle)[2][4], float (&out)[2][4]) const {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      Split m[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) m[i] = split(middle[k][i], upper_);
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        mma_tf32(out[t], m[0].high, m[2].high, m[1].high, m[3].high, signs_[k][2 * t], signs_[k][2 * t + 1]);
        mma_tf32(out[t], m[0].low, m[2].low, m[1].low, m[3].low, signs_[k][2 * t], signs_[k][2 * t + 1]);
      }
    }
  }

  float signs_[2][4];
  int at_;
  unsigned upper_, flip_;
};

// The code nearest to v / scale, as a float, where codes leave and a tie may become either neighbour: code_on is exact.
__device__ __forceinline__ float code_near(float v, float scale) {
  const float code = __fmaf_rn(v, reciprocal_approximate(scale), kRounder);
  return __fadd_rn(fminf(fmaxf(code, kRounder - 127.f), kRounder + 127.f), -kRounder);
}

template <bool Half>
__device__ __forceinline__ void octet(const uint4& raw, float (&v)[kLane]) {
  const unsigned words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = pair_of<Half>(words[i]);
    v[2 * i] = pair.x, v[2 * i + 1] = pair.y;
  }
}

// Eight constants of a model from a multiple of 8 on, through L1.
__device__ __forceinline__ void constant_octet(const void* data, int type, int at, float (&v)[kLane]) {
  if (type != QUAMBA_F32) {
    const uint4 raw = __ldg(reinterpret_cast<const uint4*>(static_cast<const unsigned short*>(data) + at));
    return type == QUAMBA_F16 ? octet<true>(raw, v) : octet<false>(raw, v);
  }
  const float4 low = constant_quad(data, type, at), high = constant_quad(data, type, at + 4);
  v[0] = low.x, v[1] = low.y, v[2] = low.z, v[3] = low.w, v[4] = high.x, v[5] = high.y, v[6] = high.z, v[7] = high.w;
}

// What is known of a call: that there is z; that codes with one scale leave, z is rounded by channel, and there is no
// weight or one of the type of y and z; that the type of y and z leaves and z is taken as it is, with such weights; that
// y is rotated as it is, to codes with one scale or to anything.
enum Kind { kGeneral, kPlain, kWeighted, kPlainHalves, kWeightedHalves, kRotated, kRotatedGeneral };

// Half: fp16, else bf16. A block takes every gridDim.x-th row. The next one is on its way while columns are rotated, else
// all blocks would wait for memory together and then compute together. Rows that are rotated alone come last first: L2
// may still have what was written last.
template <int Top, bool Half, Kind Known>
__global__ void __launch_bounds__(threads<Top>(), resident<Top>()) gate_halves(const __grid_constant__ Halves p) {
  constexpr int kColumns = columns<Top>(), kWarps = threads<Top>() / 32, kTurns = Top / kWarps;
  constexpr int kType = Half ? QUAMBA_F16 : QUAMBA_BF16, kStep = kWarps * kTile;
  constexpr bool kOpen = Known == kGeneral || Known == kRotatedGeneral;
  constexpr bool kHalves = Known == kPlainHalves || Known == kWeightedHalves, kCodes = !kOpen && !kHalves;
  constexpr bool kGain = Known == kWeighted || Known == kWeightedHalves;
  constexpr bool kGated = Known != kRotated && Known != kRotatedGeneral;
  static_assert(Top % kWarps == 0);
  extern __shared__ __align__(16) float rows[];  // two; of each tile: y and z, a lane's together, then floats
  __shared__ float sums[2][Top], factors[2][Top], peaks[2][32];
  const QuambaGate& a = p.a;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int begin = kTile * warp + kLane * lane, column = kColumns * thread;
  const TileRotation rotate(lane, p);
  const float inverse = !kHalves && a.out_scale ? reciprocal_approximate(__ldg(a.out_scale)) * (1.f / 254.f) : 1.f / 254.f;
  launch_dependents();
  wait_for_previous_kernel();

  auto row_at = [&](long long index) { return kGated ? index : a.rows - 1 - index; };
  auto fetch = [&](long long index, float* row) {
    const unsigned short* y = static_cast<const unsigned short*>(a.y) + row_at(index) * a.y_stride + begin;
    const unsigned short* z = static_cast<const unsigned short*>(a.z) + row_at(index) * a.z_stride + begin;
    uint4* const to = reinterpret_cast<uint4*>(row + kTile * warp) + lane;
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      copy_async(to + turn * kStep / 4, y + turn * kStep, true);
      if (kGated) copy_async(to + turn * kStep / 4 + 32, z + turn * kStep, true);
    }
    copy_async_commit();
  };
  // y silu(z), with the weight, of the lane's channels of a tile; returns the sum of squares before that
  auto gate = [&](const uint4* tile, int at, float (&v)[kLane]) {
    float g[kLane], sum = 0.f;
    octet<Half>(tile[lane + 32], g);
    octet<Half>(tile[lane], v);
    if (kCodes || (kOpen && a.z_scale)) {
      float scale[kLane];
      if (kCodes || a.z_scale_count > 1) {
        constant_octet(a.z_scale, QUAMBA_F32, at, scale);
      } else {
        const float one = __ldg(a.z_scale);
#pragma unroll
        for (int i = 0; i < kLane; ++i) scale[i] = one;
      }
#pragma unroll
      for (int i = 0; i < kLane; ++i)
        g[i] = __fmul_rn(kCodes ? code_near(g[i], scale[i]) : code_on(g[i], make_grid(scale[i])), scale[i]);
    }
#pragma unroll
    for (int i = 0; i < kLane; ++i) v[i] *= silu(g[i]);
#pragma unroll
    for (int i = 0; i < kLane; ++i) sum += v[i] * v[i];
    if (kGain || (Known == kGeneral && a.weight)) {
      float weight[kLane];
      constant_octet(a.weight, kGain ? kType : a.weight_dtype, at, weight);
#pragma unroll
      for (int i = 0; i < kLane; ++i) v[i] *= weight[i];
    }
    return sum;
  };
  fetch(blockIdx.x, rows);
  int odd = 0;
  for (long long index = blockIdx.x; index < a.rows; index += gridDim.x, odd ^= 1) {
    float* const row = rows + odd * Top * kTile;
    float* const own = row + kTile * warp;
    float v[kTurns][kLane], sum[kTurns];
    copy_async_wait();
    if constexpr (kGated) {
      auto gate_tile = [&](int turn) {
        sum[turn] = gate(reinterpret_cast<const uint4*>(own + turn * kStep), begin + turn * kStep, v[turn]);
      };
      gate_tile(0);
#pragma unroll
      for (int turn = 0; turn < kTurns; ++turn) {
        __syncwarp();  // all have read y and z, in whose place the floats come
        // beside the products of this tile, each of which waits for the last
        if (turn + 1 < kTurns) gate_tile(turn + 1);
        rotate(v[turn], own + turn * kStep);
      }
    } else {
      uint4 raw[kTurns];
#pragma unroll
      for (int turn = 0; turn < kTurns; ++turn) raw[turn] = reinterpret_cast<const uint4*>(own + turn * kStep)[lane];
      __syncwarp();
#pragma unroll
      for (int turn = 0; turn < kTurns; ++turn) rotate.raw<Half>(raw[turn], own + turn * kStep);
    }
    const int norm_groups = kGated ? a.norm_groups : 0;
    if (norm_groups > 1) {
#pragma unroll
      for (int turn = 0; turn < kTurns; ++turn) {
        sum[turn] = warp_sum(sum[turn]);
        if (lane == 0) sums[odd][turn * kWarps + warp] = sum[turn];
      }
    } else if (norm_groups) {
#pragma unroll
      for (int turn = 1; turn < kTurns; ++turn) sum[0] += sum[turn];
      sum[0] = warp_sum(sum[0]);
      if (lane == 0) sums[odd][warp] = sum[0];
    }
    __syncthreads();
    if (index + gridDim.x < a.rows) fetch(index + gridDim.x, rows + (odd ^ 1) * Top * kTile);

    float top[kColumns][Top];
#pragma unroll
    for (int r = 0; r < Top; ++r) {
      const float* const from = row + r * kTile + place(column);
      if constexpr (kColumns == 2) {
        const float2 two = *reinterpret_cast<const float2*>(from);
        top[0][r] = two.x, top[1][r] = two.y;
      } else {
        top[0][r] = *from;
      }
    }
    float gain = p.gain;
    if (norm_groups == 1) {
      float total = 0.f;
#pragma unroll
      for (int i = 0; i < kWarps; ++i) total += sums[odd][i];
      gain *= rsqrtf(total * (1.f / (Top * kTile)) + a.eps);
    } else if (norm_groups > 1) {
      if (thread < Top) {
        const int tiles = Top / norm_groups, from = thread / tiles * tiles;  // of a group
        float total = 0.f;
        for (int i = 0; i < tiles; ++i) total += sums[odd][from + i];
        factors[odd][thread] = rsqrtf(total / static_cast<float>(tiles * kTile) + a.eps);
      }
      __syncthreads();
#pragma unroll
      for (int r = 0; r < Top; ++r)
#pragma unroll
        for (int c = 0; c < kColumns; ++c) top[c][r] *= factors[odd][r];
    }
#pragma unroll
    for (int c = 0; c < kColumns; ++c) rotate_tiles(top[c]);

    const long long out = row_at(index) * a.I + channel_at(column);
    float step = gain * inverse;
    if (kOpen && a.u_scale) {
      float peak = 0.f;
#pragma unroll
      for (int c = 0; c < kColumns; ++c)
#pragma unroll
        for (int r = 0; r < Top; ++r) peak = fmaxf(peak, fabsf(top[c][r]));
      peak = gain * block_reduce(peak, peaks[odd], [](float x, float y) { return fmaxf(x, y); });
      const float u_scale = peak > 0.f ? __fdiv_rn(peak, 127.f) : 1.f;
      if (thread == 0) a.u_scale[row_at(index)] = u_scale;
      step = __fdiv_rn(gain * (1.f / 254.f), u_scale);
    }
    if (kCodes || (kOpen && (a.u_scale || a.out_scale))) {
      auto* const codes = static_cast<unsigned char*>(a.u) + out;
#pragma unroll
      for (int r = 0; r < Top; ++r) {
        const unsigned code = code_bits(top[0][r], step);
        if constexpr (kColumns == 2)
          *reinterpret_cast<unsigned short*>(codes + r * kTile) = __byte_perm(code, code_bits(top[1][r], step), 0x0040);
        else
          codes[r * kTile] = code;
      }
    } else if (kHalves || a.u_dtype == kType) {
      auto* const halves = static_cast<unsigned short*>(a.u) + out;
#pragma unroll
      for (int r = 0; r < Top; ++r) {
        const float4 v = make_float4(top[0][r] * gain, top[kColumns - 1][r] * gain, 0.f, 0.f);
        const unsigned word = to_raw(v, kType).x;
        if constexpr (kColumns == 2)
          *reinterpret_cast<unsigned*>(halves + r * kTile) = word;
        else
          halves[r * kTile] = static_cast<unsigned short>(word);
      }
    } else {
#pragma unroll
      for (int c = 0; c < kColumns; ++c)
#pragma unroll
        for (int r = 0; r < Top; ++r)
          store_raw(a.u, a.u_dtype, out + r * kTile + c,
                    to_raw(make_float4(top[c][r] * gain, 0.f, 0.f, 0.f), a.u_dtype), 1, false);
    }
  }
}

template <int Top>
int launch_halves(const Halves& p, void* stream) {
  constexpr int kShared = 2 * Top * kTile * static_cast<int>(sizeof(float));
  auto pick = [&](auto half) {
    constexpr bool kHalf = decltype(half)::value;
    const bool one_scale = p.a.out_scale && !p.a.u_scale;
    const bool halves = !p.a.out_scale && !p.a.u_scale && !p.a.z_scale && p.a.u_dtype == p.a.y_dtype;
    if (!p.a.z) return one_scale ? gate_halves<Top, kHalf, kRotated> : gate_halves<Top, kHalf, kRotatedGeneral>;
    if ((!halves && (!one_scale || p.a.z_scale_count != p.a.I)) || (p.a.weight && p.a.weight_dtype != p.a.y_dtype))
      return gate_halves<Top, kHalf, kGeneral>;
    if (halves) return p.a.weight ? gate_halves<Top, kHalf, kWeightedHalves> : gate_halves<Top, kHalf, kPlainHalves>;
    return p.a.weight ? gate_halves<Top, kHalf, kWeighted> : gate_halves<Top, kHalf, kPlain>;
  };
  const auto kernel = p.a.y_dtype == QUAMBA_F16 ? pick(std::true_type{}) : pick(std::false_type{});
  int processors = 0;
  cudaError_t error = device_attribute(cudaDevAttrMultiProcessorCount, processors);
  if (error == cudaSuccess && kShared > 47 * 1024)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
  if (error != cudaSuccess) return error;
  const long long turns = (p.a.rows - 1) / (processors * resident<Top>()) + 1;  // of each block, as many of all
  const dim3 grid(static_cast<unsigned>((p.a.rows - 1) / turns + 1));
  // blocks that keep a place for long must not take it while others still run: the last to find one would end late
  const bool early = turns == 1;
  return launch(kernel, p, grid, threads<Top>(), stream, kShared, early);
}

// Whether a call is of this kind, beyond what holds for every call.
inline bool of_halves(const QuambaGate& a) {
  auto whole = [](const void* data, long long stride) {
    return reinterpret_cast<unsigned long long>(data) % 16 == 0 && stride % 8 == 0;
  };
  const bool gate_fits = a.z ? a.z_dtype == a.y_dtype : !a.norm_groups && !a.weight;
  return a.block == a.I && a.I % kTile == 0 && size_of(a.y_dtype) == 2 && gate_fits && whole(a.y, a.y_stride) &&
         whole(a.z, a.z_stride) && whole(a.u, 0) && whole(a.z_scale, 0) && whole(a.weight, 0) &&
         (a.norm_groups <= 1 || a.I / kTile % a.norm_groups == 0);
}

// QUAMBA_UNSUPPORTED where I is another than these.
inline int run_halves(const QuambaGate& a, float gain, void* stream) {
  const Halves p{a, gain};
  switch (a.I / kTile) {
    case 8: return launch_halves<8>(p, stream);
    case 12: return launch_halves<12>(p, stream);
    case 16: return launch_halves<16>(p, stream);
    case 20: return launch_halves<20>(p, stream);
    case 32: return launch_halves<32>(p, stream);
    case 40: return launch_halves<40>(p, stream);
    default: return QUAMBA_UNSUPPORTED;
  }
}

}  // namespace quamba::gate
