// The scan of ssd_scan_sm90.cuh.
#include "expansion.cuh"
#include "ssd_scan_ahead.cuh"

namespace quamba::ssd::hopper {
namespace {

// Operands of a product that was only begun must not be overwritten before it is over: they are used until here.
template <int Count>
__device__ __forceinline__ void hold(const uint32_t (&v)[Count][4]) {
#pragma unroll
  for (int i = 0; i < Count; ++i) asm volatile("" ::"r"(v[i][0]), "r"(v[i][1]), "r"(v[i][2]), "r"(v[i][3]));
}

// x times the first term of the weights, or what that lacks of x times both.
template <bool Rest>
__device__ __forceinline__ void weigh(uint32_t (&term)[4][4], const uint32_t (&x)[4][4], const float* record,
                                      float unit) {
  const uint4* const pairs = reinterpret_cast<const uint4*>(record + 2 * kTokens) + threadIdx.x % 4 * 2;
  const uint32_t factor = pack_f16(unit, unit);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint4 one = pairs[i], two = Rest ? pairs[kTokens / 8 + i] : one;
    const uint32_t ones[4] = {one.x, one.y, one.z, one.w}, twos[4] = {two.x, two.y, two.z, two.w};
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      const uint32_t v = x[2 * i + k / 4][k % 4], weight = times_f16(ones[k / 2], factor), high = times_f16(v, weight);
      term[2 * i + k / 4][k % 4] =
          Rest ? fma_f16x2(v, times_f16(twos[k / 2], factor), fma_f16x2(v, weight, high ^ 0x80008000u)) : high;
    }
  }
}

// The four warps that keep the state of a head.
template <bool Codes>
__device__ __forceinline__ void consume(const Params& p, const Segment& s, unsigned char* shared, int own_head) {
  using At = Layout<Codes>;
  using Multiply = Products<kTokens, kN, 4>;
  const QuambaSsdScan& a = p.a;
  const int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32, quad = lane / 4, pair = 2 * (lane % 4);
  const int head = s.head + own_head;
  const uint32_t base = shared_address(shared);
  const Barriers<Codes> barriers{base + At::kBarriers};
  float* const states = reinterpret_cast<float*>(shared + At::kStates) + 4 * own_head;
  auto sync = [&] { sync_threads(1 + own_head, 128); };
  auto largest_at = [](const float* at) {
    const float4 v = *reinterpret_cast<const float4*>(at);
    return fmaxf(fmaxf(v.x, v.y), fmaxf(v.z, v.w));
  };

  // The state of the warp's channels, to be multiplied by own[] and 2^unit.
  const float b_scale = a.b_scale ? __ldg(a.b_scale + s.group) : 1.f;
  const float c_scale = a.c_scale ? __ldg(a.c_scale + s.group) : 1.f;
  float own[2], skip[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float x_scale = a.x_scale ? __ldg(a.x_scale + head * kP + channel_of(Codes, warp, quad, r)) : 1.f;
    own[r] = fabsf(x_scale * b_scale) < 1e-30f ? 1e-30f : x_scale * b_scale;  // it divides a state
    skip[r] = x_scale * load_float(a.D, a.D_dtype, head);
  }
  wait_for_previous_kernel();
  float h[kN / 2];
  const long long owner = static_cast<long long>(s.sequence) * a.H + head;
  auto state_at = [&](int j, int r) { return (owner * kP + channel_of(Codes, warp, quad, r)) * kN + 8 * j + pair; };
  const int chunks = (s.tokens + kTokens - 1) / kTokens;
  // h is what the registers hold times 2^unit; log2 of what the piece leaves of what was before
  float unit = 0.f, kept = 0.f;
  const long long locals = owner * (p.cuts - 1);
  auto local = [&](long long i, int j) {  // the state of a piece; those of the own ones behind them
    return reinterpret_cast<float4*>(p.local) + ((2 * locals + i) * (kN / 8) + j) * 128 + thread;
  };
  // h, of which 2^decays is left of what was before it: with all that
  auto enter = [&](float(&h)[kN / 2], float decays) {
    if (s.index > 0) {
      if (thread < s.index)
        while (!arrived(p.flags + locals + thread)) {}
      sync();
    }
#pragma unroll 1
    for (int i = s.index - 1; i >= 0; --i) {
      const float2 left = __ldcg(reinterpret_cast<const float2*>(p.left) + locals + i);
      const float factor = exp2_approximate(decays) * exp2_approximate(left.y);
      decays += left.x;
#pragma unroll
      for (int j = 0; j < kN / 8; ++j) {
        const float4 v = __ldcg(local(i, j));
        h[4 * j] = __fmaf_rn(v.x, factor, h[4 * j]), h[4 * j + 1] = __fmaf_rn(v.y, factor, h[4 * j + 1]);
        h[4 * j + 2] = __fmaf_rn(v.z, factor, h[4 * j + 2]), h[4 * j + 3] = __fmaf_rn(v.w, factor, h[4 * j + 3]);
      }
    }
    if (a.state) {
      const float factor = exp2_approximate(decays), inverse[2] = {factor / own[0], factor / own[1]};
#pragma unroll
      for (int j = 0; j < kN / 8; ++j)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const float2 v = __ldcg(reinterpret_cast<const float2*>(a.state + state_at(j, r)));
          h[4 * j + 2 * r] = __fmaf_rn(v.x, inverse[r], h[4 * j + 2 * r]);
          h[4 * j + 2 * r + 1] = __fmaf_rn(v.y, inverse[r], h[4 * j + 2 * r + 1]);
        }
    }
  };
  auto leave = [&](const float(&h)[kN / 2]) {
#pragma unroll
    for (int j = 0; j < kN / 8; ++j)
#pragma unroll
      for (int r = 0; r < 2; ++r)
        *reinterpret_cast<float2*>(a.last + state_at(j, r)) =
            make_float2(h[4 * j + 2 * r] * own[r], h[4 * j + 2 * r + 1] * own[r]);
  };
  int turn = 0, stage = 0;  // chunks that this warp has seen, the last of which is to be replaced in its stage
