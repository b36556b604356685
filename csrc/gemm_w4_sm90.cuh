// y = x w^T for many rows on Hopper with packed int4 weights: x fp16 or bf16 and w = q4 * scale, or x int8 and
// w = q4 * multiplier. q4 is int32 [O, K/8], scales (fp16) and multipliers (int8) are [O, K/S], all as they are stored.
//
// What is computed is y^T: weights are the operand that wgmma takes from registers, so unpacked ones never meet shared
// memory. One warp has TMA bring tiles of x and of packed words; each of two multiplying warp groups makes the operand
// of the next 64 columns from the words of its 64 channels while the tensor cores work on the previous ones.
//
// A lane's piece of the operand is natural in K. Lane 4 g + t of a warp holds channels g and g + 8, and of every eight
// columns 2 t and 2 t + 1 (16 bit), which is byte t of a word; of every sixteen 4 t to 4 t + 3 (int8), which is half t
// of two words. So four lanes read the same words, and a byte permutation that depends on t picks from them.
#pragma once

#include <cuda.h>

#include <cstdlib>

#include "cute/tensor.hpp"
#include "cutlass/arch/reg_reconfig.h"
#include "cutlass/numeric_types.h"

#include "finish.cuh"

namespace quamba::w4 {

using namespace cute;

constexpr int kTileO = 128, kTileK = 128, kChunk = 64, kThreads = 384, kMathWarps = 8;
constexpr int kPitch = 68;  // floats between tokens in the epilogue's buffer: stores of a warp meet all banks

struct Weights {
  const void* scale;  // fp16 or, for int8 x, int8 multipliers
  int M, O, K, groups;
  unsigned inverse;  // 2^32 / S rounded up: k / S is the upper half of k * inverse, for K S below 2^32
  int lag;           // steps that the second group starts behind the first
};

__device__ __forceinline__ unsigned shared_address(const void* p) {
  return static_cast<unsigned>(__cvta_generic_to_shared(p));
}

__device__ __forceinline__ void init_barrier(unsigned barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void arrive(unsigned barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void arrive_expecting(unsigned barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void wait(unsigned barrier, unsigned parity) {
  unsigned done = 0;
#ifdef QUAMBA_TUNE
  for (long long polls = 0; !done; ++polls) {
    if (polls > 1 << 24) __trap();  // a lost arrival would hang the device
#else
  while (!done) {
#endif
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.b32 %0, 1, 0, p;\n}\n"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  }
}

__device__ __forceinline__ void load_box(unsigned to, const CUtensorMap* map, unsigned barrier, int x, int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];"
      ::"r"(to), "l"(map), "r"(barrier), "r"(x), "r"(y)
      : "memory");
}

// Barriers of part of a block: 1 orders the groups at the start, 2 and 3 are each group's own.
__device__ __forceinline__ void sync_threads(int id, int count) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(count) : "memory");
}

__device__ __forceinline__ uint4 load_shared(unsigned from) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(from));
  return v;
}

// How each type of x has its weights made. Raw: a scale as stored. Factor: it, ready for use. kBox: columns of x that
// are 128 bytes. fill<Parts>: the registers of 64 columns from eight words of each of two channels, Parts scales each.
template <class Element>
struct Operand;

template <class Derived, class Stored>
struct HalfOperand {
  using Raw = Stored;
  using Accumulator = float;
  static constexpr int kBox = 64, kRegisters = 16;
  static constexpr bool kScaled = false;

  __device__ static unsigned selector(int t) { return 0x4040 + 0x0101 * t; }

  template <int Parts, class Factor>
  __device__ __forceinline__ static void fill(unsigned* a, const unsigned (&word)[2][8],
                                              const Factor (&factor)[Parts][2], unsigned select) {
#pragma unroll
    for (int i = 0; i < 16; ++i)  // of every 16 columns: channel g, g + 8, then the same eight columns on
      a[i] = Derived::pair(word[i % 2][i / 4 * 2 + i % 4 / 2], select, factor[i * Parts / 16][i % 2]);
  }
};

template <>
struct Operand<half_t> : HalfOperand<Operand<half_t>, unsigned short> {
  using Factor = __half2;
  static constexpr CUtensorMapDataType kType = CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  __device__ __forceinline__ static Factor factor(Raw raw) { return __half2half2(__ushort_as_half(raw)); }
  // 1024 + n in the low half, 1024 + 16 n in the high, made n - 8 exactly by one fma, then one rounding
  __device__ __forceinline__ static unsigned pair(unsigned word, unsigned select, Factor scale) {
    const unsigned kFactor = 0x2c003c00u, kOffset = 0xd480e408u;  // (1/16, 1), (-72, -1032)
    unsigned biased = __byte_perm(word, 0x64646464u, select) & 0xfff0ff0fu;
    __half2 code = __hfma2(reinterpret_cast<__half2&>(biased), reinterpret_cast<const __half2&>(kFactor),
                           reinterpret_cast<const __half2&>(kOffset));
    code = __hmul2(code, scale);
    return reinterpret_cast<unsigned&>(code);
  }
};

