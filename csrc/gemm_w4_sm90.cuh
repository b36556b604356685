// y = x w^T for many rows on Hopper with packed int4 weights: x fp16 or bf16 and w = q4 * scale, or x int8 and
// w = q4 * multiplier. q4 is int32 [O, K/8], scales (fp16) and multipliers (int8) are [O, K/S], all as they are stored.
//
// What is computed is y^T: weights are the operand that wgmma takes from registers, so unpacked ones never meet shared
// memory. One warp has TMA bring tiles of x and of packed words; each of two multiplying warp groups makes the operand
// of the next 64 columns from the words of its 64 channels while the tensor cores work on the previous ones.
#pragma once

#define CUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED  // instructions of 160 tokens

#include <algorithm>

#include "cute/tensor.hpp"
#include "cutlass/arch/reg_reconfig.h"

#include "finish.cuh"
#include "launch.cuh"
#include "operand_w4.cuh"

namespace quamba::w4 {

using namespace cute;

constexpr int kThreads = 384, kMathWarps = 8;
constexpr int kPitch = 68;  // floats between tokens in the epilogue's buffer: stores of a warp meet all banks

template <class Element, int TileM>
struct Buffers {
  static constexpr int kXBytes = TileM * kTileK * static_cast<int>(sizeof(Element)), kWBytes = kTileO * kTileK / 2;
  static constexpr int kOut = 16 * kPitch * 4;  // of each group's epilogue
  static constexpr int kFit = (227 * 1024 - 1024 - 2 * kOut - 256) / (kXBytes + kWBytes), kStages = kFit < 8 ? kFit : 8;
  static constexpr int kBytes = kStages * (kXBytes + kWBytes) + 2 * kOut + 2 * kStages * 8 + 1024;
};

// Where a block is: its tile and the step along K. Tiles go down the tokens of a band, then to the next channels, so
// that what runs together shares x and w in L2.
template <int TileM>
struct Walk {
  static constexpr int kBand = 2048 / TileM;
  int tile, step, row, column;
  int steps, tiles_m, tiles_o;

  __device__ Walk(const Weights& w)
      : tile(blockIdx.x), step(0), steps((w.K + kTileK - 1) / kTileK), tiles_m((w.M + TileM - 1) / TileM),
        tiles_o((w.O + kTileO - 1) / kTileO) {
    place();
  }
  __device__ bool valid() const { return tile < tiles_m * tiles_o; }
  __device__ void place() {
    int band = tile / (kBand * tiles_o), inside = tile - band * kBand * tiles_o;
    int high = max(min(kBand, tiles_m - band * kBand), 1), across = inside / high;
    row = (band * kBand + inside - across * high) * TileM, column = across * kTileO;
  }
  __device__ void next_tile() {
    tile += gridDim.x, step = 0;
    place();
  }
  __device__ void next() {
    if (++step == steps) next_tile();
  }
};

// Lets those who sync_threads on the same barrier go on, without waiting for them.
__device__ __forceinline__ void signal_threads(int id, int count) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(count) : "memory");
}

// Asks for a step's share of the tile's residual in L2; the whole of it would keep the step's loads waiting.
template <int TileM, class W>
__device__ __forceinline__ void ask_ahead(const Finish& p, const W& at) {
  int size = p.residual_dtype == QUAMBA_F32 ? 4 : 2, bytes = min(kTileO, p.O - at.column) * size;
  int until = min(TileM * (at.step + 1) / at.steps, p.M - at.row);
  for (int m = TileM * at.step / at.steps; m < until; ++m) {
    const char* from =
        static_cast<const char*>(p.residual) + (static_cast<long long>(at.row + m) * p.O + at.column) * size;
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
  }
}

