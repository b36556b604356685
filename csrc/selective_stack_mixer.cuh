// What a block of a stack of Mamba1 blocks has of a mixer: brought to shared memory ahead of time.
#pragma once

#include "selective_stack.h"
#include "stack_mixer.cuh"

namespace quamba::stack::selective {

constexpr int kStates = 16;         // of a channel
constexpr int kMostChannels = 64;   // of a block
constexpr int kMostRank = 256, kMostCommon = kMostRank + 2 * kStates;
constexpr int kGroup = 16;          // octets of channels in a group of int4 weights
constexpr int kCopies = 4;          // of a sum, since L2 adds to one line a word after the other

template <Kind KIND>
constexpr int kOctetBytes = KIND == Kind::kW8A8 ? 8 : 4;  // of a row of x_proj
template <Kind KIND>
constexpr int kTogether = kInteger<KIND> ? 1 : 4;  // octets whose codes lie in the same words (operand_w4.cuh)

// Pieces of a row that octets lie in, and at most, wherever they begin.
template <Kind KIND>
__host__ __device__ constexpr int pieces_of(int first, int octets) {
  return (first + octets + kTogether<KIND> - 1) / kTogether<KIND> - first / kTogether<KIND>;
}
template <Kind KIND>
constexpr int most_pieces(int octets) {
  return pieces_of<KIND>(kTogether<KIND> - 1, octets);
}

struct Params {
  QuambaDecode mixer;
  Matrix matrix[2];  // in_proj, of which O are the rows of x, as many as those of z behind them; out_proj
  const float* x;    // the residual stream
  float* y;
  unsigned long long* common;  // what x_proj makes for all channels: sums [layers, kCopies, R + 2 N] of all blocks
  float* u;                    // before its rotation; the last bit is the parity of the layer's number
  float* residual;             // likewise
  unsigned* counts;            // blocks that have passed on the residual, or u, in all layers together
  Groups norm;
  Rotation rotation;
  int layers, R, groups;       // groups: of a row of x_proj
  int pitch, dt_at, x_at, multipliers_at;  // of a row of x_proj; offsets in Mixer::more
  int stages, stage_bytes, x_bytes, sums_bytes, row_floats;
  int ahead;                   // blocks that may be missing when all begin to ask
  int ask_pace, pace;          // percent of a layer's time, for asking L2 for its weights and for bringing them
  float eps;
  QuambaSelectiveStackLayer layer[kMostLayers];
};

// What a block needs of a layer's mixer from before this token, by its channels.
template <bool CODES, typename State>
struct __align__(16) Mixer {
  static constexpr int kSlots = kMostChannels, kTap = CODES ? 4 : 8, kPast = CODES ? 1 : 2;
  unsigned char weight[kSlots * kTap];
  float weight_scale[CODES ? kSlots : 4], out_scale[CODES ? kSlots : 4], in_scale[CODES ? kSlots : 4];
  unsigned short bias[kSlots], dt_bias[kSlots];
  unsigned char past[decode::kWidth - 1][(kSlots + 16) * kPast];
  float z_scale[kSlots], state_scale[kSlots], D[kSlots], dt_scale[kSlots];
  float x_scale, B_scale, C_scale, none;
  float common_scale[CODES ? kMostCommon : 4];  // of x_proj's rows
  unsigned columns[kStates], draws[kSlots];
  float A[kSlots * kStates];
  State state[kSlots * kStates];
  char more[16];  // weights of dt_proj, the block's rows; of x_proj, the block's columns; two multipliers of each row
};

// 4 or 8 bytes of constants.
template <int BYTES>
__device__ __forceinline__ void copy_piece(uint32_t to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(from), "n"(BYTES) : "memory");
}