#pragma unroll
  for (int i = 0; i < kN / 2; ++i) h[i] = 0.f;
  auto add = [&] {
    const int place_of_head = stage * kMost + own_head;
    const float* const record = reinterpret_cast<const float*>(shared + At::kVectors) + place_of_head * At::kFloats;
    quamba::wait(barriers.made(stage, own_head), turn / kStages & 1);
    const float4 sums = *reinterpret_cast<const float4*>(record + 3 * kTokens);
    const int ex = Codes ? 0 : scale_of(largest_at(record + At::kLargest));
    const float inputs = static_cast<float>(ex + *reinterpret_cast<const int*>(record + At::kExponents));
    // h is no operand, so only what is added must not overflow
    const float next = ceilf(fmaxf(inputs + 2 * kBits + sums.y, -60.f)) - kHighest;
    const float stays = exp2_approximate(fminf(sums.x + unit - next, 120.f));
    unit = next, kept += sums.x;
#pragma unroll
    for (int i = 0; i < kN / 2; ++i) {
      h[i] *= stays;
      asm volatile("" : "+f"(h[i]));
    }
    uint32_t x[4][4], terms[2][4][4];
    Chunk<Codes>::left(x, base + At::kX + place_of_head * At::kRaw, warp, a.x_dtype, ex);
    const float weight_unit = exp2_approximate(inputs + sums.w - next);
    weigh<false>(terms[0], x, record, weight_unit);
    weigh<true>(terms[1], x, record, weight_unit);
    quamba::wait(barriers.filled(stage), turn / kStages & 1);
    Multiply::update(h, terms[0], terms[1], base + stage * kSlotBytes);
    Multiply::template wait<0>(h);
    hold(terms[0]), hold(terms[1]);
    __syncwarp();
    if (lane == 0) quamba::arrive(barriers.read(stage));
    ++turn, stage = stage == kStages - 1 ? 0 : stage + 1;
  };
  const bool last = s.index == p.cuts - 1, between = s.index > 0 && !last;
  auto keep = [&](int i) {
#pragma unroll
    for (int j = 0; j < kN / 8; ++j)
      *local(i, j) = make_float4(h[4 * j], h[4 * j + 1], h[4 * j + 2], h[4 * j + 3]);
  };
  float decays = 0.f, unit_own = 0.f;  // of what comes before the outputs
  // First what outputs of this segment begin with, then the rest of the piece. The code is short on purpose: what runs but
  // a few times takes longer to fetch than to execute.