// fp32 results from registers: eight lanes hold neighbouring channels of a token, which are a sector of 32 bytes. The
// residual of several tokens is asked for at once, since nothing multiplies meanwhile.
template <int TileM, bool Scaled, class Acc>
__device__ __forceinline__ void finish_floats(const Finish& p, Acc& acc, int token, int channel) {
  constexpr int kBlocks = TileM / 8, kOnce = TileM == 160 ? 10 : TileM == 256 ? 4 : 8;
  int warp = threadIdx.x % 128 / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  float bias[2] = {0.f, 0.f}, w_scale[2] = {1.f, 1.f};
  bool exists[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    int n = channel + 16 * warp + 8 * r + g;
    exists[r] = n < p.O;
    if (!exists[r]) continue;
    if (Scaled) w_scale[r] = __ldg(p.w_scale + n);
    if (p.bias) bias[r] = load_one(p.bias, p.bias_dtype, n);
  }
  long long start = static_cast<long long>(token + 2 * t) * p.O + channel + 16 * warp + g;
  float* y = static_cast<float*>(p.y) + start;
  const float* residual = static_cast<const float*>(p.residual) + start;
  int left = p.M - token - 2 * t;
#pragma unroll
  for (int c = 0; c < kBlocks; c += kOnce) {
    float more[kOnce][2][2];
#pragma unroll
    for (int b = 0; b < kOnce; ++b)
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int r = 0; r < 2; ++r)
          if (p.residual && exists[r] && 8 * (c + b) + i < left)
            more[b][i][r] = __ldcg(residual + static_cast<long long>(8 * (c + b) + i) * p.O + 8 * r);
#pragma unroll
    for (int b = 0; b < kOnce; ++b)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        int m = 8 * (c + b) + i;
        if (m >= left) continue;
        float x_scale = Scaled ? __ldcg(p.x_scale + (token + 2 * t + m) * p.x_step) : 1.f;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          float v = static_cast<float>(acc(make_coord(i, r, c + b), 0, 0));
          if (Scaled) v = __fmul_rn(__fmul_rn(v, x_scale), w_scale[r]);
          v = __fadd_rn(v, bias[r]);
          if (p.residual) v = __fadd_rn(v, more[b][i][r]);
          if (exists[r]) __stcs(y + static_cast<long long>(m) * p.O + 8 * r, v);
        }
      }
  }
}

// A group's 64 channels by TileM tokens, from registers over its buffer to y. 16-bit results without a residual are
// finished where they are and cross over in pairs of tokens; int8 and 16-bit ones with a residual cross over as
// accumulated, 16 tokens at a time.
template <int TileM, bool Scaled, class Acc>
__device__ __forceinline__ void finish_tokens(const Finish& p, Acc& acc, char* buffer, int group, int token,
                                              int channel) {
  int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4;
  bool half = p.y_dtype == QUAMBA_F16;
  if (p.y_dtype == QUAMBA_F32 && (!p.residual || p.residual_dtype == QUAMBA_F32))
    return finish_floats<TileM, Scaled>(p, acc, token, channel);
  if (!p.residual && (half || p.y_dtype == QUAMBA_BF16)) {
    float bias[2] = {0.f, 0.f}, w_scale[2] = {1.f, 1.f};
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      int n = min(channel + 16 * warp + 8 * r + g, p.O - 1);
      if (Scaled) w_scale[r] = __ldg(p.w_scale + n);
      if (p.bias) bias[r] = load_one(p.bias, p.bias_dtype, n);
    }
    // stmatrix: lane i gives the address of row i % 8 of matrix i / 8; matrices are channels g, g + 8 by two times
    // eight tokens. Rows of 128 bytes, their 16-byte pieces exchanged by row.
    int piece = 2 * warp + lane / 8 % 2, row = lane / 16 * 8 + lane % 8;
    unsigned to = shared_address(buffer) + row * 128 + ((piece ^ (row & 7)) << 4);
    unsigned from = shared_address(buffer) + thread / 8 * 128 + ((thread % 8 ^ (thread / 8 & 7)) << 4);
    int n = channel + thread % 8 * 8;
    unsigned short* y = static_cast<unsigned short*>(p.y) + static_cast<long long>(token + thread / 8) * p.O + n;
#pragma unroll
    for (int c = 0; c < TileM / 32; ++c) {
      if (token + 32 * c < p.M) {
        unsigned word[4][2];
#pragma unroll
        for (int b = 0; b < 4; ++b) {
          float2 x_scale = make_float2(1.f, 1.f);
          if (Scaled) {
            int m = token + 32 * c + 8 * b + 2 * t;
            x_scale.x = __ldcg(p.x_scale + min(m, p.M - 1) * p.x_step);
            x_scale.y = __ldcg(p.x_scale + min(m + 1, p.M - 1) * p.x_step);
          }
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            float low = static_cast<float>(acc(make_coord(0, r, 4 * c + b), 0, 0));
            float high = static_cast<float>(acc(make_coord(1, r, 4 * c + b), 0, 0));
            if (Scaled) {
              low = __fmul_rn(__fmul_rn(low, x_scale.x), w_scale[r]);
              high = __fmul_rn(__fmul_rn(high, x_scale.y), w_scale[r]);
            }
            word[b][r] = pack_pair(__fadd_rn(low, bias[r]), __fadd_rn(high, bias[r]), half);
          }
        }
        if (c) sync_threads(2 + group, 128);  // the previous tokens have been read
#pragma unroll
        for (int b = 0; b < 4; b += 2)
          asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to + b * 1024),
                       "r"(word[b][0]), "r"(word[b][1]), "r"(word[b + 1][0]), "r"(word[b + 1][1])
                       : "memory");
        sync_threads(2 + group, 128);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          uint4 eight = load_shared(from + i * 2048);
          if (n < p.O && token + 32 * c + 16 * i + thread / 8 < p.M)
            *reinterpret_cast<uint4*>(y + static_cast<long long>(32 * c + 16 * i) * p.O) = eight;
        }
      }
    }
  } else {
    using Value = typename Acc::value_type;
    Value* values = reinterpret_cast<Value*>(buffer);
    Value* to = values + 2 * t * kPitch + 16 * warp + g;
    const Value* from = values + (warp / 2 * 8 + g) * kPitch + warp % 2 * 32 + 2 * t;
#pragma unroll 1
    for (int c = 0; c < TileM / 16 && token + 16 * c < p.M; ++c) {
      if (c) sync_threads(2 + group, 128);
#pragma unroll
      for (int q = 0; q < TileM / 16; ++q)
        if (q == c) {  // registers have no index; the code of finish_tile is too long to repeat
#pragma unroll
          for (int i = 0; i < 8; ++i)
            to[(i / 4 * 8 + i % 2) * kPitch + i / 2 % 2 * 8] = acc(make_coord(i % 2, i / 2 % 2, 2 * q + i / 4), 0, 0);
        }
      sync_threads(2 + group, 128);
      const int row[1] = {token + 16 * c + warp / 2 * 8 + g};
      finish_tile<1, kGroup, Scaled>(p, row, channel + warp % 2 * 32, [&](int, int b) {
        return make_float2(static_cast<float>(from[8 * b]), static_cast<float>(from[8 * b + 1]));
      });
    }
  }
  sync_threads(2 + group, 128);  // before the next tile's results
}

