// gate_output where y and z have 16 bits and one Hadamard matrix rotates the whole row of I = Top x 256 channels: what a
// quantised model runs. A row a block; 16 channels a thread.
//
// The rotation is taken in three passes: over 16 neighbours as they are loaded, over 16 channels at a distance of 16, and
// over the Top rows of 256 (the base matrix, and what is left of the factors 2), from where the codes leave. So a channel
// passes through shared memory as a float twice. The factor of a norm over the whole row is taken with the last pass,
// one of several groups (whole rows of 256) with the second.
#pragma once

#include "hadamard.cuh"
#include "launch.cuh"
#include "quads.cuh"
#include "rowwise.h"

namespace quamba::gate {

constexpr int kRow = 256, kPitch = kRow + 16, kPart = 16;
constexpr int kResident = 1280;  // threads of a multiprocessor, so that registers are few enough for them

struct Halves {
  QuambaGate a;
  float gain;
};

// Quads of a row of 256 change places so that 16 neighbours, as quads, and 32 channels at a distance of 1 or 16 apart
// fall into different banks.
__device__ __forceinline__ int place(int channel) { return channel ^ (channel >> 5 & 3) << 2; }

constexpr int odd_part(int n) { return n % 2 ? n : odd_part(n / 2); }

// Order of the base matrix among the factors of Top: 12 or 20, or 1 for a power of two.
template <int Top>
constexpr int base_of() {
  return odd_part(Top) == 1 ? 1 : 4 * odd_part(Top);
}

// v <- v H over the rows of 256.
template <int Top>
__device__ __forceinline__ void rotate_rows(float (&v)[Top]) {
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

template <int Top>
constexpr int threads() {
  return Top * kRow / kPart;
}

// Bytes of shared memory: the row as floats, its codes.
template <int Top>
constexpr int shared_bytes() {
  return Top * (kPitch * 4 + kRow);
}

// Half: fp16, else bf16.
template <int Top, bool Half>
__global__ void __launch_bounds__(threads<Top>(), kResident / threads<Top>()) gate_halves(const __grid_constant__ Halves p) {
  constexpr int kThreads = threads<Top>(), kTurns = (kRow - 1) / kThreads + 1;
  extern __shared__ __align__(16) float row[];
  __shared__ float sums[Top], peaks[32];
  signed char* const codes = reinterpret_cast<signed char*>(row + Top * kPitch);
  const QuambaGate& a = p.a;
  const int thread = threadIdx.x, first = kPart * thread, own = thread / kPart, place_of_own = own * kPitch;
  const long long index = blockIdx.x;
  launch_dependents();

  float4 scale[kPart / 4];
  if (a.z_scale)
#pragma unroll
    for (int q = 0; q < kPart / 4; ++q) {
      const float one = a.z_scale_count == 1 ? __ldg(a.z_scale) : 1.f;
      scale[q] = a.z_scale_count == 1 ? make_float4(one, one, one, one)
                                      : constant_quad(a.z_scale, QUAMBA_F32, first + 4 * q);
    }
  wait_for_previous_kernel();
  uint4 raw_y[2], raw_z[2];
  {
    const uint4* y = reinterpret_cast<const uint4*>(static_cast<const unsigned short*>(a.y) + index * a.y_stride + first);
    const uint4* z = reinterpret_cast<const uint4*>(static_cast<const unsigned short*>(a.z) + index * a.z_stride + first);
    raw_y[0] = __ldcg(y), raw_y[1] = __ldcg(y + 1), raw_z[0] = __ldcg(z), raw_z[1] = __ldcg(z + 1);
  }
  auto quad_of = [](const uint4 (&raw)[2], int q) {
    const float2 low = pair_of<Half>(q % 2 ? raw[q / 2].z : raw[q / 2].x);
    const float2 high = pair_of<Half>(q % 2 ? raw[q / 2].w : raw[q / 2].y);
    return make_float4(low.x, low.y, high.x, high.y);
  };
  float v[kPart], sum = 0.f;
#pragma unroll
  for (int q = 0; q < kPart / 4; ++q) {
    float4 z = quad_of(raw_z, q);
    if (a.z_scale)
      z = each([](float x, float s) { return __fmul_rn(code_on(x, make_grid(s)), s); }, z, scale[q]);
    float4 u = each([](float x, float g) { return x * silu(g); }, quad_of(raw_y, q), z);
    sum += (u.x * u.x + u.y * u.y) + (u.z * u.z + u.w * u.w);
    if (a.weight) {
      constexpr int kType = Half ? QUAMBA_F16 : QUAMBA_BF16;
      const float4 weight = a.weight_dtype == kType ? constant_quad(a.weight, kType, first + 4 * q)
                                                    : constant_quad(a.weight, a.weight_dtype, first + 4 * q);
      u = each([](float x, float w) { return x * w; }, u, weight);
    }
    v[4 * q] = u.x, v[4 * q + 1] = u.y, v[4 * q + 2] = u.z, v[4 * q + 3] = u.w;
  }
  butterfly(v);
  {
    float* const at = row + place_of_own;
#pragma unroll
    for (int q = 0; q < kPart / 4; ++q)
      *reinterpret_cast<float4*>(at + place(first % kRow + 4 * q)) =
          make_float4(v[4 * q], v[4 * q + 1], v[4 * q + 2], v[4 * q + 3]);
  }
  if (a.norm_groups) {
#pragma unroll
    for (int d = kPart / 2; d; d /= 2) sum += __shfl_xor_sync(~0u, sum, d);
    if (thread % kPart == 0) sums[own] = sum;
  }
  __syncthreads();

  auto factor_of = [&](float total, int channels) { return rsqrtf(total / static_cast<float>(channels) + a.eps); };
  {
    float* const at = row + place_of_own;
    const int low = thread % kPart;
#pragma unroll
    for (int i = 0; i < kPart; ++i) v[i] = at[place(kPart * i + low)];
    if (a.norm_groups > 1) {
      const int rows = Top / a.norm_groups, begin = own / rows * rows;  // of 256 channels in a group
      float total = 0.f;
      for (int i = 0; i < rows; ++i) total += sums[begin + i];
      const float factor = factor_of(total, rows * kRow);
#pragma unroll
      for (int i = 0; i < kPart; ++i) v[i] *= factor;
    }
    butterfly(v);
#pragma unroll
    for (int i = 0; i < kPart; ++i) at[place(kPart * i + low)] = v[i];
  }
  __syncthreads();

  float gain = p.gain;
  if (a.norm_groups == 1) {
    const int lane = thread % 32;
    float total = (lane < Top ? sums[lane] : 0.f) + (lane + 32 < Top ? sums[lane + 32] : 0.f);
#pragma unroll
    for (int d = 16; d; d /= 2) total += __shfl_xor_sync(~0u, total, d);
    gain *= factor_of(total, Top * kRow);
  }
  float top[kTurns][Top], peak = 0.f;
#pragma unroll
  for (int turn = 0; turn < kTurns; ++turn) {
    const int low = thread + turn * kThreads;
    if (low >= kRow) break;
#pragma unroll
    for (int r = 0; r < Top; ++r) top[turn][r] = row[r * kPitch + place(low)];
    rotate_rows(top[turn]);
    if (a.u_scale)
#pragma unroll
      for (int r = 0; r < Top; ++r) peak = fmaxf(peak, fabsf(top[turn][r]));
  }
  float factor = gain;  // from what lies in top to codes, or to u
  if (a.u_scale) {
    peak = gain * block_reduce(peak, peaks, [](float x, float y) { return fmaxf(x, y); });
    const float u_scale = peak > 0.f ? __fdiv_rn(peak, 127.f) : 1.f;
    if (thread == 0) a.u_scale[index] = u_scale;
    factor = __fdiv_rn(gain, u_scale);
  } else if (a.out_scale) {
    factor = __fdiv_rn(gain, __ldg(a.out_scale));
  }
  const bool coded = a.u_scale || a.out_scale;
#pragma unroll
  for (int turn = 0; turn < kTurns; ++turn) {
    const int low = thread + turn * kThreads;
    if (low >= kRow) break;
#pragma unroll
    for (int r = 0; r < Top; ++r) {
      const float u = top[turn][r] * factor;
      if (coded)
        codes[r * kRow + low] = static_cast<signed char>(__float_as_uint(saturate_code(u) + kRounder));
      else
        store_raw(a.u, a.u_dtype, index * a.I + r * kRow + low, to_raw(make_float4(u, 0.f, 0.f, 0.f), a.u_dtype), 1, false);
    }
  }
  if (!coded) return;
  __syncthreads();
  *reinterpret_cast<uint4*>(static_cast<signed char*>(a.u) + index * a.I + first) =
      *reinterpret_cast<const uint4*>(codes + first);
}

template <int Top>
int launch_halves(const Halves& p, void* stream) {
  auto kernel = p.a.y_dtype == QUAMBA_F16 ? gate_halves<Top, true> : gate_halves<Top, false>;
  if (shared_bytes<Top>() > 47 * 1024)
    if (cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes<Top>());
        error != cudaSuccess)
      return error;
  return launch(kernel, p, dim3(static_cast<unsigned>(p.a.rows)), threads<Top>(), stream, shared_bytes<Top>());
}

// Whether a call is of this kind, beyond what holds for every call.
inline bool of_halves(const QuambaGate& a) {
  auto whole = [](const void* data, long long stride) {
    return reinterpret_cast<unsigned long long>(data) % 16 == 0 && stride % 8 == 0;
  };
  return a.block == a.I && a.I % kRow == 0 && size_of(a.y_dtype) == 2 && a.z_dtype == a.y_dtype &&
         whole(a.y, a.y_stride) && whole(a.z, a.z_stride) && whole(a.u, 0) && whole(a.z_scale, 0) &&
         whole(a.weight, 0) && (a.norm_groups <= 1 || a.I / kRow % a.norm_groups == 0);
}

// QUAMBA_UNSUPPORTED where I is another than these.
inline int run_halves(const QuambaGate& a, float gain, void* stream) {
  const Halves p{a, gain};
  switch (a.I / kRow) {
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
