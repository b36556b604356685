// gate_output where y and z have 16 bits and one Hadamard matrix rotates the whole row of I = Top x 256 channels: what a
// quantised model runs. A row a block.
//
// A warp takes tiles of 256 channels, eight neighbours a lane, and rotates each by the tensor cores as H X H, H the
// Sylvester matrix of order 16: X is the second operand of the first product, whose result lies as the first operand of
// the second does. Every factor is split into two of tf32, which keeps 22 bits. Then each thread takes one or two
// columns of all Top tiles through shared memory and the base matrix (with what is left of the factors 2), from where the
// codes leave. The factor of a norm over the whole row is taken on the way out, those of groups (whole tiles) as a
// column is read.
#pragma once

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

// Blocks of a multiprocessor, so that registers are few enough for them.
template <int Top>
constexpr int resident() {
  return Top <= 20 ? 6 : Top <= 32 ? 4 : 3;
}

// Bits 2 and 3 of a channel change places in shared memory, so that a lane stores quads; bit 5 changes the place of
// quads, so that the eight lanes of a store fall into different banks.
__device__ __forceinline__ int place(int at) { return at ^ (at >> 5 & 1) << 2; }
__device__ __forceinline__ int channel_at(int at) { return (at & 0xf3) | (at & 4) << 1 | (at & 8) >> 1; }

// A float as the sum of two with 11 significant bits.
struct Split {
  float high, low;
};

__device__ __forceinline__ Split split(float v, unsigned upper) {
  const float high = __uint_as_float(__float_as_uint(v) & upper);
  return {high, v - high};
}

// Rotates tiles, of which a lane has the channels from 8 (lane / 4) + 64 (lane % 4) on. Bits 1, 2, 6, 7 of a channel are
// summed over by the first product, the others by the second.
class TileRotation {
 public:
  __device__ __forceinline__ TileRotation(int lane, const Halves& p) : upper_(p.upper) {
    const int q = lane % 4, g = lane / 4;
    const float one = __popc(q & g >> 1) % 2 ? -1.f : 1.f;
#pragma unroll
    for (int k = 0; k < 2; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i) signs_[k][i] = (k && g % 2 ? -one : one) * p.signs[i];
    at_ = place(8 * (g % 2) + 16 * q + 64 * (g / 2));
  }

  __device__ __forceinline__ void operator()(const float (&v)[kLane], float* tile) const {
    float middle[2][4] = {}, out[2][4] = {};
#pragma unroll
    for (int k = 0; k < 2; ++k)
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        const float(&h)[4] = signs_[k];
        const Split a = split(v[4 * k + t], upper_), b = split(v[4 * k + 2 + t], upper_);
        mma_tf32(middle[t], h[0], h[1], h[2], h[3], a.high, b.high);
        mma_tf32(middle[t], h[0], h[1], h[2], h[3], a.low, b.low);
      }
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
#pragma unroll
    for (int t = 0; t < 2; ++t)
      *reinterpret_cast<float4*>(tile + (at_ ^ 4 * t)) = make_float4(out[t][0], out[t][1], out[t][2], out[t][3]);
  }

 private:
  float signs_[2][4];
  int at_;
  unsigned upper_;
};

// Eight constants of a model from a multiple of 8 on, through L1.
__device__ __forceinline__ void constant_octet(const void* data, int type, int at, float (&v)[kLane]) {
  if (type == QUAMBA_F32) {
    const float4* p = reinterpret_cast<const float4*>(static_cast<const float*>(data) + at);
    const float4 low = __ldg(p), high = __ldg(p + 1);
    v[0] = low.x, v[1] = low.y, v[2] = low.z, v[3] = low.w, v[4] = high.x, v[5] = high.y, v[6] = high.z, v[7] = high.w;
    return;
  }
  const uint4 raw = __ldg(reinterpret_cast<const uint4*>(static_cast<const unsigned short*>(data) + at));
  const unsigned words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = type == QUAMBA_F16 ? pair_of<true>(words[i]) : pair_of<false>(words[i]);
    v[2 * i] = pair.x, v[2 * i + 1] = pair.y;
  }
}

