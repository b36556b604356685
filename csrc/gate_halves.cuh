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
template <int Top, bool Static>
constexpr int resident() {
  return Top > 32 ? 3 : Top > 20 ? 4 : Static ? 8 : 6;
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
  const float4 low = constant_quad(data, type, at), high = constant_quad(data, type, at + 4);
  v[0] = low.x, v[1] = low.y, v[2] = low.z, v[3] = low.w, v[4] = high.x, v[5] = high.y, v[6] = high.z, v[7] = high.w;
}

// Half: fp16, else bf16. Static: codes with the one scale.
template <int Top, bool Half, bool Static>
__global__ void __launch_bounds__(threads<Top>(), resident<Top, Static>()) gate_halves(const __grid_constant__ Halves p) {
  constexpr int kColumns = columns<Top>(), kWarps = threads<Top>() / 32, kTurns = Top / kWarps;
  constexpr int kType = Half ? QUAMBA_F16 : QUAMBA_BF16;
  static_assert(Top % kWarps == 0);
  __shared__ __align__(16) float row[Top * kTile];  // of each tile: y and z, a lane's beside each other, then floats
  __shared__ float sums[Top], factors[Top], peaks[32];
  const QuambaGate& a = p.a;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const long long index = blockIdx.x;
  launch_dependents();

  const int begin = kTile * warp + kLane * lane;
  float* tile = row + kTile * warp;
  const TileRotation rotate(lane, p);
  wait_for_previous_kernel();
  {
    const unsigned short* y = static_cast<const unsigned short*>(a.y) + index * a.y_stride + begin;
    const unsigned short* z = static_cast<const unsigned short*>(a.z) + index * a.z_stride + begin;
    uint4* to = reinterpret_cast<uint4*>(tile) + lane;
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn, to += kWarps * kTile / 4, y += kWarps * kTile, z += kWarps * kTile) {
      copy_async(to, y, true);
      copy_async(to + 32, z, true);
      copy_async_commit();
    }
  }
  float sum = 0.f;
#pragma unroll 1
  for (int turn = 0, at = begin; turn < kTurns; ++turn, at += kWarps * kTile, tile += kWarps * kTile) {
    uint4 raw_weight;
    const bool alike = a.weight && a.weight_dtype == kType;
    if (alike) raw_weight = __ldg(reinterpret_cast<const uint4*>(static_cast<const unsigned short*>(a.weight) + at));
    float scale[kLane];
    if (a.z_scale) {
      if (a.z_scale_count == 1) {
        const float one = __ldg(a.z_scale);
#pragma unroll
        for (int i = 0; i < kLane; ++i) scale[i] = one;
      } else {
        constant_octet(a.z_scale, QUAMBA_F32, at, scale);
      }
    }
    copy_async_wait_but<kTurns - 1>();
    copy_async_commit();  // of nothing, so that the same number may be on their way next time
    float g[kLane], v[kLane];
    octet<Half>(reinterpret_cast<const uint4*>(tile)[lane + 32], g);
    if (a.z_scale)
#pragma unroll
      for (int i = 0; i < kLane; ++i) g[i] = __fmul_rn(code_on(g[i], make_grid(scale[i])), scale[i]);
    octet<Half>(reinterpret_cast<const uint4*>(tile)[lane], v);
#pragma unroll
    for (int i = 0; i < kLane; ++i) v[i] *= silu(g[i]);
#pragma unroll
    for (int i = 0; i < kLane; ++i) sum += v[i] * v[i];
    if (a.norm_groups > 1) {
      sum = warp_sum(sum);
      if (lane == 0) sums[turn * kWarps + warp] = sum;
      sum = 0.f;
    }
    if (a.weight) {
      float weight[kLane];
      if (alike)
        octet<Half>(raw_weight, weight);
      else
        constant_octet(a.weight, a.weight_dtype, at, weight);
#pragma unroll
      for (int i = 0; i < kLane; ++i) v[i] *= weight[i];
    }
    __syncwarp();  // all have read y and z, in whose place the floats come
    rotate(v, tile);
  }
  if (a.norm_groups == 1) {
    sum = warp_sum(sum);
    if (lane == 0) sums[warp] = sum;
  }
  __syncthreads();

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
  }
  const int column = kColumns * thread;
  auto take = [&](int c, float (&top)[Top]) {  // a column, rotated
#pragma unroll
    for (int r = 0; r < Top; ++r) top[r] = row[r * kTile + place(column) + c];
    if (a.norm_groups > 1)
#pragma unroll
      for (int r = 0; r < Top; ++r) top[r] *= factors[r];
    rotate_tiles(top);
  };
  const long long out = index * a.I + channel_at(column);
  if constexpr (Static) {
    auto* const codes = static_cast<unsigned char*>(a.u) + out;
    const float step = gain * reciprocal_approximate(__ldg(a.out_scale)) * (1.f / 254.f);
    float top[Top];
    take(0, top);
    if constexpr (kColumns == 1) {
#pragma unroll
      for (int r = 0; r < Top; ++r) codes[r * kTile] = code_bits(top[r], step);
    } else {
      unsigned first[Top / 4];  // codes of the first column, four tiles a word
#pragma unroll
      for (int r = 0; r < Top; r += 4)
        first[r / 4] = __byte_perm(__byte_perm(code_bits(top[r], step), code_bits(top[r + 1], step), 0x0040),
                                   __byte_perm(code_bits(top[r + 2], step), code_bits(top[r + 3], step), 0x0040), 0x5410);
      take(1, top);
#pragma unroll
      for (int r = 0; r < Top; ++r)
        *reinterpret_cast<unsigned short*>(codes + r * kTile) =
            __byte_perm(first[r / 4], code_bits(top[r], step), 0x0040 | r % 4);
    }
  } else {
    float top[kColumns][Top], peak = 0.f;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) take(c, top[c]);
    if (!a.u_scale) {
#pragma unroll
      for (int c = 0; c < kColumns; ++c)
#pragma unroll
        for (int r = 0; r < Top; ++r)
          store_raw(a.u, a.u_dtype, out + r * kTile + c,
                    to_raw(make_float4(top[c][r] * gain, 0.f, 0.f, 0.f), a.u_dtype), 1, false);
      return;
    }
#pragma unroll
    for (int c = 0; c < kColumns; ++c)
#pragma unroll
      for (int r = 0; r < Top; ++r) peak = fmaxf(peak, fabsf(top[c][r]));
    peak = gain * block_reduce(peak, peaks, [](float x, float y) { return fmaxf(x, y); });
    const float u_scale = peak > 0.f ? __fdiv_rn(peak, 127.f) : 1.f, step = __fdiv_rn(gain, u_scale) * (1.f / 254.f);
    if (thread == 0) a.u_scale[index] = u_scale;
#pragma unroll
    for (int c = 0; c < kColumns; ++c)
#pragma unroll
      for (int r = 0; r < Top; ++r)
        static_cast<unsigned char*>(a.u)[out + r * kTile + c] = code_bits(top[c][r], step);
  }
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
