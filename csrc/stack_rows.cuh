// A row of activations in registers, as every block makes it for itself: norm, rotation, and the input of a linear.
#pragma once

#include "finish.cuh"
#include "quads.cuh"
#include "stack_params.cuh"

namespace quamba::stack {

// A quad of channels for each i: channels 4 (i kTeam + threadIdx.x) on. Loops over i end where a row does.
using Quads = float[kQuads][4];

__device__ __forceinline__ int quad_of(int i) { return i * kTeam + threadIdx.x; }

#define QUAMBA_EACH_QUAD(i, channels)            \
  _Pragma("unroll") for (int i = 0; i < kQuads; ++i) \
    if (i * kTeam * 4 < (channels))

// The gains of a norm, of the activations' type, as they lie.
using RawQuads = uint2[kQuads];

__device__ __forceinline__ void load_gains(RawQuads& raw, const void* weight, int channels) {
  if (!weight) return;
  QUAMBA_EACH_QUAD(i, channels) {
    raw[i] = make_uint2(0, 0);
    if (quad_of(i) * 4 < channels) raw[i] = constant_pair(static_cast<const uint2*>(weight) + quad_of(i));
  }
}

// v <- v / rms(v) * gain, the root mean square being that of each group of channels. runs: a float for every kRun channels.
template <bool HALF>
__device__ __forceinline__ void normalise(Quads& v, int channels, const Groups& g, float eps, bool weighted,
                                          const RawQuads& gain, float* runs) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float squares = 0.f;
  QUAMBA_EACH_QUAD(i, channels) {
    const float low = v[i][0] * v[i][0] + v[i][1] * v[i][1], high = v[i][2] * v[i][2] + v[i][3] * v[i][3];
    squares += low + high;
    if (g.count > 1) {  // zeros beyond the row
      const float sum = decode::sum_lanes<32>(low + high);
      if (lane == 0) runs[i * kWarps + warp] = sum;
    }
  }
  if (g.count == 1) {
    squares = decode::sum_lanes<32>(squares);
    if (lane == 0) runs[warp] = squares;
  }
  Team::sync();
  float inverse = 0.f;
  if (g.count == 1) inverse = rsqrtf(decode::sum_lanes<kWarps>(runs[lane % kWarps]) * g.share + eps);
  QUAMBA_EACH_QUAD(i, channels) {
    if (g.count > 1) {
      const float* const from = runs + (i * kWarps + warp & -g.runs);
      float sum = lane < g.runs ? from[lane] : 0.f;
      if (lane + 32 < g.runs) sum += from[lane + 32];
      inverse = rsqrtf(decode::sum_lanes<32>(sum) * g.share + eps);
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) v[i][j] = __fmul_rn(v[i][j], inverse);
    if (weighted) {
      const float2 low = pair_of<HALF>(gain[i].x), high = pair_of<HALF>(gain[i].y);
      v[i][0] = __fmul_rn(v[i][0], low.x), v[i][1] = __fmul_rn(v[i][1], low.y);
      v[i][2] = __fmul_rn(v[i][2], high.x), v[i][3] = __fmul_rn(v[i][3], high.y);
    }
  }
}

// The rotation of hadamard.cuh, of 5 factors 2 or more: two within a thread's quads, three at a time through shared memory, then
// the base.
__device__ __forceinline__ void rotate(Quads& v, float* row, int channels, const Rotation& r) {
  float4* const own = reinterpret_cast<float4*>(row + Team::place(threadIdx.x * 4));
  constexpr int kNext = Team::place(kTeam * 4) / 4;
  QUAMBA_EACH_QUAD(i, channels) {
    const float a = v[i][0] + v[i][1], b = v[i][0] - v[i][1], c = v[i][2] + v[i][3], d = v[i][2] - v[i][3];
    v[i][0] = a + c, v[i][1] = b + d, v[i][2] = a - c, v[i][3] = b - d;
    if (quad_of(i) * 4 < channels) own[i * kNext] = make_float4(v[i][0], v[i][1], v[i][2], v[i][3]);
  }
  Team::sync();
  hadamard::pass<8, false, Team, 2>(row, channels, 2);
  int done = 5;
  if (r.bits >= 8) hadamard::pass<8, false, Team, 5>(row, channels, 5), done = 8;
#pragma unroll 1
  for (; r.bits - done >= 3; done += 3) hadamard::pass<8, false, Team>(row, channels, done);
  if (r.bits - done == 2) hadamard::pass<4, false, Team>(row, channels, done);
  if (r.bits - done == 1) hadamard::pass<2, false, Team>(row, channels, done);
  if (r.base == 12) hadamard::pass<12, true, Team, -1, true>(row, channels, r.bits);
  if (r.base == 20) hadamard::pass<20, true, Team, -1, true>(row, channels, r.bits);
  QUAMBA_EACH_QUAD(i, channels)
    if (quad_of(i) * 4 < channels) {
      const float4 q = own[i * kNext];
      v[i][0] = q.x * r.gain, v[i][1] = q.y * r.gain, v[i][2] = q.z * r.gain, v[i][3] = q.w * r.gain;
    }
}