#pragma unroll 1
  for (int part = between ? 0 : 1; part < 2; ++part) {
    const int until = part ? s.ahead : s.own;
#pragma unroll 1
    while (turn < until) add();
    if (part == 0 || last) decays = kept, unit_own = unit;
    if (last) break;
    keep(part ? s.index : p.cuts - 1 + s.index);
  }
  if (!last) {
    if (thread == 0) reinterpret_cast<float2*>(p.left)[locals + s.index] = make_float2(kept, unit);
    signal_threads(kTells + own_head, 128 + 32);
#pragma unroll
    for (int j = 0; j < kN / 8; ++j) {
      const float4 v = between ? *local(p.cuts - 1 + s.index, j) : make_float4(0.f, 0.f, 0.f, 0.f);
      h[4 * j] = v.x, h[4 * j + 1] = v.y, h[4 * j + 2] = v.z, h[4 * j + 3] = v.w;
    }
  }
  const float scale = exp2_approximate(unit_own);
#pragma unroll
  for (int i = 0; i < kN / 2; ++i) h[i] *= scale;
  enter(h, decays);
  float most = 0.f;
#pragma unroll
  for (int i = 0; i < kN / 2; ++i) most = fmaxf(most, fabsf(h[i]));
  const unsigned largest = __reduce_max_sync(~0u, __float_as_uint(most));
  if (lane == 0) states[warp] = __uint_as_float(largest);
  sync();
  const int e = exponent_of(largest_at(states), -100) + 1 - kHighest;
  float bound = static_cast<float>(e + kHighest);  // log2 of the largest |h|, or more
#pragma unroll
  for (int i = 0; i < kN / 2; ++i) h[i] *= power_of_two(-e);
  unit = static_cast<float>(e);

  const long long row_step = static_cast<long long>(a.H) * kP;
  unsigned short* out = static_cast<unsigned short*>(a.y) + ((s.batch * a.T + s.first) * a.H + head) * kP +
                        lane / 2 * row_step + 16 * warp + lane % 2 * 8;
  const bool half = a.y_dtype == QUAMBA_F16;
