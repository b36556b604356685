// What stands between a scan and its output projection, a row a block: u = y silu(z) (or y alone), RMS norm within
// groups, gain, Hadamard rotation, quantisation. A row is read once and lies in shared memory as fp32 until it is
// written. This kernel serves any types and sizes; the usual ones have a faster one.
#include "gate_halves.cuh"
#include "hadamard.cuh"
#include "launch.cuh"
#include "quads.cuh"
#include "rowwise.h"

namespace {

using namespace quamba;

constexpr int kThreads = 256, kWarp = 32;
constexpr int kStretch = 4 * kWarp;  // channels of a warp's load: sums of squares are kept for each

struct Gate {
  QuambaGate a;
  Rotation rotation;
  int quads, stretches, group;  // of a row; channels that are normalised together
  bool whole_y, whole_z, whole_scale, whole_weight, whole_u;
};

// Floats of shared memory: the row, then the sums of its stretches, then a factor for each group.
int shared_floats(const Gate& p) { return padded(4 * p.quads) + p.stretches + p.a.norm_groups; }

// Base: the part of the rotation that is no power of two.
template <int Base>
__global__ void __launch_bounds__(kThreads, 2) gate_rows(const __grid_constant__ Gate p) {
  constexpr int kAhead = 2;
  extern __shared__ float row[];
  __shared__ float peaks[32];
  const QuambaGate& a = p.a;
  float* const sums = row + padded(4 * p.quads);
  float* const factors = sums + p.stretches;
  const int thread = threadIdx.x, step = blockDim.x, lane = thread % kWarp;
  const long long index = blockIdx.x, y_start = index * a.y_stride, z_start = index * a.z_stride;
  launch_dependents();
  wait_for_previous_kernel();

  auto put = [&](int quad, float4 v) {
    const int at = padded(4 * quad);  // a quad never crosses a multiple of 32
    row[at] = v.x, row[at + 1] = v.y, row[at + 2] = v.z, row[at + 3] = v.w;
  };
  auto get = [&](int quad) {
    const int at = padded(4 * quad);
    return make_float4(row[at], row[at + 1], row[at + 2], row[at + 3]);
  };
  auto times = [](float x, float w) { return __fmul_rn(x, w); };
  const float z_scale = a.z_scale && a.z_scale_count == 1 ? __ldg(a.z_scale) : 1.f;
  const bool by_channel = a.z_scale && a.z_scale_count > 1;

  for (int from = 0; from < p.quads; from += kAhead * step) {
    uint4 raw_y[kAhead], raw_z[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int quad = from + k * step + thread, count = min(a.I - 4 * quad, 4);
      raw_y[k] = load_raw(a.y, a.y_dtype, y_start + 4LL * quad, count, p.whole_y);
      if (a.z) raw_z[k] = load_raw(a.z, a.z_dtype, z_start + 4LL * quad, count, p.whole_z);
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int quad = from + k * step + thread, stretch = quad / kWarp;
      if (stretch >= p.stretches) continue;  // the same for a whole warp
      float4 u = to_floats(raw_y[k], a.y_dtype);
      if (a.z) {
        float4 scale = make_float4(z_scale, z_scale, z_scale, z_scale);
        if (by_channel) scale = load_quad(a.z_scale, QUAMBA_F32, 4LL * quad, a.I - 4 * quad, p.whole_scale);
        float4 z = to_floats(raw_z[k], a.z_dtype);
        if (a.z_scale && a.z_dtype != QUAMBA_I8)
          z = each([](float v, float s) { return code_on(v, make_grid(s)); }, z, scale);
        z = each(times, z, scale);
        u = each([](float v, float g) { return v * silu(g); }, u, z);
      }
      if (a.norm_groups) {
        float sum = (u.x * u.x + u.y * u.y) + (u.z * u.z + u.w * u.w);
#pragma unroll
        for (int d = kWarp / 2; d; d /= 2) sum += __shfl_xor_sync(~0u, sum, d);
        if (lane == 0) sums[stretch] = sum;
      }
      if (quad < p.quads) put(quad, u);
    }
  }
  if (a.norm_groups) {
    __syncthreads();
    for (int g = thread / kWarp; g < a.norm_groups; g += step / kWarp) {
      float sum = 0.f;
      if (p.group % kStretch == 0) {
        const int count = p.group / kStretch;
        for (int i = lane; i < count; i += kWarp) sum += sums[g * count + i];
      } else {
        for (int i = g * p.group + lane; i < (g + 1) * p.group; i += kWarp) {
          const float u = row[padded(i)];
          sum += u * u;
        }
      }
#pragma unroll
      for (int d = kWarp / 2; d; d /= 2) sum += __shfl_xor_sync(~0u, sum, d);
      if (lane == 0) factors[g] = rsqrtf(sum / static_cast<float>(p.group) + a.eps);
    }
    __syncthreads();
  }
  if (a.norm_groups || a.weight) {
    const float only = a.norm_groups == 1 ? factors[0] : 1.f;
    for (int quad = thread; quad < p.quads; quad += step) {
      float4 f = make_float4(only, only, only, only);
      if (a.norm_groups > 1) {
        auto of = [&](int j) { return factors[min((4 * quad + j) / p.group, a.norm_groups - 1)]; };
        f = make_float4(of(0), of(1), of(2), of(3));
      }
      float4 u = each(times, get(quad), f);
      if (a.weight)
        u = each(times, u, load_quad(a.weight, a.weight_dtype, 4LL * quad, a.I - 4 * quad, p.whole_weight));
      put(quad, u);
    }
  }
  if (p.rotation.base) {
    __syncthreads();
    Rotation rotation = p.rotation;
    rotation.base = Base;
    const bool first = rotation.bits >= kFirstBits;  // the first butterflies are among neighbours: fixed places
    if (first) {
      for (int item = thread; item < a.I >> kFirstBits; item += step) {
        float v[1 << kFirstBits];
        float* const at = row + padded(item << kFirstBits);
#pragma unroll
        for (int i = 0; i < 1 << kFirstBits; ++i) v[i] = at[i];
        butterfly(v);
#pragma unroll
        for (int i = 0; i < 1 << kFirstBits; ++i) at[i] = v[i];
      }
      __syncthreads();
    }
    rotate(row, a.I, rotation, first ? kFirstBits : 0);
  }

  auto value = [&](int quad) {
    const float gain = p.rotation.gain;
    return each([&](float v, float) { return __fmul_rn(v, gain); }, get(quad), get(quad));
  };
  float scale = 1.f;
  if (a.u_scale) {
    float peak = 0.f;
    for (int quad = thread; quad < p.quads; quad += step) {
      const float4 v = value(quad);
      peak = fmaxf(peak, fmaxf(fmaxf(fabsf(v.x), fabsf(v.y)), fmaxf(fabsf(v.z), fabsf(v.w))));
    }
    peak = block_reduce(peak, peaks, [](float x, float y) { return fmaxf(x, y); });
    scale = peak > 0.f ? __fdiv_rn(peak, 127.f) : 1.f;
    if (thread == 0) a.u_scale[index] = scale;
  } else if (a.out_scale) {
    scale = __ldg(a.out_scale);
  }
  const bool codes = a.u_scale || a.out_scale;
  const float inverse = __frcp_rn(scale);
  for (int quad = thread; quad < p.quads; quad += step) {
    float4 v = value(quad);
    if (codes) v = each([&](float x, float) { return round_code(x, scale, inverse); }, v, v);
    store_quad(a.u, codes ? QUAMBA_I8 : a.u_dtype, index * a.I + 4LL * quad, v, min(a.I - 4 * quad, 4), p.whole_u);
  }
}

}  // namespace

