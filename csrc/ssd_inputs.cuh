// What a step of many sequences brings into the recurrence (ssd_stream.cu): the convolution of x, B and C, the rates of
// the heads, the gate. A block makes it for its own rows, four channels a thread, so that codes travel as words.
//
// It shifts the convolution's state of its own x; that of B and C, which the blocks of a group share, it only reads,
// and decode_finish.cu shifts it.
#pragma once

#include <type_traits>

#include "conv_quad.cuh"

namespace quamba::decode {

// The rows of a block, of one sequence and group: every parts-th piece of the group's.
struct Pieces {
  int batch, group, part, parts, group_rows;
  int piece, count;  // rows of a piece; pieces of the block

  // of the group, for the block's ith row; there may be no such row
  __device__ __forceinline__ int row(int i) const { return (i / piece * parts + part) * piece + i % piece; }
};

// One of the block's quads of channels: N / 4 of B, as many of C, then those of x.
template <int N, bool Codes>
struct InputQuad {
  std::conditional_t<Codes, QuadTaps, HalfTaps> taps;
  std::conditional_t<Codes, QuadWindow, HalfWindow> window;
  float unit[4], z_scale[4], A, D, dt_bias;
  uint2 x, z;
  unsigned dt;
  int c, index;  // channel of the convolution, of the block's quads
  bool is_x, exists;

  __device__ __forceinline__ InputQuad(const QuambaDecode& q, const Pieces& p, int i) : index(i) {
    const int inner = q.H * q.P, row = p.row(4 * (i - N / 2));
    is_x = i >= N / 2;
    exists = !is_x || (4 * (i - N / 2) < p.count * p.piece && row < p.group_rows);
    c = is_x ? p.group * p.group_rows + row : inner + (i < N / 4 ? p.group * N : (q.G - 1 + p.group) * N) + 4 * i;
  }

  __device__ __forceinline__ void read_constants(const QuambaDecode& q) {
    if (!exists) return;
    if constexpr (Codes)
      taps = quad_taps(q, c);
    else
      taps = half_taps(q, c);
    if (!is_x) return;
    const int head = c / q.P;
    quad_of(q.x_scale, q.x_count, c, unit);
    quad_of(q.z_scale, q.z_count, c, z_scale);
    A = constant(q.A, head, 0.f), D = constant(q.D, head, 0.f), dt_bias = constant(q.dt_bias, head, 0.f);
  }

  // What the convolution keeps has come from memory by the time it is read; this may run ahead of who writes it.
  __device__ __forceinline__ void ask(const QuambaDecode& q, const Pieces& p) const {
    constexpr int kBytes = Codes ? 1 : 2;
    if (exists && c * kBytes % 32 == 0)
      for (int i = 0; i < kWidth - 1; ++i)
        prefetch_l2(static_cast<const char*>(q.conv_state) + kBytes * ((3ll * p.batch + i) * q.channels + c));
  }

  __device__ __forceinline__ void read(const QuambaDecode& q, const Pieces& p) {
    if (!exists) return;
    const int inner = q.H * q.P, column = c - inner;  // of B and C, side by side
    const long long at = is_x ? p.batch * q.x_stride + c
                              : p.batch * q.bc_stride + (index < N / 4 ? column : column - q.G * N);
    x = fetch_halves(is_x ? q.x : index < N / 4 ? q.B : q.C, at);
    if constexpr (Codes)
      window = quad_window(q, p.batch, c);
    else
      window = half_window(q, p.batch, c);
    if (!is_x) return;
    z = fetch_halves(q.z, p.batch * q.z_stride + c);
    dt = fetch(q.dt, Types<true>::input(q), p.batch * q.dt_stride + c / q.P);
  }

  // rows: of the block. B, C: of the group, codes or fp32. B_unit: the scale of B's codes, or 1.
  __device__ __forceinline__ void make(const QuambaDecode& q, const Pieces& p, float B_unit, Row* rows, void* B,
                                       void* C) const {
    if (!exists) return;
    const int in = Types<true>::input(q);
    float y[4];
    if constexpr (Codes)
      convolve_quad(q, taps, window, x, y, is_x);
    else
      convolve_halves(q, taps, window, x, y, is_x);
    if (is_x) {
      const float raw = __fadd_rn(value(dt, q.dt, in, p.batch * q.dt_stride + c / q.P), dt_bias);
      const float step = fminf(fmaxf(softplus(raw), q.dt_min), q.dt_max), decay = expf(__fmul_rn(step, A));
      Row* const to = rows + 4 * (index - N / 2);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float value = y[j] * unit[j];
        const float gate = gate_of(q, half_of(z, j, in), z_scale[j]);
        to[j] = {decay, __fmul_rn(step, value) * B_unit, __fmul_rn(value, D), gate};
      }
      return;
    }
    void* const to = index < N / 4 ? B : C;
    const int at = index % (N / 4);
    if constexpr (Codes)
      static_cast<unsigned*>(to)[at] = quad_codes(y);
    else
      static_cast<float4*>(to)[at] = make_float4(y[0], y[1], y[2], y[3]);
  }
};

}  // namespace quamba::decode