// An arrival once all copies of this thread have come.
__device__ __forceinline__ void arrive_behind_copies(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

// The larger part of it comes to L2, x_proj's weights by all blocks together.
template <Kind KIND, typename State>
__device__ __forceinline__ void ask_for_mixer(const Params& p, const QuambaSelectiveStackLayer& l, const Share& share) {
  const int lane = threadIdx.x % 32, pieces = (p.R + 2 * kStates) * (p.mixer.H / 128) * kOctetBytes<KIND>;
  const int first = pieces * static_cast<int>(blockIdx.x) / static_cast<int>(gridDim.x);  // of 16 bytes
  const int end = pieces * static_cast<int>(blockIdx.x + 1) / static_cast<int>(gridDim.x);
  if (lane == 6) ask_for(static_cast<const char*>(l.x.w) + first * 16, end - first, 16);
  if (lane == 7)
    ask_for(static_cast<const char*>(l.dt.w) + static_cast<int64_t>(share.first) * p.R, share.rows * p.R, 1);
  if (lane == 8) ask_for(l.A + static_cast<int64_t>(share.first) * kStates, share.rows * kStates, 4);
  if (lane == 9)
    ask_for(static_cast<const State*>(l.state) + static_cast<int64_t>(share.first) * kStates, share.rows * kStates,
            sizeof(State));
}

// A warp brings it for the channels of `share`. full: a barrier of 33 arrivals.
template <Kind KIND, typename State>
__device__ __forceinline__ void bring_mixer(const Params& p, const QuambaSelectiveStackLayer& l, const Share& share,
                                            Mixer<kInteger<KIND>, State>& to, uint32_t full) {
  constexpr bool kCodes = kInteger<KIND>;
  using Made = Mixer<kCodes, State>;
  const QuambaDecode& q = p.mixer;
  const int lane = threadIdx.x % 32, inner = q.H, common = p.R + 2 * kStates;

  // x_proj: some lanes take a row, an octet of channels each, or four
  constexpr int kBytes = kOctetBytes<KIND> * kTogether<KIND>, kLanes = kInteger<KIND> ? 8 : 4, kRows = 32 / kLanes;
  static_assert(most_pieces<KIND>(kMostChannels / kOctet) <= kLanes, "a lane takes one");
  const int piece = lane % kLanes, first_octet = share.first / kOctet;
  if (piece < pieces_of<KIND>(first_octet, share.rows / kOctet)) {
    const int64_t row_bytes = static_cast<int64_t>(inner / kOctet) * kOctetBytes<KIND>;
    const char* from = static_cast<const char*>(l.x.w) + lane / kLanes * row_bytes +
                       (first_octet / kTogether<KIND> + piece) * kBytes;
    uint32_t into = shared_address(to.more + p.x_at) + lane / kLanes * p.pitch + piece * kBytes;
#pragma unroll 4
    for (int row = lane / kLanes; row < common; row += kRows, from += kRows * row_bytes, into += kRows * p.pitch)
      copy_piece<kBytes>(into, from);
  }
  arrive_behind_copies(full);

  // a lane copies one tensor
  const void* from = nullptr;
  void* into = nullptr;
  int64_t at = share.first;
  int element = 4, count = share.rows;
  if (lane < 3) {
    element = Made::kPast, at += static_cast<int64_t>(lane) * inner, from = l.conv_state, into = to.past[lane];
  } else if (lane == 3) {
    element = Made::kTap, from = l.conv_weight, into = to.weight;
  } else if (lane == 4) {
    element = 2, from = l.conv_bias, into = to.bias;
  } else if (lane == 5) {
    element = 2, from = l.dt.bias, into = to.dt_bias;
  } else if (lane == 6) {
    element = kStates * sizeof(State), from = l.state, into = to.state;
  } else if (lane == 7) {
    element = kStates * 4, from = l.A, into = to.A;
  } else if (lane == 8) {
    element = p.R, from = l.dt.w, into = to.more + p.dt_at;
  } else if (lane == 9) {
    from = l.dt.w_scale, into = to.dt_scale;
  } else if (lane == 10) {
    from = l.D, into = to.D;
  } else if (lane == 11) {
    from = sizeof(State) == 1 ? l.state_scale : nullptr, into = to.state_scale;
  } else if (lane == 12) {
    from = q.z_count > 1 ? l.z_scale : nullptr, into = to.z_scale;
  } else if (kCodes && lane == 13) {
    from = l.conv_weight_scale, into = to.weight_scale;
  } else if (kCodes && lane == 14) {
    from = l.conv_out_scale, into = to.out_scale;
  } else if (kCodes && lane == 15) {
    from = q.conv_in_count > 1 ? l.conv_in_scale : nullptr, into = to.in_scale;
  } else if (kCodes && lane == 16) {
    at = 0, count = common, from = l.x.w_scale, into = to.common_scale;
  }
  // codes of rows may begin half way into 16 bytes; what lies before them comes along
  const uintptr_t begin = reinterpret_cast<uintptr_t>(from) + at * element;
  const int early = from ? static_cast<int>(begin % 16) : 0;
  const int bytes = from ? (count * element + early + 15) / 16 * 16 : 0;
  int total = bytes;
#pragma unroll
  for (int step = 16; step; step /= 2) total += __shfl_xor_sync(~0u, total, step);

  const float* single = nullptr;
  float* place = nullptr;
  if (lane == 17) single = l.x_scale, place = &to.x_scale;
  if (lane == 18) single = l.B_scale, place = &to.B_scale;
  if (lane == 19) single = l.C_scale, place = &to.C_scale;
  if (lane == 20 && q.z_count <= 1) single = l.z_scale, place = to.z_scale;
  if (lane == 21 && kCodes && q.conv_in_count == 1) single = l.conv_in_scale, place = to.in_scale;
  if (place) *place = single ? __uint_as_float(constant_word(single)) : 1.f;
  if constexpr (KIND != Kind::kW8A8) {
    using Multiplier = std::conditional_t<kCodes, unsigned char, unsigned short>;
    Multiplier* const pairs = reinterpret_cast<Multiplier*>(to.more + p.multipliers_at);
    const int first = share.first / kOctet / kGroup, next = min(first + 1, p.groups - 1);
    const Multiplier* const of = static_cast<const Multiplier*>(kCodes ? l.x.w_multiplier : l.x.w_scale);
#pragma unroll 2
    for (int row = lane; row < common; row += 32) {
      pairs[2 * row] = of[row * p.groups + first];
      pairs[2 * row + 1] = of[row * p.groups + next];
    }
  }
  if (sizeof(State) == 1 && l.rng) {
    const unsigned key = decode::dither_key(l.rng);
    if (lane < kStates) to.columns[lane] = decode::column_draw(key, static_cast<unsigned>(inner) + lane);
    for (int i = lane; i < share.rows; i += 32)
      to.draws[i] = decode::row_draw(key, static_cast<unsigned>(share.first) + i);
  }
  __syncwarp();
  if (lane == 0) arrive_expecting(full, total);
  __syncwarp();
  if (bytes) bulk_copy(shared_address(into), reinterpret_cast<const void*>(begin - early), bytes, full);
}

// The mixer of a layer as the decode kernels see it.
template <bool CODES, int TYPE>
__device__ __forceinline__ QuambaDecode mixer_of(const Params& p, const QuambaSelectiveStackLayer& l) {
  QuambaDecode q = p.mixer;
  q.in = q.conv_bias_type = TYPE, q.conv_state_type = q.conv_weight_type = CODES ? QUAMBA_I8 : TYPE;
  q.conv_state = l.conv_state, q.conv_bias = l.conv_bias;
  q.conv_in_scale = CODES ? l.conv_in_scale : nullptr, q.conv_out_scale = CODES ? l.conv_out_scale : nullptr;
  q.z_scale = CODES ? l.z_scale : nullptr;
  return q;
}

// The inputs of x_proj that a block has, as they are multiplied: codes as they lie, or of every octet the even ones
// before the odd ones, as int4 weights come apart; or floats.
template <Kind KIND>
__device__ __forceinline__ void put_channel(char* x, int channel, float v) {
  if constexpr (KIND == Kind::kW8A8)
    x[channel] = static_cast<signed char>(v);
  else if constexpr (KIND == Kind::kW4A8)
    x[channel / 8 * 8 + channel % 2 * 4 + channel % 8 / 2] = static_cast<signed char>(v);
  else
    reinterpret_cast<float*>(x)[channel] = v;
}

// What the block's channels, octets of them from `first_octet` on, add to row `row` of x_proj: int32, or a float. early:
// octets in the first group.
template <Kind KIND>
__device__ __forceinline__ auto share_of_row(const Params& p, const char* more, const char* x, int row, int first_octet,
                                             int octets, int early) {
  const char* const w = more + p.x_at + row * p.pitch;
  if constexpr (KIND == Kind::kW8A8) {
    int sum = 0;
#pragma unroll 4
    for (int i = 0; i < octets; ++i) {
      const int2 a = reinterpret_cast<const int2*>(w)[i], b = reinterpret_cast<const int2*>(x)[i];
      sum = __dp4a(a.y, b.y, __dp4a(a.x, b.x, sum));
    }
    return sum;
  } else if constexpr (KIND == Kind::kW4A8) {
    int first = 0, rest = 0;
#pragma unroll 4
    for (int i = 0; i < octets; ++i) {
      const uint32_t a = reinterpret_cast<const uint32_t*>(w)[i];
      const int2 b = reinterpret_cast<const int2*>(x)[i];
      const int even = __dp4a(static_cast<int>(high_codes(a << 4)), b.x, 0);
      const int sum = __dp4a(static_cast<int>(high_codes(a)), b.y, even);
      (i < early ? first : rest) += sum;
    }
    const unsigned char* const m = reinterpret_cast<const unsigned char*>(more + p.multipliers_at) + 2 * row;
    return (first >> 4) * m[0] + (rest >> 4) * m[1];
  } else {
    float first = 0.f, rest = 0.f;
#pragma unroll 2
    for (int i = 0; i < octets; ++i) {
      const int at = first_octet % kTogether<KIND> + i, shift = at % 4 * 4;
      const uint4 v = reinterpret_cast<const uint4*>(w)[at / 4];
      const uint32_t a[4] = {v.x >> shift, v.y >> shift, v.z >> shift, v.w >> shift};
      const float4* const quads = reinterpret_cast<const float4*>(x) + 2 * i;
      const float4 low = quads[0], high = quads[1];
      const float b[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
      float sum = 0.f;
#pragma unroll
      for (int j = 0; j < 8; ++j)  // a nibble behind the bits of 2^23 is a float whose last places it fills
        sum = fmaf(__uint_as_float((a[j / 2] >> j % 2 * 16 & 15u) | 0x4b000000u) - 8388616.f, b[j], sum);
      (i < early ? first : rest) += sum;
    }
    const __half2 m = reinterpret_cast<const __half2*>(more + p.multipliers_at)[row];
    return fmaf(first, __low2float(m), rest * __high2float(m));
  }
}

}  // namespace quamba::stack::selective
