// The second kernel of a decode step: what needs a whole token. u [B, I] fp32, gated already -> norm within groups, gain,
// Hadamard rotation, quantisation. One block a token, two, four or eight quads of channels a thread.
//
// More blocks shift the convolution's state of B and C, which the first kernel's blocks of a group share and only read,
// and a thread advances the step of the stochastic rounding, which they all read: the boundary between the two kernels
// is the barrier that this takes.
#include <algorithm>
#include <type_traits>

#include "decode_finish.cuh"
#include "finish.cuh"

namespace quamba::decode {

constexpr int kRun = 32;  // channels that belong to one group of the norm
constexpr int kMaxRows = 16384;

// Threads of a token: 2 quads each where the registers allow it, since latency is all that a token takes.
template <int QUADS>
constexpr int kMaxThreads = QUADS == 2 ? 640 : 512;

template <int QUADS, int MAX_BASE>
__global__ void __launch_bounds__(kMaxThreads<QUADS>) decode_finish(const __grid_constant__ FinishParams p) {
  extern __shared__ __align__(16) char shared[];
  const QuambaDecode& q = p.q;
  const int inner = p.channels, lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;

  if (blockIdx.x >= q.batch) {
    wait_for_previous_kernel();
    launch_dependents();
    shift_shared(p, blockIdx.x - q.batch, gridDim.x - q.batch);
    return;
  }

  float* const row = reinterpret_cast<float*>(shared);
  float* const runs = row + padded(inner);  // sums of squares of kRun channels
  float* const groups = runs + inner / kRun;
  float* const peaks = groups + (q.norm_groups + 3) / 4 * 4;  // of warps
  float* const squares = peaks + warps;                         // sums of the warps, where there is one group

  uint4 gain[QUADS];  // as they lie
  const float out_scale = constant(q.out_scale, 0, 1.f);
#pragma unroll
  for (int i = 0; i < QUADS; ++i) gain[i] = make_uint4(0, 0, 0, 0);
  // the type is asked for once, so that no load waits for another that might have filled the same registers
  if (q.norm_weight && q.norm_weight_type == QUAMBA_F32) {
#pragma unroll
    for (int i = 0; i < QUADS; ++i) {
      const int at = i * blockDim.x + threadIdx.x;
      if (at * 4 < inner) gain[i] = constant_quad(static_cast<const uint4*>(q.norm_weight) + at);
    }
  } else if (q.norm_weight) {
#pragma unroll
    for (int i = 0; i < QUADS; ++i) {
      const int at = i * blockDim.x + threadIdx.x;
      if (at * 4 >= inner) continue;
      const uint2 two = constant_pair(static_cast<const uint2*>(q.norm_weight) + at);
      gain[i].x = two.x, gain[i].y = two.y;
    }
  }

  wait_for_previous_kernel();
  // not earlier: while the first kernel runs, blocks of the next linear would crowd where there is room for several
  launch_dependents();
  const long long start = static_cast<long long>(blockIdx.x) * inner;
  const float4* const u = reinterpret_cast<const float4*>(static_cast<const float*>(q.workspace) + start);
  float v[QUADS][4];
#pragma unroll
  for (int i = 0; i < QUADS; ++i) {
    const int at = i * blockDim.x + threadIdx.x;
    const float4 four = at * 4 < inner ? __ldcg(u + at) : make_float4(0.f, 0.f, 0.f, 0.f);
    v[i][0] = four.x, v[i][1] = four.y, v[i][2] = four.z, v[i][3] = four.w;
  }
  if (blockIdx.x == 0 && threadIdx.x == 0 && q.rng) q.rng[1] = __ldcg(q.rng + 1) + 1;

  // the inverse of the one group's norm passes through the rotation, and so waits for the barrier that this needs anyway
  const bool late = q.norm_groups == 1;
  if (late) {
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < QUADS; ++i)
      sum += v[i][0] * v[i][0] + v[i][1] * v[i][1] + v[i][2] * v[i][2] + v[i][3] * v[i][3];
    sum = sum_lanes<32>(sum);
    if (lane == 0) squares[warp] = sum;
  } else if (q.norm_groups) {
#pragma unroll
    for (int i = 0; i < QUADS; ++i) {
      const int at = (i * blockDim.x + threadIdx.x) * 4;
      const float sum = sum_lanes<kRun / 4>(v[i][0] * v[i][0] + v[i][1] * v[i][1] + v[i][2] * v[i][2] +
                                            v[i][3] * v[i][3]);
      if (at < inner && lane % (kRun / 4) == 0) runs[at / kRun] = sum;
    }
    __syncthreads();
    const int group_runs = inner / q.norm_groups / kRun;
    for (int g = warp; g < q.norm_groups; g += warps) {
      float sum = 0.f;
      for (int i = lane; i < group_runs; i += 32) sum += runs[g * group_runs + i];
      sum = sum_lanes<32>(sum);
      if (lane == 0) groups[g] = rsqrtf(sum / static_cast<float>(group_runs * kRun) + q.eps);
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < QUADS; ++i) {
      const int at = (i * blockDim.x + threadIdx.x) * 4;
      const float inverse = at < inner ? groups[at / (group_runs * kRun)] : 0.f;
#pragma unroll
      for (int j = 0; j < 4; ++j) v[i][j] *= inverse;
    }
  }
  if (q.norm_weight) {
    const auto multiply = [&](auto wide, int type) __attribute__((always_inline)) {
#pragma unroll
      for (int i = 0; i < QUADS; ++i) {
        v[i][0] *= to_float(gain[i].x, type), v[i][1] *= to_float(wide ? gain[i].y : gain[i].x >> 16, type);
        v[i][2] *= to_float(wide ? gain[i].z : gain[i].y, type);
        v[i][3] *= to_float(wide ? gain[i].w : gain[i].y >> 16, type);
      }
    };
    if (q.norm_weight_type == QUAMBA_F32) multiply(std::true_type{}, QUAMBA_F32);
    if (q.norm_weight_type == QUAMBA_F16) multiply(std::false_type{}, QUAMBA_F16);
    if (q.norm_weight_type == QUAMBA_BF16) multiply(std::false_type{}, QUAMBA_BF16);
  }