// The larger of two, or the one that is no number.
__device__ __forceinline__ float larger(float a, float b) {
  asm("max.NaN.f32 %0, %0, %1;" : "+f"(a) : "f"(b));
  return a;
}

// The largest of v, of either sign. Numbers of one sign are in order as words, too.
__device__ __forceinline__ float peak_of(const Quads& v, int channels, float* scratch) {
  float peak = 0.f;
  QUAMBA_EACH_QUAD(i, channels)
#pragma unroll
    for (int j = 0; j < 4; ++j) peak = larger(peak, fabsf(v[i][j]));
  unsigned* const of_warps = reinterpret_cast<unsigned*>(scratch);
  const unsigned highest = __reduce_max_sync(~0u, __float_as_uint(peak));
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = highest;
  Team::sync();
  return __uint_as_float(__reduce_max_sync(~0u, of_warps[threadIdx.x % kWarps]));
}

// v as the input of a linear: codes by a static scale or the token's own, or digits of floats of the activations' type. Ends
// with a sync; returns the scale.
template <Kind KIND, bool HALF>
__device__ __forceinline__ float put_input(Quads& v, int channels, float scale, bool is_static, char* x,
                                           float* scratch) {
  if constexpr (!kInteger<KIND>) {
    QUAMBA_EACH_QUAD(i, channels) {
      const float2 low = pair_of<HALF>(pack_pair(v[i][0], v[i][1], HALF));
      const float2 high = pair_of<HALF>(pack_pair(v[i][2], v[i][3], HALF));
      v[i][0] = low.x, v[i][1] = low.y, v[i][2] = high.x, v[i][3] = high.y;
    }
  }
  if (!kInteger<KIND> || !is_static) {
    const float peak = peak_of(v, channels, scratch);
    scale = peak == 0.f ? 1.f : __fdiv_rn(peak, kInteger<KIND> ? 127.f : kMostDigits);
  }
  const Grid grid = make_grid(scale);
  // a warp's quads are a step of int4 weights, of which two lanes have an octet; where they lie is not worth a register
  unsigned thread = threadIdx.x;
  asm volatile("" : "+r"(thread));
  const unsigned lane = thread % 32, octet = lane / 2;
  const bool second = lane % 2;
  char* const step = x + thread / 32 * kStepX<KIND>;
  QUAMBA_EACH_QUAD(i, channels) {
    if (quad_of(i) * 4 < channels) {
      char* const to = step + i * kWarps * kStepX<KIND>;
      unsigned code[4];
      if constexpr (kInteger<KIND>) {
#pragma unroll
        for (int j = 0; j < 4; ++j) code[j] = __float_as_uint(code_on(v[i][j], grid) + kRounder);
        if constexpr (KIND == Kind::kW8A8) {
          reinterpret_cast<unsigned*>(x + thread * 4)[i * kTeam] =
              __byte_perm(__byte_perm(code[0], code[1], 0x0040), __byte_perm(code[2], code[3], 0x0040), 0x5410);
        } else {
          const int even = static_cast<int>(code[0] + code[2] - 2 * __float_as_uint(kRounder));
          const int sum = __reduce_add_sync(~0u, even);
          unsigned short* const pair = reinterpret_cast<unsigned short*>(to + octet / 2 * 16 + octet % 2 * 4 + second * 2);
          pair[0] = static_cast<unsigned short>(__byte_perm(code[0], code[2], 0x0040));
          pair[4] = static_cast<unsigned short>(__byte_perm(code[1], code[3], 0x0040));
          if (lane < 4) reinterpret_cast<int*>(to + kRun)[lane] = sum * -kTooMuch;
        }
      } else {
        // digits are signed: 128 more of each are a byte, from which its upper bit takes them off again
        constexpr unsigned kMiddle = 0x808080u;
        const unsigned off = kMiddle - __float_as_uint(kRounder);
#pragma unroll
        for (int j = 0; j < 4; ++j)
          code[j] = (__float_as_uint(__fmaf_rn(v[i][j], grid.inverse, kRounder)) + off) ^ kMiddle;
        // a word is of two columns of an octet and of the next but one: lanes exchange them, and write a word each
        const bool later = octet & 2;
        unsigned other[2];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          other[j] = __shfl_xor_sync(~0u, later ? code[j] : code[j + 2], 4);
          code[j] = later ? code[j + 2] : code[j];
        }
        unsigned* const word =
            reinterpret_cast<unsigned*>(to + second * (kDigits * kDigitBytes) + octet / 4 * 16 + octet % 2 * 8) + later;
#pragma unroll
        for (int d = 0; d < kDigits; ++d) {
          const unsigned bytes = (later ? 0x0004 : 0x0040) + (kDigits - 1 - d) * 0x0011;
          word[d * (kDigitBytes / 4)] = __byte_perm(__byte_perm(code[0], other[0], bytes),
                                                    __byte_perm(code[1], other[1], bytes), 0x5410);
        }
      }
    }
  }
  Team::sync();
  return scale;
}

}  // namespace quamba::stack
