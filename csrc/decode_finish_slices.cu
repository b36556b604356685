// The second kernel of a decode step (see decode_finish.cu) for few tokens: 16 blocks a token, each with every sixteenth
// channel of the result.
//
// Channel 16 m + s of a row goes through H_16 over s and then through the rest of the rotation over m, which does not mix
// what s has become. So a block that wants the channels 16 m + j takes one sum of 16 channels with the signs of row j for
// every m, in registers, and rotates a row of I / 16: five factors 2 at the most in the lanes of a warp, the rest in shared
// memory. All blocks read the whole row and add up its squares. Nothing here needs what another block has made; a
// scale per token would.
//
// A step reads tens of megabytes of weights a layer, which leave no code in the caches: fetching the instructions takes
// longer than executing them. So a block goes through the motions once, on zeros, before its turn comes.
//
// Two lanes share 32 channels, so that a load of a warp takes whole sectors: lane i has the quads with its parity, and
// after one exchange the sum over the 16 channels of run i.
#include <type_traits>

#include "decode_finish.cuh"
#include "finish.cuh"

namespace quamba::decode {

constexpr int kSliceBits = 4, kSlices = 1 << kSliceBits, kQuads = 4;
constexpr int kSliceThreads = 512;  // the most, a run of 16 channels each
constexpr int kBound = 640;         // for the compiler: registers that leave room for the blocks of both neighbours

__device__ __forceinline__ float flip(float v, unsigned sign) { return __uint_as_float(__float_as_uint(v) ^ sign); }

template <int MAX_BASE>
__global__ void __launch_bounds__(kBound) decode_finish_slices(const __grid_constant__ FinishParams p) {
  extern __shared__ __align__(16) char shared[];
  const QuambaDecode& q = p.q;
  const int inner = p.channels, slices = q.batch * kSlices;
  if (static_cast<int>(blockIdx.x) >= slices) {
    wait_for_previous_kernel();
    launch_dependents();
    shift_shared(p, blockIdx.x - slices, gridDim.x - slices);
    return;
  }
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int token = blockIdx.x / kSlices, slice = blockIdx.x % kSlices;
  const int run = threadIdx.x, odd = lane & 1;
  const bool exists = run * 16 < inner;
  float* const row = reinterpret_cast<float*>(shared);
  float* const squares = row + padded(inner / kSlices) + 1;  // of pairs of lanes, or of warps where there is one group
  float* const groups = squares + inner / 32;

  const int first = run / 2 * 8 + odd;  // a lane's quads: first, first + 2, + 4, + 6
  uint4 gain[kQuads] = {};
  const float scale = constant(q.out_scale, 0, 1.f);
  if (exists && q.norm_weight && q.norm_weight_type == QUAMBA_F32) {
#pragma unroll
    for (int k = 0; k < kQuads; ++k) gain[k] = constant_quad(static_cast<const uint4*>(q.norm_weight) + first + 2 * k);
  } else if (exists && q.norm_weight) {
#pragma unroll
    for (int k = 0; k < kQuads; ++k) {
      const uint2 two = constant_pair(static_cast<const uint2*>(q.norm_weight) + first + 2 * k);
      gain[k].x = two.x, gain[k].y = two.y;
    }
  }

  const long long start = static_cast<long long>(token) * inner;
  const float4* const u = reinterpret_cast<const float4*>(static_cast<const float*>(q.workspace) + start);
  const bool late = q.norm_groups == 1;  // the inverse of one group's norm passes through the rotation
#pragma unroll 1
  for (int real = p.rehearse ? 0 : 1; real < 2; ++real) {
    if (real) {
      wait_for_previous_kernel();
      // not earlier: while the first kernel runs, blocks of the next linear would crowd where there is room for several
      launch_dependents();
    }
    float v[kQuads][4];
#pragma unroll
    for (int k = 0; k < kQuads; ++k) {
      const float4 four = exists && real ? __ldcg(u + first + 2 * k) : make_float4(0.f, 0.f, 0.f, 0.f);
      v[k][0] = four.x, v[k][1] = four.y, v[k][2] = four.z, v[k][3] = four.w;
    }
    if (real && blockIdx.x == 0 && threadIdx.x == 0 && q.rng) q.rng[1] = __ldcg(q.rng + 1) + 1;

    if (q.norm_groups) {
      float sum = 0.f;
#pragma unroll
      for (int k = 0; k < kQuads; ++k)
        sum += v[k][0] * v[k][0] + v[k][1] * v[k][1] + v[k][2] * v[k][2] + v[k][3] * v[k][3];
      sum = late ? sum_lanes<32>(sum) : sum_lanes<2>(sum);
      if (late && lane == 0) squares[warp] = sum;
      if (!late && exists && !odd) squares[run / 2] = sum;
    }
    if (q.norm_weight) {
      const auto multiply = [&](auto wide, int type) __attribute__((always_inline)) {
#pragma unroll
        for (int k = 0; k < kQuads; ++k) {
          v[k][0] *= to_float(gain[k].x, type), v[k][1] *= to_float(wide ? gain[k].y : gain[k].x >> 16, type);
          v[k][2] *= to_float(wide ? gain[k].z : gain[k].y, type);
          v[k][3] *= to_float(wide ? gain[k].w : gain[k].y >> 16, type);
        }
      };
      if (q.norm_weight_type == QUAMBA_F32) multiply(std::true_type{}, QUAMBA_F32);
      if (q.norm_weight_type == QUAMBA_F16) multiply(std::false_type{}, QUAMBA_F16);
      if (q.norm_weight_type == QUAMBA_BF16) multiply(std::false_type{}, QUAMBA_BF16);
    }

    const unsigned sign0 = slice << 31, sign1 = slice >> 1 << 31, sign3 = slice >> 3 << 31;
    const unsigned sign2 = odd ? slice >> 2 << 31 : 0;  // of the lane's quads among the four of a run
    float sums[kQuads];
#pragma unroll
    for (int k = 0; k < kQuads; ++k)
      sums[k] = flip(v[k][0] + flip(v[k][1], sign0) + flip(v[k][2] + flip(v[k][3], sign0), sign1), sign2);
    const float even_run = sums[0] + flip(sums[1], sign3), odd_run = sums[2] + flip(sums[3], sign3);
    float t = (odd ? odd_run : even_run) + __shfl_xor_sync(~0u, odd ? even_run : odd_run, 1);

    if (q.norm_groups > 1) {
      __syncthreads();
      const int group_pairs = inner / q.norm_groups / 32;
      for (int g = warp; g < q.norm_groups; g += warps) {
        float sum = 0.f;
        for (int i = lane; i < group_pairs; i += 32) sum += squares[g * group_pairs + i];
        sum = sum_lanes<32>(sum);
        if (lane == 0) groups[g] = rsqrtf(sum / static_cast<float>(group_pairs * 32) + q.eps);
      }
      __syncthreads();
      if (exists) t *= groups[run / 2 / group_pairs];
    }
    Rotation rest = p.rotation;
    rest.bits -= kSliceBits;
    const int done = rest.bits < kFirstBits ? rest.bits : kFirstBits;
    for (int bit = 0; bit < done; ++bit)
      t = flip(t, (lane >> bit & 1) << 31) + __shfl_xor_sync(~0u, t, 1 << bit);
    if (exists) row[padded(run)] = t;
    __syncthreads();
    rotate<MAX_BASE>(row, inner / kSlices, rest, done);
    float y = exists ? row[padded(run)] * rest.gain : 0.f;
    if (late) {
      float sum = 0.f;
      for (int w = 0; w < warps; ++w) sum += squares[w];
      y *= rsqrtf(sum / static_cast<float>(inner) + q.eps);
    }
    const long long at = start + run * kSlices + slice;
    const unsigned code = to_code(y, scale, __frcp_rn(scale));
    if (exists && real) {
      if (q.out_scale)
        static_cast<unsigned char*>(q.out)[at] = static_cast<unsigned char>(code);
      else
        store(q.out, q.out_type, at, y);
    }
    __syncthreads();
  }
}

bool can_slice(const FinishParams& p, int sms) {
  return !p.q.token_scale && p.rotation.base && p.rotation.bits >= kSliceBits &&
         p.channels <= kSliceThreads * kSlices && p.q.batch * kSlices <= 2 * sms;
}

cudaError_t launch_slices(FinishParams p, void* stream) {
  p.rehearse = hopper();
  const int inner = p.channels, threads = (inner / kSlices + 31) / 32 * 32;
  const int bytes = 4 * (padded(inner / kSlices) + 1 + inner / 32 + p.q.norm_groups);
  const dim3 grid(p.q.batch * kSlices + shifters(p, threads));
  return launch(p.rotation.base <= 20 ? decode_finish_slices<20> : decode_finish_slices<36>, p, grid, threads, bytes,
                stream);
}

}  // namespace quamba::decode
