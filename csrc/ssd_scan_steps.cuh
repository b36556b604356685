// What the SSD scan needs to know of dt: decays and weights of the tokens of a chunk.
#pragma once

#include "ssd_scan.cuh"

namespace quamba::ssd {

constexpr int kLeastStep = -24;     // the exponent of dt below which C B^T dt is not scaled up
constexpr int kLeastWeight = -100;  // that of weights

// Where weights are halves they lie as pairs of tokens, 64 times two terms, times the power of two whose exponent ends
// the record: pairs of the tokens that the lane of a product multiplies, one after the other.
__device__ __forceinline__ int place_of_pair(int pair) { return pair % 4 * 8 + pair / 8 * 2 + pair / 4 % 2; }

// Where a slot's chunk lies: its sequence's row and its tokens, none if it is empty.
struct Place {
  long long batch, first, end;
};

template <int Tokens>
__device__ __forceinline__ Place place_of(const QuambaSsdScan& a, long long slot) {
  if (!a.cu_seqlens) {
    const long long chunks = (a.T + Tokens - 1) / Tokens;
    return {slot / chunks, slot % chunks * Tokens, a.T};
  }
  auto bound = [&](int s) { return min(max(static_cast<long long>(__ldg(a.cu_seqlens + s)), 0LL), a.T); };
  int low = 0, high = a.sequences - 1;  // the last sequence whose slots begin here or before
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (first_slot(a, bound(middle), middle, Tokens) <= slot)
      low = middle;
    else
      high = middle - 1;
  }
  const long long begin = bound(low);
  return {0, begin + (slot - first_slot(a, begin, low, Tokens)) * Tokens, bound(low + 1)};
}

// The record of a head, by a warp. load(i): dt of token i of the chunk, as it came. Halves: weights are pairs of fp16, and
// the decays themselves follow. Not real: a rehearsal, for an empty place, that leaves nothing.
template <int Tokens, bool Halves, class Load>
__device__ __forceinline__ void steps_of(const Params& p, const Place& place, long long slot, int head, Load load,
                                         bool real = true) {
  constexpr int kEach = Tokens / 32;
  const QuambaSsdScan& a = p.a;
  const int lane = threadIdx.x % 32;
  const float rate = kLog2e * __ldg(a.A + head), bias = a.dt_bias ? load_float(a.dt_bias, a.dt_bias_dtype, head) : 0.f;
  float dt[kEach], decay[kEach], sum = 0.f, most = 0.f;
#pragma unroll
  for (int e = 0; e < kEach; ++e) {
    dt[e] = 0.f;  // beyond the last token dt = 0 leaves the state alone
    if (place.first + lane * kEach + e < place.end)
      dt[e] = fminf(fmaxf(softplus(load(lane * kEach + e) + bias), a.lowest), a.highest);
  }
#pragma unroll
  for (int e = 0; e < kEach; ++e) decay[e] = sum = __fmaf_rn(dt[e], rate, sum), most = fmaxf(most, dt[e]);
  float before = sum, after = sum;  // both from their own end, so that neither is a difference of long sums
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const float v = __shfl_up_sync(~0u, before, step), w = __shfl_down_sync(~0u, after, step);
    if (lane >= step) before += v;
    if (lane < 32 - step) after += w;
  }
  const float total = __shfl_sync(~0u, before, 31);
  before = __shfl_up_sync(~0u, before, 1), after = __shfl_down_sync(~0u, after, 1);
  if (lane == 0) before = 0.f;
  if (lane == 31) after = 0.f;
  float weight[kEach], weights = 0.f;
#pragma unroll
  for (int e = kEach - 1; e >= 0; --e) {
    decay[e] += before;
    weight[e] = dt[e] * exp2_approximate(after);
    after = __fmaf_rn(dt[e], rate, after);
    weights += weight[e];
  }
#pragma unroll
  for (int step = 16; step; step /= 2) weights += __shfl_xor_sync(~0u, weights, step);
  auto largest = [](float v) { return __uint_as_float(__reduce_max_sync(~0u, __float_as_uint(v))); };
  most = largest(most);
  float* record = const_cast<float*>(p.steps) + (slot * a.H + head) * (kRecord<Tokens> + (Halves ? Tokens : 0));
#pragma unroll
  for (int e = 0; e < kEach; ++e) {
    const int at = lane * kEach + e;
    const float less = decay[e] - log2_approximate(dt[e]), factor = exp2_approximate(decay[e]);
    if (!real) continue;
    record[at] = decay[e];
    record[Tokens + at] = less;
    if (Halves)
      record[kRecord<Tokens> + at] = factor;
    else
      record[2 * Tokens + at] = weight[e];
  }
  float unit = 0.f;
  if constexpr (Halves) {  // tokens 2 lane and the next
    const int exponent = exponent_of(largest(fmaxf(weight[0], weight[1])), kLeastWeight);
    const float factor = power_of_two(-exponent), one = weight[0] * factor, two = weight[1] * factor;
    const uint32_t high = pack_f16(one, two);
    const float2 rounded = unpack_f16(high);
    uint32_t* const pairs = reinterpret_cast<uint32_t*>(record + 2 * Tokens) + place_of_pair(lane);
    const uint32_t low = pack_f16(one - rounded.x, two - rounded.y);
    if (real) pairs[0] = high, pairs[Tokens / 2] = low;
    unit = static_cast<float>(exponent);
  }
  const float4 sums =
      make_float4(total, log2_approximate(weights), static_cast<float>(exponent_of(most, kLeastStep)), unit);
  if (real && lane == 0) *reinterpret_cast<float4*>(record + 3 * Tokens) = sums;
}

__device__ __forceinline__ float load_dt(const QuambaSsdScan& a, const Place& place, int token, int head) {
  return load_float(a.dt, a.dt_dtype, place.batch * a.dt_batch + (place.first + token) * a.dt_token + head);
}

// The same from memory.
template <int Tokens, bool Halves = false>
__device__ __forceinline__ void steps(const Params& p, const Place& place, long long slot, int head, bool real = true) {
  steps_of<Tokens, Halves>(p, place, slot, head, [&](int token) { return load_dt(p.a, place, token, head); }, real);
}

}  // namespace quamba::ssd