#pragma unroll 1
  for (int chunk = 0; chunk < chunks; ++chunk, ++turn) {
    const int place_of_head = stage * kMost + own_head;
    const float* const record = reinterpret_cast<const float*>(shared + At::kVectors) + place_of_head * At::kFloats;
    const uint32_t at_b = base + stage * kSlotBytes, at_c = at_b + kOperands;
    quamba::wait(barriers.made(stage, own_head), turn / kStages & 1);
    const float4 sums = *reinterpret_cast<const float4*>(record + 3 * kTokens);
    const int4 e = *reinterpret_cast<const int4*>(record + At::kExponents);
    const int ex = Codes ? 0 : scale_of(largest_at(record + At::kLargest));
    const float total = sums.x, inputs = static_cast<float>(ex + e.x);
    const float m = sums.z + 1.f + static_cast<float>(e.z);  // |C B^T dt| < 2^m 2^kHighest
    bound = together(bound + total, fmaxf(inputs + 2 * kBits + sums.y, kNothing));
    const float next = ceilf(fmaxf(bound, -60.f)) - kHighest;
    const float stays = exp2_approximate(fminf(total + unit - next, 120.f));
    const float carries = exp2_approximate(fminf(unit - inputs - m, 120.f));
    const float weight_unit = exp2_approximate(inputs + sums.w - next);
    quamba::wait(barriers.filled(stage), turn / kStages & 1);

    float y[32];
    uint32_t left[kN / 16][4], x[4][4], term[4][4];
#pragma unroll
    for (int i = 0; i < kN / 4; ++i) left[i / 4][i % 4] = pack_f16(h[2 * i], h[2 * i + 1]);
    // h <- exp(decay of the chunk) h + x^T (weights) B
#pragma unroll
    for (int i = 0; i < kN / 2; ++i) {
      h[i] *= stays;
      asm volatile("" : "+f"(h[i]));  // before any product begins, or the compiler waits for its end
    }
    Multiply::carry(y, left, at_c);
    Chunk<Codes>::left(x, base + At::kX + place_of_head * At::kRaw, warp, a.x_dtype, ex);
    unit = next;
    weigh<false>(term, x, record, weight_unit);
    Multiply::template update<false>(h, term, term, at_b);
    Multiply::template wait<1>(y);
    hold(left);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      float2 carried = *reinterpret_cast<const float2*>(record + kRecord<kTokens> + 8 * j + pair);
      carried.x *= carries, carried.y *= carries;
#pragma unroll
      for (int r = 0; r < 2; ++r) y[4 * j + 2 * r] *= carried.x, y[4 * j + 2 * r + 1] *= carried.y;
    }
    Multiply::apply(y, x, base + At::kM + place_of_head * kPanel);
    Multiply::template wait<0>(y);
    hold(term);
    if (last) {
      Multiply::template wait<0>(h);
      weigh<true>(term, x, record, weight_unit);
      Multiply::template update<false>(h, term, term, at_b);
    }
    // y^T turned, in shared memory that no other warp touches
    const float factor = exp2_approximate(inputs + m + static_cast<float>(e.y));
    const float all[2] = {own[0] * c_scale * factor, own[1] * c_scale * factor};
    const float direct[2] = {skip[0] * power_of_two(ex), skip[1] * power_of_two(ex)};
    unsigned char* const turned_y =
        shared + (Codes ? At::kY + own_head * kPanel : At::kX + place_of_head * At::kRaw);
    auto pack = [&](float low, float high) { return half ? pack_f16(low, high) : pack_bf16(low, high); };
    __syncwarp();
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      float v[2][2];  // of a row, of a token
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float2 direct_x = unpack_f16(x[j / 2][j % 2 * 2 + r]);
        v[r][0] = __fmaf_rn(y[4 * j + 2 * r], all[r], direct_x.x * direct[r]);
        v[r][1] = __fmaf_rn(y[4 * j + 2 * r + 1], all[r], direct_x.y * direct[r]);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i)
        *reinterpret_cast<uint32_t*>(turned_y + (Codes ? place<kTokens>(8 * j + pair + i, 16 * warp + 2 * quad)
                                                       : place<kTokens>(8 * j + quad, 16 * warp + 8 * i + pair))) =
            Codes ? pack(v[0][i], v[1][i]) : turned(pack(v[i][0], v[i][1]));
    }
    __syncwarp();
    const int remaining = s.tokens - chunk * kTokens - lane / 2;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (16 * i < remaining)
        *reinterpret_cast<uint4*>(out + i * 16 * row_step) =
            *reinterpret_cast<const uint4*>(turned_y + place<kTokens>(16 * i + lane / 2, 16 * warp + lane % 2 * 8));
    out += kTokens * row_step;
    Multiply::template wait<0>(h);
    hold(term);
    __syncwarp();
    if (lane == 0) quamba::arrive(barriers.read(stage));
    stage = stage == kStages - 1 ? 0 : stage + 1;
  }
  if (last) {
    const float scale = exp2_approximate(unit);
#pragma unroll
    for (int i = 0; i < kN / 2; ++i) h[i] *= scale;
    leave(h);
  }
}