extern "C" int quamba_gate_output(const QuambaGate* args, void* stream) {
  const QuambaGate& a = *args;
  auto is_float = [](int type) { return type == QUAMBA_F32 || type == QUAMBA_F16 || type == QUAMBA_BF16; };
  const bool codes = a.u_scale || a.out_scale, dense = a.I % 4 == 0;
  Gate p{a};
  if (a.rows < 1 || a.rows > 0x7fffffffLL || a.I < 1 || a.norm_groups < 0 || a.block < 0 || !is_float(a.y_dtype) ||
      (!codes && !is_float(a.u_dtype)) || (a.weight && !is_float(a.weight_dtype)) ||
      (a.norm_groups && a.I % a.norm_groups) || (a.block > 1 && a.I % a.block) || !make_rotation(a.block, p.rotation))
    return QUAMBA_UNSUPPORTED;
  if (gate::of_halves(a))
    if (int status = gate::run_halves(a, p.rotation.gain, stream); status != QUAMBA_UNSUPPORTED) return status;
  int limit = 0;
  cudaError_t error = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, limit);
  if (error != cudaSuccess) return error;
  p.quads = (a.I - 1) / 4 + 1;
  p.stretches = (p.quads - 1) / kWarp + 1;
  p.group = a.norm_groups ? a.I / a.norm_groups : a.I;
  p.whole_y = dense && in_quads(a.y, a.y_dtype, a.y_stride);
  p.whole_z = dense && in_quads(a.z, a.z_dtype, a.z_stride);
  p.whole_scale = dense && in_quads(a.z_scale, QUAMBA_F32);
  p.whole_weight = dense && in_quads(a.weight, a.weight_dtype);
  p.whole_u = dense && in_quads(a.u, codes ? QUAMBA_I8 : a.u_dtype);
  const int shared = shared_floats(p) * static_cast<int>(sizeof(float));
  auto kernel = p.rotation.base == 12   ? gate_rows<12>
                : p.rotation.base == 20 ? gate_rows<20>
                : p.rotation.base == 28 ? gate_rows<28>
                : p.rotation.base == 36 ? gate_rows<36>
                                        : gate_rows<1>;
  if (shared + 256 > limit) return QUAMBA_UNSUPPORTED;
  if (shared > 48 * 1024 - 256) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    if (error != cudaSuccess) return error;
  }
  const int threads = p.stretches < kThreads / kWarp ? p.stretches * kWarp : kThreads;
  return launch(kernel, p, dim3(static_cast<unsigned>(a.rows)), threads, stream, shared);
}