// TileM tokens by 128 channels a tile. Parts: scales of 64 columns, 1 where S is a multiple of 64 and 2 where of 32.
template <class Element, int TileM, int Parts>
__global__ void __launch_bounds__(kThreads, 1)
    multiply(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap w_map,
             const __grid_constant__ Weights w, const __grid_constant__ Finish finish) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using L = Buffers<Element, TileM>;
  using Op = Operand<Element>;
  constexpr int kStages = L::kStages;
  static_assert(kStages >= 3 && kTileK % Op::kBox == 0, "TMA brings whole boxes");
  extern __shared__ char raw[];
  char* smem = raw + (-shared_address(raw) & 1023);
  char *x_tiles = smem, *w_tiles = smem + kStages * L::kXBytes, *out = w_tiles + kStages * L::kWBytes;
  unsigned full = shared_address(out + 2 * L::kOut), empty = full + 8 * kStages;

  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
      init_barrier(full + 8 * s, 1);
      init_barrier(empty + 8 * s, kMathWarps);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  launch_dependents();
  wait_for_previous_kernel();

  int stage = 0;
  unsigned parity = 0;
  auto advance = [&] {
    if (++stage == kStages) stage = 0, parity ^= 1;
  };

  // registers move from the first group to the others: 40 + 2 * 232 = 3 * 168, what a block of 384 threads starts with
  if (threadIdx.x < 128) {
    cutlass::arch::warpgroup_reg_dealloc<40>();
    if (threadIdx.x == 0)
      for (Walk<TileM> at(w); at.valid(); at.next()) {
        if (finish.residual) ask_ahead<TileM>(finish, at);
        wait(empty + 8 * stage, parity ^ 1);
        unsigned barrier = full + 8 * stage;
        arrive_expecting(barrier, L::kXBytes + L::kWBytes);
        load_box(shared_address(w_tiles + stage * L::kWBytes), &w_map, barrier, at.step * (kTileK / 8), at.column);
#pragma unroll
        for (int b = 0; b < kTileK / Op::kBox; ++b)
          load_box(shared_address(x_tiles + stage * L::kXBytes + b * TileM * 128), &x_map, barrier,
                   at.step * kTileK + b * Op::kBox, at.row);
        advance();
      }
  } else {
    cutlass::arch::warpgroup_reg_alloc<232>();
    using Atom = decltype(SM90::GMMA::rs_op_selector<Element, Element, typename Op::Accumulator,
                                                     Shape<_64, Int<TileM>, Int<kChunk>>>());
    using XTile = decltype(tile_to_shape(SM90::GMMA::Layout_K_SW128_Atom<Element>{},
                                         Shape<Int<TileM>, Int<kTileK>, Int<kStages>>{}));
    int thread = threadIdx.x % 128, group = threadIdx.x / 128 - 1, lane = thread % 32;
    auto mma = make_tiled_mma(Atom{});
    auto mine = mma.get_slice(thread);
    Tensor sx = make_tensor(make_smem_ptr(reinterpret_cast<Element*>(x_tiles)), XTile{});
    Tensor fx = mine.make_fragment_B(mine.partition_B(sx));
    Tensor acc = partition_fragment_C(mma, Shape<_64, Int<TileM>>{});  // ((2, 2, TileM / 8), 1, 1)
    constexpr int kSlices = decltype(size<2>(fx))::value / 2;          // of one wgmma in a chunk
    Tensor a0 = make_tensor<Element>(partition_shape_A(mma, Shape<_64, Int<kChunk>>{}));  // (.., 1, kSlices)
    Tensor a1 = make_fragment_like(a0);
    static_assert(decltype(size(a0))::value * sizeof(Element) == 4 * Op::kRegisters, "as fill makes them");

    const bool signals = lane == 0;
    int channel = group * 64 + thread / 32 * 16 + lane / 4;
    unsigned select = Op::selector(lane % 4);
    // a row is 64 bytes, its four 16-byte pieces exchanged by row: the 64-byte swizzle of TMA
    unsigned words = shared_address(w_tiles) + channel * 64 + (Op::kScaled ? lane % 4 / 2 * 4 : 0),
             turn = (channel / 2 & 3) << 4;

    auto unpack = [&](auto& a, int chunk, const Scales<Element, Parts>& scales) {
      typename Op::Factor factor[Parts][2];
#pragma unroll
      for (int p = 0; p < Parts; ++p)
#pragma unroll
        for (int h = 0; h < 2; ++h) factor[p][h] = Op::factor(scales.raw[chunk * Parts + p][h]);
      unsigned* to = reinterpret_cast<unsigned*>(raw_pointer_cast(a.data()));
      const unsigned from = words + stage * L::kWBytes;
      if constexpr (Op::kScaled) {  // of every 16 columns the (t / 2)th word, of which a lane takes half
        unsigned word[Op::kRegisters];
#pragma unroll
        for (int i = 0; i < Op::kRegisters; ++i)
          word[i] = load_word(from + i % 2 * 512 + ((chunk * 32 + i / 4 * 16) ^ turn) + i % 4 / 2 * 8);
#pragma unroll
        for (int i = 0; i < Op::kRegisters; ++i)
          to[i] = Op::four(word[i], select, factor[i * Parts / Op::kRegisters][i % 2]);
      } else {
        unsigned word[2][8];
#pragma unroll
        for (int h = 0; h < 2; ++h)
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            uint4 v = load_shared(from + h * 512 + ((chunk * 32 + i * 16) ^ turn));
            word[h][4 * i] = v.x, word[h][4 * i + 1] = v.y, word[h][4 * i + 2] = v.z, word[h][4 * i + 3] = v.w;
          }
        Op::template fill<Parts>(to, word, factor, select);
      }
    };
    // The groups take turns, so that one unpacks while the tensor cores work for the other.
    auto product = [&](auto& a, int chunk) {
      sync_threads(4 + group, 256);
      warpgroup_arrive();
#pragma unroll
      for (int k = 0; k < kSlices; ++k) {
        gemm(mma, a(_, _, k), fx(_, _, chunk * kSlices + k, stage), acc);
        mma.accumulate_ = SM90::GMMA::ScaleOut::One;
      }
      warpgroup_commit_batch();
      signal_threads(5 - group, 256);
    };

    if (group == 1) signal_threads(4, 256);  // the first turn is the other's
    Walk<TileM> ahead(w);
    Scales<Element, Parts> next;
    next.load(w, ahead, channel);
    for (Walk<TileM> at(w); at.valid(); at.next_tile()) {
      mma.accumulate_ = SM90::GMMA::ScaleOut::Zero;
      int previous = stage;
      for (int step = 0; step < at.steps; ++step) {
        Scales<Element, Parts> now = next;
        ahead.next();
        next.load(w, ahead, channel);
        wait(full + 8 * stage, parity);
        unpack(a0, 0, now);
        product(a0, 0);
        warpgroup_wait<1>();
        if (step && signals) arrive(empty + 8 * previous);
        unpack(a1, 1, now);
        product(a1, 1);
        warpgroup_wait<1>();
        previous = stage;
        advance();
      }
      warpgroup_wait<0>();
      if (signals) arrive(empty + 8 * previous);
      finish_tokens<TileM, Op::kScaled>(finish, acc, out + group * L::kOut, group, at.row, at.column + group * 64);
    }
    if (group == 0) sync_threads(4, 256);  // the turn that the other's last one gave
  }
