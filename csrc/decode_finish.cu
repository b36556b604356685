// The second kernel of a decode step: what needs a whole token. u [B, I] fp32, gated already -> norm within groups, gain,
// Hadamard rotation, quantisation. One block a token, one, two or four octets of neighbouring channels a thread: eight
// factors 2 of the rotation are taken in the registers and lanes of a warp, and shared memory is left with the others.
//
// More blocks shift the convolution's state of B and C, which the first kernel's blocks of a group share and only read,
// and a thread advances the step of the stochastic rounding, which they all read: the boundary between the two kernels
// is the barrier that this takes. Where the first kernel has let this one start only after it had read what is shifted,
// the blocks that shift it come first and are done before the others' turn.
//
// A block takes no more registers than leave room for one of the next linear beside it, which starts at once: its weights
// come while tokens are finished.
#include <algorithm>
#include <type_traits>

#include "decode_finish.cuh"
#include "finish.cuh"

namespace quamba::decode {

constexpr int kRun = 32;  // channels that belong to one group of the norm
constexpr int kMaxRows = 16384;

// Threads of a token: an octet each where the registers allow it, since latency is all that a token takes.
template <int OCTETS>
constexpr int kMaxThreads = OCTETS == 1 ? 640 : 512;

// What leaves room for a block of the next linear, 288 threads of 96 registers, where it is enough.
template <int OCTETS, int MAX_BASE>
constexpr int kRegisters = OCTETS == 1 ? 56 : OCTETS == 2 && MAX_BASE <= 20 ? 72 : 128;

// Up to eight factors 2 of a row's rotation over the octets of a warp, neighbours in neighbouring lanes; how many.
template <int OCTETS>
__device__ __forceinline__ int rotate_octets(float (&v)[OCTETS][8], int bits) {
  const int lane = threadIdx.x % 32, done = min(bits, 8);
#pragma unroll
  for (int i = 0; i < OCTETS; ++i) {
#pragma unroll
    for (int bit = 0; bit < 3; ++bit)
      if (bit < bits)
#pragma unroll
        for (int j = 0; j < 8; ++j)
          if (!(j >> bit & 1)) {
            const float a = v[i][j], b = v[i][j + (1 << bit)];
            v[i][j] = a + b, v[i][j + (1 << bit)] = a - b;
          }
#pragma unroll 1
    for (int bit = 0; bit < done - 3; ++bit) {
      const float sign = lane >> bit & 1 ? -1.f : 1.f;
#pragma unroll
      for (int j = 0; j < 8; ++j) v[i][j] = fmaf(sign, v[i][j], __shfl_xor_sync(~0u, v[i][j], 1 << bit));
    }
  }
  return done;
}

// The base's factor: four elements at a time, so that no more than the sums have to be held.
template <int BASE, int... G>
__device__ __forceinline__ void rotate_base(float* row, int channels, int shift, std::integer_sequence<int, G...>) {
  for (int item = threadIdx.x; item < channels / BASE; item += blockDim.x) {
    int first = (((item >> shift) * BASE) << shift) + (item & ((1 << shift) - 1));
    float y[BASE];
    const auto add = [&](auto g) __attribute__((always_inline)) {
      constexpr int kGroup = decltype(g)::value;
      float x[BASE] = {};
#pragma unroll
      for (int i = 4 * kGroup; i < 4 * kGroup + 4; ++i) x[i] = row[padded(first + (i << shift))];
      hadamard::add_four<BASE, kGroup>(y, x, std::make_integer_sequence<int, BASE>{});
      asm volatile("" : "+r"(first), "+r"(shift));  // so that places are computed again instead of kept in registers
    };
    (add(std::integral_constant<int, G>{}), ...);
#pragma unroll
    for (int i = 0; i < BASE; ++i) row[padded(first + (i << shift))] = y[i];
  }
  __syncthreads();
}

template <int BASE>
__device__ __forceinline__ void rotate_base(float* row, int channels, int shift) {
  rotate_base<BASE>(row, channels, shift, std::make_integer_sequence<int, BASE / 4>{});
}

// The factors that are left, in shared memory: three factors 2 a pass, which takes few registers.
template <int MAX_BASE>
__device__ __forceinline__ void rotate_rest(float* row, int channels, const Rotation& r, int done) {
#pragma unroll 1
  for (; r.bits - done >= 3; done += 3) hadamard::pass<8, false, WholeBlock>(row, channels, done);
  if (r.bits - done == 2) hadamard::pass<4, false, WholeBlock>(row, channels, done);
  if (r.bits - done == 1) hadamard::pass<2, false, WholeBlock>(row, channels, done);
  if (r.base == 12) rotate_base<12>(row, channels, r.bits);
  if (r.base == 20) rotate_base<20>(row, channels, r.bits);
  if (MAX_BASE >= 28 && r.base == 28) rotate_base<28>(row, channels, r.bits);
  if (MAX_BASE >= 36 && r.base == 36) rotate_base<36>(row, channels, r.bits);
}

template <int OCTETS, int MAX_BASE>
#if CUDART_VERSION >= 12040
__global__ void __maxnreg__((kRegisters<OCTETS, MAX_BASE>))
#else  // there is no saying so: as many as the threads leave
__global__ void __launch_bounds__(kMaxThreads<OCTETS>)
#endif
    decode_finish(const __grid_constant__ FinishParams p) {
  extern __shared__ __align__(16) char shared[];
  const QuambaDecode& q = p.q;
  const int inner = p.channels, lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;

  launch_dependents();
  const int shifters = gridDim.x - q.batch, token = static_cast<int>(blockIdx.x) - (p.read ? shifters : 0);
  if (token < 0 || token >= q.batch) {
    if (!p.read) wait_for_previous_kernel();
    shift_shared(p, p.read ? blockIdx.x : token - q.batch, shifters);
    return;
  }

  float* const row = reinterpret_cast<float*>(shared);
  float* const runs = row + padded(inner);  // sums of squares of kRun channels
  float* const groups = runs + inner / kRun;
  float* const peaks = groups + (q.norm_groups + 3) / 4 * 4;  // of warps
  float* const squares = peaks + warps;                         // sums of the warps, where there is one group
  const auto octet = [&](int i) { return static_cast<int>(i * blockDim.x + threadIdx.x); };

  uint4 gain[OCTETS][2];  // as they lie
  const float out_scale = constant(q.out_scale, 0, 1.f);
#pragma unroll
  for (int i = 0; i < OCTETS; ++i) gain[i][0] = gain[i][1] = make_uint4(0, 0, 0, 0);
  // the type is asked for once, so that no load waits for another that might have filled the same registers
  if (q.norm_weight && q.norm_weight_type == QUAMBA_F32) {
#pragma unroll
    for (int i = 0; i < OCTETS; ++i)
      if (octet(i) * 8 < inner)
#pragma unroll
        for (int h = 0; h < 2; ++h)
          gain[i][h] = constant_quad(static_cast<const uint4*>(q.norm_weight) + 2 * octet(i) + h);
  } else if (q.norm_weight) {
#pragma unroll
    for (int i = 0; i < OCTETS; ++i)
      if (octet(i) * 8 < inner) gain[i][0] = constant_quad(static_cast<const uint4*>(q.norm_weight) + octet(i));
  }

  wait_for_previous_kernel();
  const long long start = static_cast<long long>(token) * inner;
  const float4* const u = reinterpret_cast<const float4*>(static_cast<const float*>(q.workspace) + start);
  float v[OCTETS][8];
#pragma unroll
  for (int i = 0; i < OCTETS; ++i)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float4 four =
          octet(i) * 8 < inner ? __ldcg(u + 2 * octet(i) + h) : make_float4(0.f, 0.f, 0.f, 0.f);
      v[i][4 * h] = four.x, v[i][4 * h + 1] = four.y, v[i][4 * h + 2] = four.z, v[i][4 * h + 3] = four.w;
    }
  if (token == 0 && threadIdx.x == 0 && q.rng) q.rng[1] = __ldcg(q.rng + 1) + 1;

