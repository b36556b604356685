// The channels of an int4 weight that whole tiles of gemm_w4_sm90.cuh leave over, where tiles of their own would take
// another wave: dt's of Mamba2. One warp of each block multiplies them by mma.sync while the others work on tiles.
#pragma once

#include "finish.cuh"
#include "mma.cuh"
#include "operand_w4.cuh"

namespace quamba::w4 {

constexpr int kRestTokens = 410;  // a piece takes as long as so many tokens of a tile: mma.sync waits for wgmma

struct Rest {
  const int8_t* x;
  const unsigned* w;
  int first, pieces, across;  // first: channel; pieces of 16 tokens by 16 channels, in all and next to each other
};

// Whether a problem can be cut so: 16-bit or fp32 results without a residual.
inline bool leaves_rest(const QuambaLinear& a) {
  return a.O % kTileO && a.O > kTileO && !a.residual && !a.out_scale && static_cast<long long>(a.M) * a.K < 1LL << 31;
}

inline Rest rest_of(const QuambaLinear& a, int first) {
  const int across = (a.O - first + 15) / 16;
  return {static_cast<const int8_t*>(a.x),
          static_cast<const unsigned*>(a.w),
          first,
          (a.M + 15) / 16 * across,
          across};
}

__device__ __forceinline__ void multiply_rest(const Rest& r, const Weights& w, const Finish& p) {
  using Op = Operand<int8_t>;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll 1
  for (int piece = blockIdx.x; piece < r.pieces; piece += gridDim.x) {
    const int token = piece / r.across * 16 + g, channel = r.first + piece % r.across * 16;
    unsigned x[2], codes[2], multiplier[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int n = min(channel + 8 * i + g, w.O - 1);
      x[i] = min(token + 8 * i, w.M - 1) * w.K + 8 * t, codes[i] = n * (w.K / 8) + t, multiplier[i] = n * w.groups;
    }
    int acc[2][4] = {};
#pragma unroll 1
    for (int k = 0; k < w.K; k += kTileK) {
      uint2 of_x[2][4];
      unsigned word[2][4];
      Op::Factor factor[2];
      const int group = w.group(k);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int s = 0; s < 4; ++s) {
          of_x[i][s] = __ldcg(reinterpret_cast<const uint2*>(r.x + (x[i] + k + 32 * s)));
          word[i][s] = __ldg(r.w + (codes[i] + k / 8 + 4 * s));
        }
        factor[i] = Op::factor(__ldg(static_cast<const uint8_t*>(w.scale) + (multiplier[i] + group)));
      }
#pragma unroll
      for (int s = 0; s < 4; ++s)
#pragma unroll
        for (int i = 0; i < 2; ++i)
          mma_s8(acc[i], of_x[0][s].x, of_x[1][s].x, of_x[0][s].y, of_x[1][s].y,
                 Op::four(word[i][s], Op::selector(0), factor[i]), Op::four(word[i][s], Op::selector(1), factor[i]));
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = token + 8 * h;
      if (row >= p.M) continue;
      const float x_scale = __ldcg(p.x_scale + row * p.x_step);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int n = channel + 8 * i + 2 * t;
        if (n >= p.O) continue;
        float v[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          v[e] = __fmul_rn(__fmul_rn(static_cast<float>(acc[i][2 * h + e]), x_scale), __ldg(p.w_scale + n + e));
          v[e] = __fadd_rn(v[e], p.bias ? load_one(p.bias, p.bias_dtype, n + e) : 0.f);
        }
        const long long at = static_cast<long long>(row) * p.O + n;
        if (p.y_dtype == QUAMBA_F32)
          *reinterpret_cast<float2*>(static_cast<float*>(p.y) + at) = make_float2(v[0], v[1]);
        else
          *reinterpret_cast<unsigned*>(static_cast<unsigned short*>(p.y) + at) =
              pack_pair(v[0], v[1], p.y_dtype == QUAMBA_F16);
      }
    }
  }
}

}  // namespace quamba::w4
