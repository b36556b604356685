// What a step of many sequences brings into the recurrence (ssd_stream.cu), made once: the convolution of x, B and C, the
// rates of the heads, the gate. Four channels a thread, so that codes travel as words. It shifts the whole convolution's
// state, of which each thread reads only what it writes.
#include "conv_quad.cuh"
#include "decode_launch.cuh"
#include "ssd_stream.h"

namespace quamba::decode {

constexpr int kInputThreads = 128;

struct InputsParams {
  QuambaDecode q;
  SsdTerms terms;
};

// Codes: convolution, x, B and C in codes, else in 16-bit floats.
template <bool Codes>
__global__ void __launch_bounds__(kInputThreads) ssd_inputs(const __grid_constant__ InputsParams p) {
  const QuambaDecode& q = p.q;
  const int c = 4 * (blockIdx.x * kInputThreads + threadIdx.x), batch = blockIdx.y, inner = q.H * q.P, shared = q.G * q.N;
  if (c >= q.channels) return;
  const bool is_x = c < inner, is_B = !is_x && c < inner + shared;
  const int column = is_x ? c : is_B ? c - inner : c - inner - shared, head = is_x ? c / q.P : 0;
  const int in = Types<true>::input(q);
  const bool opens_head = is_x && c % q.P == 0;

  const auto taps = [&] {
    if constexpr (Codes)
      return quad_taps(q, c);
    else
      return half_taps(q, c);
  }();
  float unit[4], z_scale[4], A = 0.f, D = 0.f, dt_bias = 0.f;
  if (is_x) {
    quad_of(q.x_scale, q.x_count, c, unit);
    quad_of(q.z_scale, q.z_count, c, z_scale);
    if (opens_head) A = constant(q.A, head, 0.f), D = constant(q.D, head, 0.f), dt_bias = constant(q.dt_bias, head, 0.f);
  }

  // what the convolution keeps has come from memory by then; a prefetch may run ahead of who writes it
  constexpr int kBytes = Codes ? 1 : 2;
  if (threadIdx.x * 4 * kBytes % 32 == 0)
    for (int i = 0; i < kWidth - 1; ++i)
      prefetch_l2(static_cast<const char*>(q.conv_state) + kBytes * ((3ll * batch + i) * q.channels + c));

  wait_for_previous_kernel();
  launch_dependents();  // not earlier: ssd_stream reads the state at once
  const uint2 x = fetch_halves(is_x ? q.x : is_B ? q.B : q.C, batch * (is_x ? q.x_stride : q.bc_stride) + column);
  const auto window = [&] {
    if constexpr (Codes)
      return quad_window(q, batch, c);
    else
      return half_window(q, batch, c);
  }();
  uint2 z = make_uint2(0, 0);
  if (is_x) z = fetch_halves(q.z, batch * q.z_stride + c);
  const long long place_dt = batch * q.dt_stride + head;
  unsigned dt_word = 0;
  if (opens_head) dt_word = fetch(q.dt, in, place_dt);

  // the dither of the columns
  if (blockIdx.x == 0 && batch == 0 && q.rng)
    for (int n = threadIdx.x; n < q.N; n += min(kInputThreads, q.channels / 4))
      p.terms.dither[n] = column_draw(dither_key(q.rng), static_cast<unsigned>(q.batch) * inner + n);

  float y[4];
  if constexpr (Codes)
    convolve_quad(q, taps, window, x, y);
  else
    convolve_halves(q, taps, window, x, y);
  if (is_x) {
    float4* const rows = reinterpret_cast<float4*>(p.terms.rows + static_cast<long long>(batch) * inner + c);
    float gate[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) gate[j] = gate_of(q, half_of(z, j, in), z_scale[j]);
    rows[0] = make_float4(y[0] * unit[0], gate[0], y[1] * unit[1], gate[1]);
    rows[1] = make_float4(y[2] * unit[2], gate[2], y[3] * unit[3], gate[3]);
    if (opens_head) {
      const float raw = __fadd_rn(value(dt_word, q.dt, in, place_dt), dt_bias);
      const float dt = fminf(fmaxf(softplus(raw), q.dt_min), q.dt_max);
      p.terms.heads[static_cast<long long>(batch) * q.H + head] = make_float4(expf(__fmul_rn(dt, A)), dt, D, 0.f);
    }
  } else {
    void* const to = is_B ? p.terms.B : p.terms.C;
    const long long at = (static_cast<long long>(batch) * shared + column) / 4;
    if constexpr (Codes)
      static_cast<unsigned*>(to)[at] = quad_codes(y);
    else
      static_cast<float4*>(to)[at] = make_float4(y[0], y[1], y[2], y[3]);
  }
}

cudaError_t launch_inputs(const QuambaDecode& q, const SsdTerms& terms, void* stream) {
  const dim3 grid((q.channels / 4 + kInputThreads - 1) / kInputThreads, q.batch);
  const auto kernel = q.C_scale ? ssd_inputs<true> : ssd_inputs<false>;
  return launch(kernel, InputsParams{q, terms}, grid, kInputThreads, 0, stream);
}

}  // namespace quamba::decode