#endif
}

template <class Element, int TileM, int Parts>
int launch(const QuambaLinear& a, int sms, cudaStream_t stream) {
  using Op = Operand<Element>;
  static const Encode encode = encoder();
  if (!encode) return cudaErrorNotSupported;
  CUtensorMap x_map, w_map;
  if (!describe(encode, &x_map, Op::kType, a.x, a.K, a.M, a.K * static_cast<long long>(sizeof(Element)), Op::kBox,
                TileM, CU_TENSOR_MAP_SWIZZLE_128B) ||
      !describe(encode, &w_map, CU_TENSOR_MAP_DATA_TYPE_INT32, a.w, a.K / 8, a.O, a.K / 2, kTileK / 8, kTileO,
                CU_TENSOR_MAP_SWIZZLE_64B))
    return cudaErrorInvalidValue;
  Weights w{Op::kScaled ? a.w_multiplier : a.w_scale, a.M, a.O, a.K, a.K / a.S,
            static_cast<unsigned>(((1ull << 32) + a.S - 1) / a.S), Op::kNatural};
  auto kernel = multiply<Element, TileM, Parts>;
  constexpr int kBytes = Buffers<Element, TileM>::kBytes;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  long long tiles = static_cast<long long>((a.M + TileM - 1) / TileM) * ((a.O + kTileO - 1) / kTileO);
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(tiles < sms ? tiles : sms));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kBytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  error = cudaLaunchKernelEx(&config, kernel, x_map, w_map, w,
                             make_finish(a, Op::kScaled ? static_cast<const float*>(a.w_scale) : nullptr));
  return error != cudaSuccess ? error : cudaGetLastError();
}