template <>
struct Operand<bfloat16_t> : HalfOperand<Operand<bfloat16_t>, unsigned short> {
  // An fp16 scale is the sum of two bf16, and the product with the small one is exact, so the fma rounds only once.
  struct Factor {
    __nv_bfloat162 high, low;
  };
  static constexpr CUtensorMapDataType kType = CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  __device__ __forceinline__ static Factor factor(Raw raw) {
    float scale = __half2float(__ushort_as_half(raw));
    __nv_bfloat16 high = __float2bfloat16_rn(scale);
    return {__bfloat162bfloat162(high), __float2bfloat162_rn(scale - __bfloat162float(high))};
  }
  __device__ static unsigned selector(int t) { return 0x0400 + 0x0101 * t; }  // byte t of a word and of it >> 4
  __device__ __forceinline__ static unsigned pair(unsigned word, unsigned select, Factor scale) {
    const unsigned kOffset = 0xc308c308u, kOne = 0x3f803f80u;  // -136, 1
    unsigned biased = (__byte_perm(word, word >> 4, select) & 0x000f000fu) | 0x43004300u;  // 128 + n
    __nv_bfloat162 code = __hfma2(reinterpret_cast<__nv_bfloat162&>(biased),
                                  reinterpret_cast<const __nv_bfloat162&>(kOne),
                                  reinterpret_cast<const __nv_bfloat162&>(kOffset));
    code = __hfma2(code, scale.high, __hmul2(code, scale.low));
    return reinterpret_cast<unsigned&>(code);
  }
};

template <>
struct Operand<int8_t> {
  using Raw = unsigned char;
  using Accumulator = int;
  struct Factor {
    unsigned multiplier, offset;
  };
  static constexpr int kBox = 128, kRegisters = 8;
  static constexpr bool kScaled = true;
  static constexpr CUtensorMapDataType kType = CU_TENSOR_MAP_DATA_TYPE_UINT8;
  // n m + 128 - 8 m stays within a byte for codes in [-7, 7] and m <= 17, so four products are one multiplication
  __device__ __forceinline__ static Factor factor(Raw m) { return {m, 0x80808080u - m * 0x08080808u}; }
  __device__ static unsigned selector(int t) { return 0x1100u + 0x2222u * t; }  // half t of two words, bytes doubled

  template <int Parts>
  __device__ __forceinline__ static void fill(unsigned* a, const unsigned (&word)[2][8],
                                              const Factor (&factor)[Parts][2], unsigned select) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {  // of every 32 columns: channel g, g + 8, then the same 16 columns on
      const unsigned(&w)[8] = word[i % 2];
      const Factor& f = factor[i * Parts / 8][i % 2];
      int first = i / 4 * 4 + i % 4 / 2 * 2;
      unsigned bytes = __byte_perm(w[first], w[first + 1], select);
      unsigned codes = (bytes & 0x000f000fu) | (bytes >> 4 & 0x0f000f00u);
      a[i] = (codes * f.multiplier + f.offset) ^ 0x80808080u;
    }
  }
};

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

// The scales of one step for channels g and g + 8; beyond the ends those of the last ones, whose products are 0 or
// are not stored.
template <class Element, int Parts>
struct Scales {
  static constexpr int kColumns = kChunk / Parts;
  typename Operand<Element>::Raw raw[2 * Parts][2];

  template <class W>
  __device__ __forceinline__ void load(const Weights& w, const W& at, int channel) {
    auto* scale = static_cast<const typename Operand<Element>::Raw*>(w.scale);
    int first = min(at.column + channel, w.O - 1) * w.groups, second = min(at.column + channel + 8, w.O - 1) * w.groups;
#pragma unroll
    for (int p = 0; p < 2 * Parts; ++p) {
      int group = min(static_cast<int>(__umulhi(at.step * kTileK + p * kColumns, w.inverse)), w.groups - 1);
      raw[p][0] = __ldg(scale + first + group);
      raw[p][1] = __ldg(scale + second + group);
    }
  }
};