constexpr int kAheadRegisters = 88, kStateRegisters = 208;  // of a thread: all that a multiprocessor has

constexpr int kThreads = 128 * (1 + kMost), kPieces = 24;  // pieces of a thread that expands

struct Heads {
  Params scan;
  Expansion expansion;
  unsigned blocks;  // of the scan
};

// Segment by segment: a block waits only for some that begin before it, which leave their states behind before they
// wait. Blocks beyond those of the scan expand a weight: they begin where it leaves a multiprocessor idle, or after it.
template <bool Codes>
__global__ void __launch_bounds__(kThreads, 1) ssd_scan_heads(const __grid_constant__ Heads all) {
  using At = Layout<Codes>;
  extern __shared__ __align__(1024) unsigned char shared[];
  launch_dependents();
  const Params& p = all.scan;
  if (blockIdx.x >= all.blocks)
    return expand<kPieces>(all.expansion, blockIdx.x - all.blocks, threadIdx.x, kThreads,
                           [] { wait_for_previous_kernel(); });
  const int heads_of_group = p.a.H / p.a.G, parts = (heads_of_group - 1) / kMost + 1;
  const int owners = parts * p.a.G * p.a.sequences, owner = blockIdx.x % owners;
  const int part = owner % parts, group = owner / parts % p.a.G, sequence = owner / (parts * p.a.G);
  const int heads = min(heads_of_group - part * kMost, kMost);
  const Barriers<Codes> barriers{shared_address(shared) + At::kBarriers};
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      init_barrier(barriers.filled(i), 1), init_barrier(barriers.read(i), 4 * heads);
      for (int head = 0; head < kMost; ++head) init_barrier(barriers.made(i, head), 128);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  if (p.a.cu_seqlens) wait_for_previous_kernel();  // else each warp does, once it has its constants
  Segment s = segment_of(p.a, p.cuts, sequence, blockIdx.x / owners);
  s.group = group, s.head = group * heads_of_group + part * kMost, s.heads = heads;
  if (threadIdx.x < 128) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kAheadRegisters));
    produce<Codes>(p, s, shared);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kStateRegisters));
    const int head = threadIdx.x / 128 - 1;
    if (head >= heads) return;
    consume<Codes>(p, s, shared, head);
  }
}

template <bool Codes>
int launch_as(const Params& p, void* stream) {
  const long long blocks = blocks_of(p.a) * p.cuts;
  Expansion expansion = expansion_of(p.a.expansion);
  int processors = 0;
  cudaError_t error = device_attribute(cudaDevAttrMultiProcessorCount, processors);
  if (error != cudaSuccess) return error;
  if (blocks < processors && !p.a.cu_seqlens) {
    // on an H100 a chunk of outputs, with what precedes it, lasts about as long as half of such a block
    const long long chunks = (p.a.T + kTokens - 1) / kTokens / p.cuts;
    expansion.leave_few(kThreads, kPieces, processors - blocks, chunks / 2, processors);
  }
  const long long grid = blocks + expansion.blocks(kThreads, kPieces);
  if (grid > 0x7fffffffLL) return QUAMBA_UNSUPPORTED;
  constexpr int kShared = Layout<Codes>::kBytes;
  error = cudaFuncSetAttribute(ssd_scan_heads<Codes>, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
  if (error != cudaSuccess) return error;
  const Heads all{p, expansion, static_cast<unsigned>(blocks)};
  return launch(ssd_scan_heads<Codes>, all, dim3(static_cast<unsigned>(grid)), kThreads, stream, kShared);
}

}  // namespace

int launch_scan(const Params& p, void* stream) {
  return p.a.x_dtype == QUAMBA_I8 ? launch_as<true>(p, stream) : launch_as<false>(p, stream);
}

}  // namespace quamba::ssd::hopper