  if (p.rotation.base) {
#pragma unroll
    for (int i = 0; i < QUADS; ++i) {
      const int at = (i * blockDim.x + threadIdx.x) * 4;
      if (at < inner)
#pragma unroll
        for (int j = 0; j < 4; ++j) row[padded(at) + j] = v[i][j];
    }
    __syncthreads();
    rotate<MAX_BASE>(row, inner, p.rotation);
#pragma unroll
    for (int i = 0; i < QUADS; ++i) {
      const int at = (i * blockDim.x + threadIdx.x) * 4;
      if (at < inner)
#pragma unroll
        for (int j = 0; j < 4; ++j) v[i][j] = row[padded(at) + j] * p.rotation.gain;
    }
  } else if (late) {
    __syncthreads();
  }
  if (late) {
    const float sum = sum_lanes<32>(lane < warps ? squares[lane] : 0.f);
    const float inverse = rsqrtf(sum / static_cast<float>(inner) + q.eps);
#pragma unroll
    for (int i = 0; i < QUADS; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) v[i][j] *= inverse;
  }

  float scale = out_scale;
  if (q.token_scale) {
    float peak = 0.f;
#pragma unroll
    for (int i = 0; i < QUADS; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) peak = fmaxf(peak, fabsf(v[i][j]));
    peak = max_lanes<32>(peak);
    if (lane == 0) peaks[warp] = peak;
    __syncthreads();
    peak = peaks[0];
    for (int w = 1; w < warps; ++w) peak = fmaxf(peak, peaks[w]);
    scale = peak > 0.f ? __fdiv_rn(peak, 127.f) : 1.f;
    if (threadIdx.x == 0) q.token_scale[blockIdx.x] = scale;
  }

  const float inverse = __frcp_rn(scale);
#pragma unroll
  for (int i = 0; i < QUADS; ++i) {
    const int quad = i * blockDim.x + threadIdx.x;
    if (quad * 4 >= inner) continue;
    const long long at = start / 4 + quad;
    if (q.out_scale || q.token_scale) {
      unsigned code[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) code[j] = to_code(v[i][j], scale, inverse);
      static_cast<unsigned*>(q.out)[at] =
          __byte_perm(__byte_perm(code[0], code[1], 0x0040), __byte_perm(code[2], code[3], 0x0040), 0x5410);
    } else if (q.out_type == QUAMBA_F32) {
      static_cast<float4*>(q.out)[at] = make_float4(v[i][0], v[i][1], v[i][2], v[i][3]);
    } else {
      const bool half = q.out_type == QUAMBA_F16;
      static_cast<uint2*>(q.out)[at] =
          make_uint2(pack_pair(v[i][0], v[i][1], half), pack_pair(v[i][2], v[i][3], half));
    }
  }
}

bool can_finish(const QuambaDecode& q, Rotation& rotation) {
  const int inner = q.H * q.P, groups = q.norm_groups;
  for (const void* p : {static_cast<const void*>(q.state), static_cast<const void*>(q.workspace), q.conv_weight,
                        q.norm_weight, static_cast<const void*>(q.out)})
    if (reinterpret_cast<uintptr_t>(p) % 16) return false;
  return q.batch > 0 && inner % kRun == 0 && inner <= kMaxRows && groups >= 0 &&
         (!groups || inner % (groups * kRun) == 0) && make_rotation(q.block, rotation) &&
         (!rotation.base || inner % q.block == 0) && q.workspace_bytes >= 4ll * q.batch * inner;
}

cudaError_t launch_finish(const QuambaDecode& q, const Rotation& rotation, int shared_channels, int sms, void* stream) {
  const int inner = q.H * q.P, small = rotation.base <= 20;
  const FinishParams params{q, rotation, inner, shared_channels, false};
  if (can_slice(params, sms)) return launch_slices(params, stream);
  const int quads = small && inner <= 8 * kMaxThreads<2> ? 2 : inner <= 16 * kMaxThreads<4> ? 4 : 8;
  const int least = quads == 2 ? 64 : 128, most = quads == 2 ? kMaxThreads<2> : kMaxThreads<4>;
  const int threads = std::max(least, std::min(most, (inner / 4 / quads + 31) / 32 * 32));
  const int bytes = 4 * (padded(inner) + inner / kRun + (q.norm_groups + 3) / 4 * 4 + threads / 32 * 2);
  const dim3 grid(q.batch + shifters(q, shared_channels, threads));
  const auto kernel = quads == 2 ? decode_finish<2, 20>
                      : small    ? (quads == 4 ? decode_finish<4, 20> : decode_finish<8, 20>)
                                 : (quads == 4 ? decode_finish<4, 36> : decode_finish<8, 36>);
  return launch(kernel, params, grid, threads, bytes, stream);
}

}  // namespace quamba::decode