// A group's 64 channels by TileM tokens, from registers over its buffer to y. 16-bit results without a residual are
// finished where they are and cross over in pairs of tokens; all others cross over as accumulated, 16 tokens at a time.
template <int TileM, bool Scaled, class Acc>
__device__ __forceinline__ void finish_tokens(const Finish& p, Acc& acc, char* buffer, int group, int token,
                                              int channel) {
  int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4;
  bool half = p.y_dtype == QUAMBA_F16;
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
            x_scale.x = __ldg(p.x_scale + min(m, p.M - 1) * p.x_step);
            x_scale.y = __ldg(p.x_scale + min(m + 1, p.M - 1) * p.x_step);
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

    bool signals = lane == 0, first_tile = true;
    int channel = group * 64 + thread / 32 * 16 + lane / 4;
    unsigned select = Op::selector(lane % 4);
    // a row is 64 bytes, its four 16-byte pieces exchanged by row: the 64-byte swizzle of TMA
    unsigned words = shared_address(w_tiles) + channel * 64, turn = (channel / 2 & 3) << 4;

    auto unpack = [&](auto& a, int chunk, const Scales<Element, Parts>& scales) {
      unsigned word[2][8];
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          uint4 v = load_shared(words + stage * L::kWBytes + h * 512 + ((chunk * 32 + i * 16) ^ turn));
          word[h][4 * i] = v.x, word[h][4 * i + 1] = v.y, word[h][4 * i + 2] = v.z, word[h][4 * i + 3] = v.w;
        }
      typename Op::Factor factor[Parts][2];
#pragma unroll
      for (int p = 0; p < Parts; ++p)
#pragma unroll
        for (int h = 0; h < 2; ++h) factor[p][h] = Op::factor(scales.raw[chunk * Parts + p][h]);
      Op::template fill<Parts>(reinterpret_cast<unsigned*>(raw_pointer_cast(a.data())), word, factor, select);
    };
    auto product = [&](auto& a, int chunk) {
      warpgroup_arrive();
#pragma unroll
      for (int k = 0; k < kSlices; ++k) {
        gemm(mma, a(_, _, k), fx(_, _, chunk * kSlices + k, stage), acc);
        mma.accumulate_ = SM90::GMMA::ScaleOut::One;
      }
      warpgroup_commit_batch();
    };

    Walk<TileM> ahead(w);
    Scales<Element, Parts> next;
    next.load(w, ahead, channel);
    for (Walk<TileM> at(w); at.valid(); at.next_tile()) {
      if (first_tile && group == 1 && w.lag) sync_threads(1, 256);
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
        if (first_tile && group == 0 && step + 1 == w.lag) asm volatile("bar.arrive 1, 256;" ::: "memory");
        previous = stage;
        advance();
      }
      warpgroup_wait<0>();
      if (signals) arrive(empty + 8 * previous);
      first_tile = false;
      finish_tokens<TileM, Op::kScaled>(finish, acc, out + group * L::kOut, group, at.row, at.column + group * 64);
    }
  }
#endif
}

using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                            const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                            CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// The driver's function, without linking to libcuda.
inline Encode encoder() {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result;
  if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result) !=
          cudaSuccess ||
      result != cudaDriverEntryPointSuccess)
    return nullptr;
  return reinterpret_cast<Encode>(found);
}

// A row-major matrix read in boxes; what lies outside of it reads as 0.
inline bool describe(Encode encode, CUtensorMap* map, CUtensorMapDataType type, const void* data, int columns, int rows,
                     long long pitch, int box_columns, int box_rows, CUtensorMapSwizzle swizzle) {
  cuuint64_t size[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  cuuint64_t stride[1] = {static_cast<cuuint64_t>(pitch)};
  cuuint32_t box[2] = {static_cast<cuuint32_t>(box_columns), static_cast<cuuint32_t>(box_rows)}, unit[2] = {1, 1};
  return encode(map, type, 2, const_cast<void*>(data), size, stride, box, unit, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
                CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

inline int tuned(const char* name, int otherwise) {
#ifdef QUAMBA_TUNE
  if (const char* forced = std::getenv(name)) return std::atoi(forced);
#endif
  return otherwise;
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
  int steps = (a.K + kTileK - 1) / kTileK, lag = tuned("QUAMBA_LAG", 1);
  Weights w{Op::kScaled ? a.w_multiplier : a.w_scale, a.M, a.O, a.K, a.K / a.S,
            static_cast<unsigned>(((1ull << 32) + a.S - 1) / a.S), lag < steps ? lag : steps};
  auto kernel = multiply<Element, TileM, Parts>;
  constexpr int kBytes = Buffers<Element, TileM>::kBytes;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  long long tiles = static_cast<long long>((a.M + TileM - 1) / TileM) * ((a.O + kTileO - 1) / kTileO);
  kernel<<<static_cast<unsigned>(tiles < sms ? tiles : sms), kThreads, kBytes, stream>>>(
      x_map, w_map, w, make_finish(a, Op::kScaled ? static_cast<const float*>(a.w_scale) : nullptr));
  return cudaGetLastError();
}

// The tile that is done first: waves times what a tile takes, which has a part that does not shrink with its tokens.
inline int choose_tile(const QuambaLinear& a, int sms) {
  constexpr int kTokens[4] = {256, 192, 128, 64};
  int best = 0;
  double least = 1e30;
  for (int i = 0; i < 4; ++i) {
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
    case 2: return launch<Element, 128, 1>(a, sms, stream);
    default: return launch<Element, 64, 1>(a, sms, stream);
  }
}

}  // namespace quamba::w4