// The tile that is done first: waves times what a tile takes, which has a part that does not shrink with its tokens.
inline int choose_tile(const QuambaLinear& a, int sms) {
  constexpr int kTokens[5] = {256, 192, 160, 128, 64};
  int best = 0;
  double least = 1e30;
  for (int i = 0; i < 5; ++i) {
    long long tiles = static_cast<long long>((a.M + kTokens[i] - 1) / kTokens[i]) * ((a.O + kTileO - 1) / kTileO);
    double cost = static_cast<double>((tiles + sms - 1) / sms) * (kTokens[i] + 120);
    if (cost < least) least = cost, best = i;
  }
  return tuned("QUAMBA_TILE", best);
}

template <class Element>
int run(const QuambaLinear& a, cudaStream_t stream) {
  if (a.K <= 0 || a.K % 32 || a.S <= 0 || a.S % 32 || a.K % a.S ||
      static_cast<long long>(a.K) * a.S >> 32 || !quamba::can_finish(a))
    return QUAMBA_UNSUPPORTED;
  int device = 0, sms = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  if (a.S % kChunk) return launch<Element, 128, 2>(a, sms, stream);
  switch (choose_tile(a, sms)) {
    case 0: return launch<Element, 256, 1>(a, sms, stream);
    case 1: return launch<Element, 192, 1>(a, sms, stream);
    case 2: return launch<Element, 160, 1>(a, sms, stream);
    case 3: return launch<Element, 128, 1>(a, sms, stream);
    default: return launch<Element, 64, 1>(a, sms, stream);
  }
}

}  // namespace quamba::w4