// Half: fp16, else bf16. Static: codes with the one scale.
template <int Top, bool Half, bool Static>
__global__ void __launch_bounds__(threads<Top>(), resident<Top>()) gate_halves(const __grid_constant__ Halves p) {
  constexpr int kColumns = columns<Top>(), kWarps = threads<Top>() / 32;
  static_assert(Top % kWarps == 0);
  __shared__ __align__(16) float row[Top * kTile];
  __shared__ float sums[Top], factors[Top], peaks[32];
  const QuambaGate& a = p.a;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const long long index = blockIdx.x;
  launch_dependents();

  const int begin = kTile * warp + 8 * (lane / 4) + 64 * (lane % 4);
  const unsigned short* const y = static_cast<const unsigned short*>(a.y) + index * a.y_stride + begin;
  const unsigned short* const z = static_cast<const unsigned short*>(a.z) + index * a.z_stride + begin;
  auto load = [](const unsigned short* from, int at) { return __ldcg(reinterpret_cast<const uint4*>(from + at)); };
  float inverse = 1.f;
  if (Static) inverse = reciprocal_approximate(__ldg(a.out_scale));
  const TileRotation rotate(lane, p);
  wait_for_previous_kernel();
  uint4 raw_y = load(y, 0), raw_z = load(z, 0);
  float sum = 0.f;
#pragma unroll 1
  for (int tile = warp, at = 0; tile < Top; tile += kWarps, at += kWarps * kTile) {
    const unsigned y_words[4] = {raw_y.x, raw_y.y, raw_y.z, raw_y.w}, z_words[4] = {raw_z.x, raw_z.y, raw_z.z, raw_z.w};
    float g[kLane], v[kLane];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = pair_of<Half>(z_words[i]);
      g[2 * i] = pair.x, g[2 * i + 1] = pair.y;
    }
    if (a.z_scale) {
      float scale[kLane];
      if (a.z_scale_count == 1) {
        const float one = __ldg(a.z_scale);
#pragma unroll
        for (int i = 0; i < kLane; ++i) scale[i] = one;
      } else {
        constant_octet(a.z_scale, QUAMBA_F32, begin + at, scale);
      }
#pragma unroll
      for (int i = 0; i < kLane; ++i) g[i] = __fmul_rn(code_on(g[i], make_grid(scale[i])), scale[i]);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = pair_of<Half>(y_words[i]);
      v[2 * i] = pair.x * silu(g[2 * i]), v[2 * i + 1] = pair.y * silu(g[2 * i + 1]);
    }
    if (tile + kWarps < Top) raw_y = load(y, at + kWarps * kTile), raw_z = load(z, at + kWarps * kTile);
#pragma unroll
    for (int i = 0; i < kLane; ++i) sum += v[i] * v[i];
    if (a.norm_groups > 1) {
      sum = warp_sum(sum);
      if (lane == 0) sums[tile] = sum;
      sum = 0.f;
    }
    if (a.weight) {
      float weight[kLane];
      constexpr int kType = Half ? QUAMBA_F16 : QUAMBA_BF16;
      if (a.weight_dtype == kType)
        constant_octet(a.weight, kType, begin + at, weight);
      else
        constant_octet(a.weight, a.weight_dtype, begin + at, weight);
#pragma unroll
      for (int i = 0; i < kLane; ++i) v[i] *= weight[i];
    }
    rotate(v, row + tile * kTile);
  }
  if (a.norm_groups == 1) {
    sum = warp_sum(sum);
    if (lane == 0) sums[warp] = sum;
  }
  __syncthreads();

  const int column = kColumns * thread, low = channel_at(column);
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
  if (a.norm_groups == 1) {
    float total = 0.f;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) total += sums[i];
    gain *= rsqrtf(total * (1.f / (Top * kTile)) + a.eps);
  } else if (a.norm_groups > 1) {
    if (thread < Top) {
      const int tiles = Top / a.norm_groups, from = thread / tiles * tiles;  // of a group
      float total = 0.f;
      for (int i = 0; i < tiles; ++i) total += sums[from + i];
      factors[thread] = rsqrtf(total / static_cast<float>(tiles * kTile) + a.eps);
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < Top; ++r)
#pragma unroll
      for (int c = 0; c < kColumns; ++c) top[c][r] *= factors[r];
  }
#pragma unroll
  for (int c = 0; c < kColumns; ++c) rotate_tiles(top[c]);

  float factor = gain;  // from what lies in top to codes, or to u
  if (Static) {
    factor = gain * inverse;
  } else if (a.u_scale) {
    float peak = 0.f;
#pragma unroll
    for (int c = 0; c < kColumns; ++c)
#pragma unroll
      for (int r = 0; r < Top; ++r) peak = fmaxf(peak, fabsf(top[c][r]));
    peak = gain * block_reduce(peak, peaks, [](float x, float y) { return fmaxf(x, y); });
    const float u_scale = peak > 0.f ? __fdiv_rn(peak, 127.f) : 1.f;
    if (thread == 0) a.u_scale[index] = u_scale;
    factor = __fdiv_rn(gain, u_scale);
  }
  const long long out = index * a.I + low;
  if (Static || a.u_scale) {
    auto* const codes = static_cast<unsigned char*>(a.u) + out;
    const float step = factor * (1.f / 254.f);
#pragma unroll
    for (int r = 0; r < Top; ++r) {
      const unsigned code = code_bits(top[0][r], step);
      if constexpr (kColumns == 2)
        *reinterpret_cast<unsigned short*>(codes + r * kTile) = __byte_perm(code, code_bits(top[1][r], step), 0x0040);
      else
        codes[r * kTile] = code;
    }
    return;
  }
  if constexpr (!Static)
#pragma unroll
    for (int c = 0; c < kColumns; ++c)
#pragma unroll
      for (int r = 0; r < Top; ++r)
        store_raw(a.u, a.u_dtype, out + r * kTile + c,
                  to_raw(make_float4(top[c][r] * factor, 0.f, 0.f, 0.f), a.u_dtype), 1, false);
}

template <int Top>
int launch_halves(const Halves& p, void* stream) {
  auto kernel = [&](auto half) {
    constexpr bool kHalf = decltype(half)::value;
    return p.a.out_scale && !p.a.u_scale ? gate_halves<Top, kHalf, true> : gate_halves<Top, kHalf, false>;
  };
  return launch(p.a.y_dtype == QUAMBA_F16 ? kernel(std::true_type{}) : kernel(std::false_type{}), p,
                dim3(static_cast<unsigned>(p.a.rows)), threads<Top>(), stream);
}

// Whether a call is of this kind, beyond what holds for every call.
inline bool of_halves(const QuambaGate& a) {
  auto whole = [](const void* data, long long stride) {
    return reinterpret_cast<unsigned long long>(data) % 16 == 0 && stride % 8 == 0;
  };
  return a.block == a.I && a.I % kTile == 0 && size_of(a.y_dtype) == 2 && a.z_dtype == a.y_dtype &&
         whole(a.y, a.y_stride) && whole(a.z, a.z_stride) && whole(a.u, 0) && whole(a.z_scale, 0) &&
         whole(a.weight, 0) && (a.norm_groups <= 1 || a.I / kTile % a.norm_groups == 0);
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
