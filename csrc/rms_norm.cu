// RMS norm and quantisation, a row a block. Rows are read once and kept in registers as octets of elements, so that
// a second look for the largest magnitude costs nothing; very long ones are read again. With few rows what counts is the
// latency, of fetching instructions too: a block goes through the motions once, on zeros, before its turn comes.
#include "launch.cuh"
#include "quads.cuh"
#include "rowwise.h"

namespace {

using namespace quamba;

constexpr int kMaxThreads = 1024, kOctet = 8;
constexpr int kMany = 5;  // octets of a thread where there are many rows: 2560 and 5120 channels fill whole warps

constexpr int most_threads(int held) { return held > 1 ? kMaxThreads / 2 : kMaxThreads; }

struct Rows {
  QuambaRows a;
  int octets;
  bool norm, whole, whole_weight, whole_octets, whole_scale, whole_y;  // octets: of the weight
  bool rehearse, holds_next;
};

// Held: octets of a thread that stay in registers; 0: none, for rows of any length. X: the type of x, whose rows then lie
// in whole octets, or kAny.
template <int Held, int X>
__global__ void __launch_bounds__(most_threads(Held)) normalise_rows(const __grid_constant__ Rows p) {
  const QuambaRows& a = p.a;
  __shared__ float sums[32], peaks[32];
  const long long row = blockIdx.x, start = row * a.x_stride;
  const int step = blockDim.x;
  if (!p.holds_next) launch_dependents();
  constexpr bool kEarly = Held == 1;  // few rows: what is constant is on its way before the wait
  const bool static_codes = !a.y_scale && a.out_scale && a.out_scale_count == 1;
  const bool early_scale = kEarly && static_codes && p.norm;  // without a norm it may have been made just now
  float out_scale = 1.f;
  if (early_scale) out_scale = __uint_as_float(constant_word(a.out_scale));
  RawOctet early{};
  if (kEarly && a.weight && p.whole_octets && static_cast<int>(threadIdx.x) < p.octets) {
    const uint4* const from = static_cast<const uint4*>(a.weight);
    const bool wide = a.weight_dtype == QUAMBA_F32;
    early.low = constant_quad(from + (wide ? 2 * threadIdx.x : threadIdx.x));
    if (wide) early.high = constant_quad(from + 2 * threadIdx.x + 1);
  }
#pragma unroll 1
  for (int real = kEarly && p.rehearse ? 0 : 1; real < 2; ++real) {
    if (real) wait_for_previous_kernel();

    auto load = [&](const void* data, int type, long long from, int octet, bool whole) {
      const int first = kOctet * octet, count = min(a.D - first, kOctet);
      return Octet{load_quad(data, type, from + first, min(count, 4), whole),
                   load_quad(data, type, from + first + 4, count - 4, whole)};
    };
    Octet held[Held ? Held : 1], gain{};
    if constexpr (Held > 0) {
      if constexpr (X == kAny) {
#pragma unroll
        for (int k = 0; k < Held; ++k)
          held[k] = real ? load(a.x, a.x_dtype, start, threadIdx.x + k * step, p.whole) : Octet{};
      } else {  // all loads before the first use
        RawOctet raw[Held];
        const auto* x = reinterpret_cast<const uint4*>(static_cast<const char*>(a.x) + start * size_of(X));
#pragma unroll
        for (int k = 0; k < Held; ++k) {
          const int octet = threadIdx.x + k * step;
          raw[k] = {make_uint4(0, 0, 0, 0), make_uint4(0, 0, 0, 0)};
          if (octet >= p.octets || !real) continue;
          raw[k].low = __ldcg(x + octet * size_of(X) / 2);
          if (X == QUAMBA_F32) raw[k].high = __ldcg(x + 2 * octet + 1);
        }
#pragma unroll
        for (int k = 0; k < Held; ++k) held[k] = octet_of(raw[k], X);
      }
      if (kEarly && a.weight)
        gain = p.whole_octets ? octet_of(early, a.weight_dtype)
                              : load(a.weight, a.weight_dtype, 0, threadIdx.x, p.whole_weight);
    }
    auto visit = [&](auto use) {
      if constexpr (Held > 0) {
#pragma unroll
        for (int k = 0; k < Held; ++k) use(static_cast<int>(threadIdx.x) + k * step, held[k]);
      } else {
        for (int octet = threadIdx.x; octet < p.octets; octet += step) {
          Octet v = load(a.x, a.x_dtype, start, octet, p.whole);
          use(octet, v);
        }
      }
    };

    float inverse_rms = 1.f;
    if (p.norm) {
      float sum = 0.f;
      visit([&](int, Octet& v) {
        auto square = [&](float4 q) { sum += (q.x * q.x + q.y * q.y) + (q.z * q.z + q.w * q.w); };
        square(v.low), square(v.high);
      });
      sum = block_reduce(sum, sums, [](float x, float y) { return x + y; });
      inverse_rms = rsqrtf(sum / static_cast<float>(a.D) + a.eps);
    }
    auto finish = [&](int octet, Octet& v) {
      if (p.norm) {
        auto scale = [&](float x, float) { return __fmul_rn(x, inverse_rms); };
        v = {each(scale, v.low, v.low), each(scale, v.high, v.high)};
      }
      if (a.weight) {
        if (!kEarly) gain = load(a.weight, a.weight_dtype, 0, octet, p.whole_weight);
        auto times = [](float x, float w) { return __fmul_rn(x, w); };
        v = {each(times, v.low, gain.low), each(times, v.high, gain.high)};
      }
    };
    if constexpr (Held > 0) visit(finish);
    auto visit_finished = [&](auto use) {
      visit([&](int octet, Octet& v) {
        if constexpr (Held == 0) finish(octet, v);
        use(octet, v);
      });
    };

    float scale = 1.f;
    if (a.y_scale) {
      float peak = 0.f;
      visit_finished([&](int, Octet& v) {
        auto larger = [&](float4 q) {
          peak = fmaxf(peak, fmaxf(fmaxf(fabsf(q.x), fabsf(q.y)), fmaxf(fabsf(q.z), fabsf(q.w))));
        };
        larger(v.low), larger(v.high);
      });
      peak = block_reduce(peak, peaks, [](float x, float y) { return fmaxf(x, y); });
      scale = peak > 0.f ? __fdiv_rn(peak, 127.f) : 1.f;
      if (real && threadIdx.x == 0) a.y_scale[row] = scale;
    } else if (static_codes) {
      scale = early_scale ? out_scale : real ? __ldcg(a.out_scale) : 1.f;
    }
    const Grid grid = make_grid(scale);
    const bool codes = a.y_scale || a.out_scale, per_channel = a.out_scale && a.out_scale_count > 1;
    const int type = codes ? QUAMBA_I8 : a.y_dtype;
    visit_finished([&](int octet, Octet& v) {
      const int first = kOctet * octet, count = min(a.D - first, kOctet);
      if (count <= 0) return;
      if (per_channel) {
        auto quad = [&](float4 q, int from, int left) {
          return each([](float x, float s) { return code_on(x, make_grid(s)); }, q,
                      load_quad(a.out_scale, QUAMBA_F32, from, left, p.whole_scale));
        };
        v = {quad(v.low, first, count), quad(v.high, first + 4, count - 4)};
      } else if (codes) {
        auto exact = [&](float x, float) { return code_on(x, grid); };
        // ties are a matter of chance after a norm, unless the scale is one of the row's own elements
        auto close = [&](float x, float) { return saturate_code(x * grid.inverse); };
        v = p.norm && !a.y_scale ? Octet{each(close, v.low, v.low), each(close, v.high, v.high)}
                   : Octet{each(exact, v.low, v.low), each(exact, v.high, v.high)};
      }
      const long long at = row * a.D + first;
      const uint4 low = to_raw(v.low, type), high = to_raw(v.high, type);
      if (!real) return;
      if (X != kAny && type != QUAMBA_F32) {
        auto* y = static_cast<char*>(a.y) + at * (type == QUAMBA_I8 ? 1 : 2);
        if (type == QUAMBA_I8)
          *reinterpret_cast<uint2*>(y) = make_uint2(low.x, high.x);
        else
          *reinterpret_cast<uint4*>(y) = make_uint4(low.x, low.y, high.x, high.y);
        return;
      }
      store_raw(a.y, type, at, low, min(count, 4), p.whole_y);
      store_raw(a.y, type, at + 4, high, count - 4, p.whole_y);
    });
    if (!real) __syncthreads();
  }
}

int launch_rows(const QuambaRows& a, bool norm, void* stream) {
  auto is_float = [](int type) { return type == QUAMBA_F32 || type == QUAMBA_F16 || type == QUAMBA_BF16; };
  const bool codes = a.y_scale || a.out_scale;
  if (a.rows < 1 || a.rows > 0x7fffffffLL || a.D < 1 || !is_float(a.x_dtype) || (!codes && !is_float(a.y_dtype)) ||
      (a.weight && !is_float(a.weight_dtype)))
    return QUAMBA_UNSUPPORTED;
  int processors = 0;
  if (cudaError_t error = device_attribute(cudaDevAttrMultiProcessorCount, processors); error != cudaSuccess)
    return error;
  const int octets = (a.D - 1) / kOctet + 1;
  const bool dense = a.D % 4 == 0;
  int major = 0;
  if (cudaError_t error = device_attribute(cudaDevAttrComputeCapabilityMajor, major); error != cudaSuccess) return error;
  Rows p{a,
         octets,
         norm,
         dense && in_quads(a.x, a.x_dtype, a.x_stride),
         dense && in_quads(a.weight, a.weight_dtype),
         a.D % kOctet == 0 && reinterpret_cast<unsigned long long>(a.weight) % 16 == 0,
         dense && in_quads(a.out_scale, QUAMBA_F32),
         dense && in_quads(a.y, codes ? QUAMBA_I8 : a.y_dtype),
         major >= 9,
         a.holds_next && a.rows > processors};
  // few rows: as many threads as have work, for the latency; many: fewer, with more loads on their way
  const int held = a.rows <= processors && octets <= kMaxThreads ? 1 : octets <= kMany * most_threads(kMany) ? kMany : 0;
  const int wanted = held ? (octets - 1) / held + 1 : kMaxThreads;
  const int threads = (wanted + 31) / 32 * 32;
  auto octets_at = [](const void* data) { return reinterpret_cast<unsigned long long>(data) % 16 == 0; };
  const bool whole = a.D % kOctet == 0 && a.x_stride % kOctet == 0 && octets_at(a.x) && octets_at(a.y);
  auto with = [&](auto any, auto f32, auto f16, auto bf16) {
    return !whole ? any : a.x_dtype == QUAMBA_F32 ? f32 : a.x_dtype == QUAMBA_F16 ? f16 : bf16;
  };
  auto kernel = held == 1   ? with(normalise_rows<1, kAny>, normalise_rows<1, QUAMBA_F32>, normalise_rows<1, QUAMBA_F16>,
                                   normalise_rows<1, QUAMBA_BF16>)
                : held > 1  ? with(normalise_rows<kMany, kAny>, normalise_rows<kMany, QUAMBA_F32>,
                                   normalise_rows<kMany, QUAMBA_F16>, normalise_rows<kMany, QUAMBA_BF16>)
                            : normalise_rows<0, kAny>;
  if (held == 1)
    if (cudaError_t error = prefer_shared(kernel); error != cudaSuccess) return error;
  return launch(kernel, p, dim3(static_cast<unsigned>(a.rows)), threads, stream);
}

}  // namespace

// y = x / sqrt(mean(x^2) + eps) * weight, then as the scales say.
extern "C" int quamba_rms_norm(const QuambaRows* a, void* stream) {
  return a->out_scale && a->out_scale_count != 1 ? QUAMBA_UNSUPPORTED : launch_rows(*a, true, stream);
}

// y = the codes of x, with one scale, one a channel, or one a row that is found here.
extern "C" int quamba_quantize(const QuambaRows* a, void* stream) {
  return a->weight || (!a->out_scale && !a->y_scale) ? QUAMBA_UNSUPPORTED : launch_rows(*a, false, stream);
}