  // the inverse of the one group's norm passes through the rotation, and so waits for the barrier that this needs anyway
  const bool late = q.norm_groups == 1;
  const auto squared = [&](int i) {
    float sum = 0.f;
#pragma unroll
    for (int j = 0; j < 8; ++j) sum = fmaf(v[i][j], v[i][j], sum);
    return sum;
  };
  if (late) {
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < OCTETS; ++i) sum += squared(i);
    sum = sum_lanes<32>(sum);
    if (lane == 0) squares[warp] = sum;
  } else if (q.norm_groups) {
#pragma unroll
    for (int i = 0; i < OCTETS; ++i) {
      const int at = octet(i) * 8;
      const float sum = sum_lanes<kRun / 8>(squared(i));
      if (at < inner && lane % (kRun / 8) == 0) runs[at / kRun] = sum;
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
    for (int i = 0; i < OCTETS; ++i) {
      const int at = octet(i) * 8;
      const float inverse = at < inner ? groups[at / (group_runs * kRun)] : 0.f;
#pragma unroll
      for (int j = 0; j < 8; ++j) v[i][j] *= inverse;
    }
  }
  if (q.norm_weight) {
    const auto multiply = [&](auto wide, int type) __attribute__((always_inline)) {
#pragma unroll
      for (int i = 0; i < OCTETS; ++i) {
        const unsigned words[8] = {gain[i][0].x, gain[i][0].y, gain[i][0].z, gain[i][0].w,
                             gain[i][1].x, gain[i][1].y, gain[i][1].z, gain[i][1].w};
#pragma unroll
        for (int j = 0; j < 8; ++j) v[i][j] *= to_float(wide ? words[j] : words[j / 2] >> j % 2 * 16, type);
      }
    };
    if (q.norm_weight_type == QUAMBA_F32) multiply(std::true_type{}, QUAMBA_F32);
    if (q.norm_weight_type == QUAMBA_F16) multiply(std::false_type{}, QUAMBA_F16);
    if (q.norm_weight_type == QUAMBA_BF16) multiply(std::false_type{}, QUAMBA_BF16);
  }

  if (p.rotation.base) {
    const int done = rotate_octets(v, p.rotation.bits);
#pragma unroll
    for (int i = 0; i < OCTETS; ++i)
      if (octet(i) * 8 < inner)
#pragma unroll
        for (int j = 0; j < 8; ++j) row[padded(octet(i) * 8) + j] = v[i][j];
    __syncthreads();
    rotate_rest<MAX_BASE>(row, inner, p.rotation, done);
#pragma unroll
    for (int i = 0; i < OCTETS; ++i)
#pragma unroll
      for (int j = 0; j < 8; ++j)
        v[i][j] = octet(i) * 8 < inner ? row[padded(octet(i) * 8) + j] * p.rotation.gain : 0.f;
  } else if (late) {
    __syncthreads();
  }
  if (late) {
    const float sum = sum_lanes<32>(lane < warps ? squares[lane] : 0.f);
    const float inverse = rsqrtf(sum / static_cast<float>(inner) + q.eps);
#pragma unroll
    for (int i = 0; i < OCTETS; ++i)
#pragma unroll
      for (int j = 0; j < 8; ++j) v[i][j] *= inverse;
  }

  float scale = out_scale;
  if (q.token_scale) {
    float peak = 0.f;
#pragma unroll
    for (int i = 0; i < OCTETS; ++i)
#pragma unroll
      for (int j = 0; j < 8; ++j) peak = fmaxf(peak, fabsf(v[i][j]));
    peak = max_lanes<32>(peak);
    if (lane == 0) peaks[warp] = peak;
    __syncthreads();
    peak = peaks[0];
    for (int w = 1; w < warps; ++w) peak = fmaxf(peak, peaks[w]);
    scale = peak > 0.f ? __fdiv_rn(peak, 127.f) : 1.f;
    if (threadIdx.x == 0) q.token_scale[token] = scale;
  }

  const float inverse = __frcp_rn(scale);
#pragma unroll
  for (int i = 0; i < OCTETS; ++i) {
    const bool stores = octet(i) * 8 < inner;
    const long long at = start / 8 + octet(i);
    if (q.out_scale || q.token_scale) {
      unsigned code[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) code[j] = to_code(v[i][j], scale, inverse);
      const auto four = [&](int j) {
        return __byte_perm(__byte_perm(code[j], code[j + 1], 0x0040), __byte_perm(code[j + 2], code[j + 3], 0x0040),
                           0x5410);
      };
      if (stores) static_cast<uint2*>(q.out)[at] = make_uint2(four(0), four(4));
    } else if (q.out_type == QUAMBA_F32) {
      float4* const to = static_cast<float4*>(q.out) + 2 * at;
      if (stores) to[0] = make_float4(v[i][0], v[i][1], v[i][2], v[i][3]);
      if (stores) to[1] = make_float4(v[i][4], v[i][5], v[i][6], v[i][7]);
    } else {
      const bool half = q.out_type == QUAMBA_F16;
      const auto pair = [&](int j) { return pack_pair(v[i][j], v[i][j + 1], half); };
      if (stores) static_cast<uint4*>(q.out)[at] = make_uint4(pair(0), pair(2), pair(4), pair(6));
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

cudaError_t launch_finish(const QuambaDecode& q, const Rotation& rotation, int shared_channels, bool read, int sms,
                          void* stream) {
  const int inner = q.H * q.P, small = rotation.base <= 20;
  const FinishParams params{q, rotation, inner, shared_channels, shifts_quads(q), read, false};
  if (can_slice(params, sms)) return launch_slices(params, stream);
  const int octets = small && inner <= 8 * kMaxThreads<1> ? 1 : inner <= 16 * kMaxThreads<2> ? 2 : 4;
  const int least = octets == 1 ? 64 : 128, most = octets == 1 ? kMaxThreads<1> : kMaxThreads<2>;
  const int threads = std::max(least, std::min(most, (inner / 8 / octets + 31) / 32 * 32));
  const int bytes = 4 * (padded(inner) + inner / kRun + (q.norm_groups + 3) / 4 * 4 + threads / 32 * 2);
  const dim3 grid(q.batch + shifters(params, threads));
  const auto kernel = octets == 1 ? decode_finish<1, 20>
                      : small     ? (octets == 2 ? decode_finish<2, 20> : decode_finish<4, 20>)
                                  : (octets == 2 ? decode_finish<2, 36> : decode_finish<4, 36>);
  return launch(kernel, params, grid, threads, bytes, stream);
}

}  // namespace quamba::decode
