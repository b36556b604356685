// What a block of a stack has of a mixer: brought to shared memory ahead of time, and read there.
#pragma once

#include "stack_params.cuh"

namespace quamba::stack {

// What a block has of the mixers.
struct Part {
  int group, first, rows, channel0;  // rows of the state: of its group, among all

  __device__ __forceinline__ Part(const Params& p) {
    const int group_rows = p.mixer.H / p.mixer.G * p.mixer.P;
    group = blockIdx.x / p.blocks, first = (blockIdx.x - group * p.blocks) * p.rows;
    rows = group < p.mixer.G ? max(0, min(p.rows, group_rows - first)) : 0;
    channel0 = group * group_rows + first;
  }
};

// What a block needs of a layer's mixer from before this token, in shared memory. Channels of the convolution in the order of
// B, C and the block's rows of x.
template <bool CODES, typename State>
struct __align__(16) Mixer {
  static constexpr int kSlots = 2 * kN + kMostRows, kTap = CODES ? 4 : 8, kPast = CODES ? 1 : 2, kHeads = 8;
  unsigned char weight[kSlots * kTap];
  float weight_scale[CODES ? kSlots : 4], out_scale[CODES ? kSlots : 4], in_scale[CODES ? kSlots : 4];
  unsigned short bias[kSlots];
  unsigned char past[decode::kWidth - 1][(kSlots + 16) * kPast];
  float x_scale[kMostRows], z_scale[kMostRows], state_scale[kMostRows];
  float A[kHeads], D[kHeads], dt_bias[kHeads], shared_scale[4];  // from the first row's head on; of B and C
  unsigned columns[kN], draws[kMostRows];
  State state[kMostRows * kN];  // of which there are rows
};

// Where element c of B, C or the dither lies, so that lanes with `count` neighbours each read quads side by side.
template <int COUNT>
__device__ __forceinline__ int spread(int c) {
  return c % COUNT / 4 * (kN / COUNT * 4) + c / COUNT * 4 + c % 4;
}

// A warp brings it.
template <bool CODES, typename State>
__device__ __forceinline__ void bring_mixer(const Params& p, const QuambaStackLayer& l, const Part& part,
                                            Mixer<CODES, State>& to, uint32_t full) {
  using Made = Mixer<CODES, State>;
  const QuambaDecode& q = p.mixer;
  const int lane = threadIdx.x % 32, inner = q.H * q.P, rows = part.rows;
  // a lane copies one stretch of one tensor
  const int stretch = lane % 3, tensor = lane / 3;
  const int first = stretch == 2 ? part.channel0 : inner + (stretch * q.G + part.group) * kN;
  const int count = stretch == 2 ? rows : kN, slot = stretch * kN;
  const void* from = nullptr;
  void* into = nullptr;
  int64_t at = first;
  int bytes = 0, element = 4;
  if (tensor < 3) {
    element = Made::kPast, at += static_cast<int64_t>(tensor) * q.channels;
    from = l.conv_state, into = to.past[tensor] + slot * element;
  } else if (tensor == 3) {
    element = Made::kTap, from = l.conv_weight, into = to.weight + slot * element;
  } else if (tensor == 4) {
    element = 2, from = l.conv_bias, into = to.bias + slot;
  } else if (CODES && tensor == 5) {
    from = l.conv_weight_scale, into = to.weight_scale + slot;
  } else if (CODES && tensor == 6) {
    from = l.conv_out_scale, into = to.out_scale + slot;
  } else if (CODES && tensor == 7) {
    from = q.conv_in_count > 1 ? l.conv_in_scale : nullptr, into = to.in_scale + slot;
  }
  if (from) bytes = count * element;
  if (tensor >= 8) {
    at = part.channel0, bytes = rows * 4;
    if (lane == 24) from = l.state, into = to.state, at *= kN, element = sizeof(State), bytes = rows * kN * element;
    if (lane == 25) from = l.state_scale, into = to.state_scale;
    if (lane == 26) from = q.x_count > 1 ? l.x_scale : nullptr, into = to.x_scale;
    if (lane == 27) from = q.z_count > 1 ? l.z_scale : nullptr, into = to.z_scale;
    if (!from) bytes = 0;
  }
  // codes of rows may begin half way into 16 bytes; what lies before them comes along
  const uintptr_t begin = reinterpret_cast<uintptr_t>(from) + at * element;
  const int early = from ? static_cast<int>(begin % 16) : 0;
  bytes = from ? (bytes + early + 15) / 16 * 16 : 0;
  int total = bytes;
#pragma unroll
  for (int step = 16; step; step /= 2) total += __shfl_xor_sync(~0u, total, step);
  const auto one = [](const float* data, int i) { return data ? __uint_as_float(constant_word(data + i)) : 1.f; };
  const int head0 = part.channel0 / q.P;
  if (lane < Made::kHeads) {
    const int head = min(head0 + lane, q.H - 1);
    to.A[lane] = one(l.A, head), to.D[lane] = one(l.D, head), to.dt_bias[lane] = l.dt_bias ? one(l.dt_bias, head) : 0.f;
  }
  if (lane == 8 && CODES && q.conv_in_count == 1) to.in_scale[0] = one(l.conv_in_scale, 0);
  if (lane == 9 && q.x_count <= 1) to.x_scale[0] = one(l.x_scale, 0);
  if (lane == 10 && q.z_count <= 1) to.z_scale[0] = one(l.z_scale, 0);
  if (lane == 11) to.shared_scale[0] = one(l.B_scale, q.B_count > 1 ? part.group : 0);
  if (lane == 12) to.shared_scale[1] = one(l.C_scale, q.C_count > 1 ? part.group : 0);
  if (sizeof(State) == 1 && l.rng) {
    const unsigned key = decode::dither_key(l.rng);
    for (int i = lane; i < kN; i += 32)
      to.columns[spread<16>(i)] = decode::column_draw(key, static_cast<unsigned>(inner) + i);
    for (int i = lane; i < rows; i += 32) to.draws[i] = decode::row_draw(key, static_cast<unsigned>(part.channel0) + i);
  }
  __syncwarp();
  if (lane == 0) arrive_expecting(full, total);
  __syncwarp();
  if (bytes)
    bulk_copy(shared_address(into), reinterpret_cast<const void*>(begin - early), bytes, full);
}

// The mixer of a layer as the decode kernels see it.
template <bool CODES, int TYPE>
__device__ __forceinline__ QuambaDecode mixer_of(const Params& p, const QuambaStackLayer& l) {
  QuambaDecode q = p.mixer;
  q.in = q.conv_bias_type = TYPE, q.conv_state_type = q.conv_weight_type = CODES ? QUAMBA_I8 : TYPE;
  q.conv_state = l.conv_state, q.conv_weight = l.conv_weight, q.conv_bias = l.conv_bias;
  q.conv_weight_scale = CODES ? l.conv_weight_scale : nullptr;
  q.conv_in_scale = CODES ? l.conv_in_scale : nullptr, q.conv_out_scale = CODES ? l.conv_out_scale : nullptr;
  q.x_scale = CODES ? l.x_scale : nullptr, q.B_scale = CODES ? l.B_scale : nullptr, q.C_scale = CODES ? l.C_scale : nullptr;
  q.z_scale = CODES ? l.z_scale : nullptr;
  q.A = l.A, q.D = l.D, q.dt_bias = l.dt_bias, q.rng = l.rng;
  return q;
}

// A channel of the convolution, its new input being x, its constants and past in slot `at`: every word is filled, wherever the
// element would lie.
template <bool CODES, int TYPE, typename Made>
__device__ __forceinline__ void read_channel(const QuambaDecode& q, const Made& mixer, int at, int early, int place,
                                             unsigned x, decode::Taps& taps, decode::Window& window) {
  const auto code = [](unsigned v) { return v * 0x01010101u; };
  const auto half = [](unsigned v) { return v * 0x00010001u; };
  if constexpr (CODES) {
    taps.weight.x = taps.weight.y = reinterpret_cast<const unsigned*>(mixer.weight)[at];
    taps.weight_scale = mixer.weight_scale[at], taps.out = mixer.out_scale[at];
    taps.in = mixer.in_scale[q.conv_in_count > 1 ? at : 0];
  } else {
    const uint2 two = reinterpret_cast<const uint2*>(mixer.weight)[at];
    taps.weight.x = two.x, taps.weight.y = two.y, taps.weight_scale = taps.out = taps.in = 1.f;
  }
  if (q.conv_bias) taps.bias = half(mixer.bias[at]);
  window = {0, place};
#pragma unroll
  for (int w = 0; w < decode::kWidth - 1; ++w) {
    if constexpr (CODES)
      window.past[w] = code(mixer.past[w][at + early]);
    else
      window.past[w] = half(reinterpret_cast<const unsigned short*>(mixer.past[w])[at]);
  }
  window.x = half(x);
}

}  // namespace quamba::stack
