// y = x w^T + bias + residual for many rows on Hopper, w = q4 * scale in groups: x fp16 or bf16 [M, K], q4 packed
// int32 [O, K/8] and scale fp16 [O, K/S] as they are stored.
//
// A block of three warp groups walks over tiles of y. The first one reads packed weights into registers a step ahead,
// writes them into shared memory as fp16 (bf16) where wgmma expects them, each rounded once from q4 * scale, and has
// TMA bring x beside them; the other two multiply. Packed weights stay in the layout of the checkpoint: feeding them to
// wgmma from registers would need each thread's nibbles side by side, a repacked copy. Unpacking costs the first group
// 4 (fp16) or 7 (bf16) instructions per two weights, which is less than the time the tensor cores take for the tile.
#include <cuda.h>

#include <cstdlib>

#include "cute/tensor.hpp"
#include "cutlass/arch/reg_reconfig.h"
#include "cutlass/numeric_types.h"

#include "finish.cuh"

namespace quamba::w4a16 {

using namespace cute;

constexpr int kTileO = 128, kTileK = 64, kThreads = 384, kMathWarps = 8;
constexpr unsigned kZeros = 0x88888888u;  // eight codes of 0

struct Weights {
  const unsigned* packed;
  const __half* scale;
  int M, O, K, S;

  __device__ __forceinline__ float scale_of(int o, int k) const {
    return __half2float(__ldg(scale + static_cast<long long>(o) * (K / S) + k / S));
  }
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

__device__ __forceinline__ void load_tile(unsigned to, const CUtensorMap* map, unsigned barrier, int k, int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];"
      ::"r"(to), "l"(map), "r"(barrier), "r"(k), "r"(row)
      : "memory");
}

// Eight codes of a word times their scale, as four pairs of fp16: 1024 + n in the low half, 1024 + 16 n in the high,
// made n - 8 exactly by one fma, then one rounding.
__device__ __forceinline__ uint4 unpack(unsigned word, float scale, half_t) {
  const unsigned kFactor = 0x2c003c00u, kOffset = 0xd480e408u;  // (1/16, 1), (-72, -1032)
  __half2 s = __float2half2_rn(scale);
  unsigned out[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    unsigned biased = __byte_perm(word, 0x64646464u, 0x4040 + 0x0101 * j) & 0xfff0ff0fu;
    __half2 code = __hfma2(reinterpret_cast<__half2&>(biased), reinterpret_cast<const __half2&>(kFactor),
                           reinterpret_cast<const __half2&>(kOffset));
    code = __hmul2(code, s);
    out[j] = reinterpret_cast<unsigned&>(code);
  }
  return make_uint4(out[0], out[1], out[2], out[3]);
}

// The same for bf16, whose mantissa is too short for the trick: (16 + n) * scale - 24 * scale is exact in fp32.
__device__ __forceinline__ uint4 unpack(unsigned word, float scale, bfloat16_t) {
  float offset = -24.f * scale;
  unsigned out[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    float value[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      int up = 19 - 4 * (2 * j + i);  // to the top of the mantissa of 16.0
      unsigned bits = ((up > 0 ? word << up : word >> -up) & 0x00780000u) | 0x41800000u;
      value[i] = __fmaf_rn(__uint_as_float(bits), scale, offset);
    }
    out[j] = pack_pair(value[0], value[1], false);
  }
  return make_uint4(out[0], out[1], out[2], out[3]);
}

// Where a block is: its tile and the step along K. Tiles go down kRows rows of tiles, then to the next column, so that
// what runs together shares x and w in L2.
template <int TileM>
struct Walk {
  static constexpr int kRows = 4096 / TileM;
  int tile, step, row, column;
  int steps, tiles_m, tiles_o;

  __device__ Walk(const Weights& w)
      : tile(blockIdx.x), step(0), steps((w.K + kTileK - 1) / kTileK), tiles_m((w.M + TileM - 1) / TileM),
        tiles_o((w.O + kTileO - 1) / kTileO) {
    place();
  }
  __device__ bool valid() const { return tile < tiles_m * tiles_o; }
  __device__ void place() {
    int band = tile / (kRows * tiles_o), inside = tile - band * kRows * tiles_o;
    int high = min(kRows, tiles_m - band * kRows);
    high = max(high, 1);
    row = (band * kRows + inside % high) * TileM, column = inside / high * kTileO;
  }
  __device__ void next_tile() {
    tile += gridDim.x, step = 0;
    place();
  }
  __device__ void next() {
    if (++step == steps) next_tile();
  }
};

// What one thread of the first group unpacks in a step: half of the columns (32 codes) of rows r and r + 64.
template <bool Wide>
struct Packed {
  uint4 words[2];
  float scale[2];

  template <class W>
  __device__ __forceinline__ void load(const Weights& w, const W& at) {
    int k = at.step * kTileK + (threadIdx.x & 1) * 32;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      int o = at.column + h * 64 + threadIdx.x / 2;
      bool inside = at.valid() && o < w.O && k < w.K;
      words[h] = make_uint4(kZeros, kZeros, kZeros, kZeros);
      scale[h] = 0.f;
      if (inside) {
        words[h] = __ldg(reinterpret_cast<const uint4*>(w.packed + static_cast<long long>(o) * (w.K / 8) + k / 8));
        if (Wide) scale[h] = w.scale_of(o, k);
      }
    }
  }

  template <class W, class Element>
  __device__ __forceinline__ void store(const Weights& w, const W& at, char* tile, Element kind) const {
    int half = threadIdx.x & 1;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      int r = h * 64 + threadIdx.x / 2;
      const unsigned word[4] = {words[h].x, words[h].y, words[h].z, words[h].w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float s = scale[h];
        if (!Wide) {
          int o = at.column + r, k = at.step * kTileK + half * 32 + 8 * i;
          if (o < w.O && k < w.K) s = w.scale_of(o, k);
        }
        // rows of 128 bytes, their eight 16-byte pieces exchanged by row: the 128-byte swizzle of TMA and wgmma
        *reinterpret_cast<uint4*>(tile + r * 128 + (((half * 4 + i) ^ (r & 7)) << 4)) = unpack(word[i], s, kind);
      }
    }
  }
};

template <class Element>
struct Multiply;
template <>
struct Multiply<half_t> {
  using Atom = SM90::GMMA::MMA_64x128x16_F32F16F16_SS<SM90::GMMA::Major::K, SM90::GMMA::Major::K>;
};
template <>
struct Multiply<bfloat16_t> {
  using Atom = SM90::GMMA::MMA_64x128x16_F32BF16BF16_SS<SM90::GMMA::Major::K, SM90::GMMA::Major::K>;
};

template <int TileM>
struct Buffers {
  static constexpr int kStages = TileM == 256 ? 4 : 6;
  static constexpr int kXBytes = TileM * kTileK * 2, kWBytes = kTileO * kTileK * 2;
  static constexpr int kBytes = kStages * (kXBytes + kWBytes) + 2 * kStages * 8 + 1024;
};

// TileM 128 or 256: each of the two multiplying groups holds 64 or 2 x 64 rows of the tile. Wide: S a multiple of 64.
template <class Element, int TileM, bool Wide>
__global__ void __launch_bounds__(kThreads, 1)
    multiply(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ Weights w,
             const __grid_constant__ Finish finish) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using L = Buffers<TileM>;
  constexpr int kStages = L::kStages, kHigh = TileM / 128;
  extern __shared__ char raw[];
  char* smem = raw + (-shared_address(raw) & 1023);
  char *x_tiles = smem, *w_tiles = smem + kStages * L::kXBytes;
  unsigned full = shared_address(w_tiles + kStages * L::kWBytes), empty = full + 8 * kStages;

  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
      init_barrier(full + 8 * s, 128 + 1);  // the unpacking threads and x
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

  // registers move from the first group to the others: 56 + 2 * 224 = 3 * 168, what a block of 384 threads starts with
  if (threadIdx.x < 128) {
    cutlass::arch::warpgroup_reg_dealloc<56>();
    Walk<TileM> at(w), ahead(w);
    Packed<Wide> now, next;
    now.load(w, at);
    for (; at.valid(); at.next()) {
      ahead.next();
      next.load(w, ahead);
      wait(empty + 8 * stage, parity ^ 1);
      if (threadIdx.x == 0) {
        arrive_expecting(full + 8 * stage, L::kXBytes);
        load_tile(shared_address(x_tiles + stage * L::kXBytes), &x_map, full + 8 * stage, at.step * kTileK, at.row);
      }
      now.store(w, at, w_tiles + stage * L::kWBytes, Element{});
      asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
      arrive(full + 8 * stage);
      now = next;
      advance();
    }
  } else {
    cutlass::arch::warpgroup_reg_alloc<224>();
    using Tile = decltype(tile_to_shape(SM90::GMMA::Layout_K_SW128_Atom<Element>{},
                                        Shape<Int<TileM>, Int<kTileK>, Int<kStages>>{}));
    using WTile = decltype(tile_to_shape(SM90::GMMA::Layout_K_SW128_Atom<Element>{},
                                         Shape<Int<kTileO>, Int<kTileK>, Int<kStages>>{}));
    int thread = threadIdx.x - 128;
    auto mma = make_tiled_mma(typename Multiply<Element>::Atom{}, Layout<Shape<_2, _1, _1>>{});
    auto mine = mma.get_slice(thread);
    Tensor sx = make_tensor(make_smem_ptr(reinterpret_cast<Element*>(x_tiles)), Tile{});
    Tensor sw = make_tensor(make_smem_ptr(reinterpret_cast<Element*>(w_tiles)), WTile{});
    Tensor fx = mine.make_fragment_A(mine.partition_A(sx));
    Tensor fw = mine.make_fragment_B(mine.partition_B(sw));
    Tensor acc = partition_fragment_C(mma, Shape<Int<TileM>, Int<kTileO>>{});  // ((2, 2, 16), kHigh, 1)
    bool signals = threadIdx.x % 32 == 0;

    for (Walk<TileM> at(w); at.valid(); at.next_tile()) {
      mma.accumulate_ = SM90::GMMA::ScaleOut::Zero;
      int previous = stage;
      warpgroup_fence_operand(acc);
      for (int step = 0; step < at.steps; ++step) {
        wait(full + 8 * stage, parity);
        warpgroup_arrive();
#pragma unroll
        for (int k = 0; k < size<2>(fx); ++k) {
          gemm(mma, fx(_, _, k, stage), fw(_, _, k, stage), acc);
          mma.accumulate_ = SM90::GMMA::ScaleOut::One;
        }
        warpgroup_commit_batch();
        if (step > 0) {
          warpgroup_wait<1>();
          if (signals) arrive(empty + 8 * previous);
        }
        previous = stage;
        advance();
      }
      warpgroup_wait<0>();
      warpgroup_fence_operand(acc);
      if (signals) arrive(empty + 8 * previous);

      int row[2 * kHigh], top = at.row + thread / 128 * 64 + thread % 128 / 32 * 16 + thread % 32 / 4;
#pragma unroll
      for (int r = 0; r < 2 * kHigh; ++r) row[r] = top + r / 2 * 128 + r % 2 * 8;
      finish_tile<2 * kHigh, kTileO / 8, false>(finish, row, at.column, [&](int r, int b) {
        return make_float2(acc(make_coord(0, r % 2, b), r / 2, 0), acc(make_coord(1, r % 2, b), r / 2, 0));
      });
    }
  }
#endif
}

using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                            const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                            CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// The driver's function, without linking to libcuda.
Encode encoder() {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result;
  if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result) !=
          cudaSuccess ||
      result != cudaDriverEntryPointSuccess)
    return nullptr;
  return reinterpret_cast<Encode>(found);
}

template <class Element, int TileM, bool Wide>
int launch(const QuambaLinear& a, int sms, cudaStream_t stream) {
  static const Encode encode = encoder();
  if (!encode) return cudaErrorNotSupported;
  bool half = a.x_dtype == QUAMBA_F16;
  CUtensorMap x_map;
  cuuint64_t size[2] = {static_cast<cuuint64_t>(a.K), static_cast<cuuint64_t>(a.M)}, pitch[1] = {2ull * a.K};
  cuuint32_t box[2] = {kTileK, TileM}, unit[2] = {1, 1};
  if (encode(&x_map, half ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2,
             const_cast<void*>(a.x), size, pitch, box, unit, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) != CUDA_SUCCESS)
    return cudaErrorInvalidValue;
  Weights w{static_cast<const unsigned*>(a.w), static_cast<const __half*>(a.w_scale), a.M, a.O, a.K, a.S};
  auto kernel = multiply<Element, TileM, Wide>;
  constexpr int kBytes = Buffers<TileM>::kBytes;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  long long tiles = static_cast<long long>((a.M + TileM - 1) / TileM) * ((a.O + kTileO - 1) / kTileO);
  kernel<<<static_cast<unsigned>(tiles < sms ? tiles : sms), kThreads, kBytes, stream>>>(x_map, w,
                                                                                         make_finish(a, nullptr));
  return cudaGetLastError();
}

// Tall tiles unpack a weight half as often; short ones fill the last wave better.
bool tall(const QuambaLinear& a, int sms) {
#ifdef QUAMBA_TUNE
  if (const char* forced = std::getenv("QUAMBA_TILE")) return std::atoi(forced) != 0;
#endif
  auto waves = [&](int rows) {
    long long tiles = static_cast<long long>((a.M + rows - 1) / rows) * ((a.O + kTileO - 1) / kTileO);
    return static_cast<double>((tiles + sms - 1) / sms) * rows;
  };
  return waves(256) < 1.08 * waves(128);
}

template <class Element>
int choose(const QuambaLinear& a, int sms, cudaStream_t stream) {
  if (a.S % kTileK) return launch<Element, 128, false>(a, sms, stream);
  return tall(a, sms) ? launch<Element, 256, true>(a, sms, stream) : launch<Element, 128, true>(a, sms, stream);
}

}  // namespace quamba::w4a16

extern "C" int quamba_linear_w4a16_gemm(const QuambaLinear* a, void* stream) {
  using namespace quamba::w4a16;
  bool half = a->x_dtype == QUAMBA_F16;
  if ((!half && a->x_dtype != QUAMBA_BF16) || a->K <= 0 || a->K % 32 || a->S <= 0 || a->S % 8 || a->K % a->S ||
      !quamba::can_finish(*a))
    return QUAMBA_UNSUPPORTED;
  int device = 0, sms = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  auto run = half ? choose<half_t> : choose<bfloat16_t>;
  return run(*a, sms, static_cast<cudaStream_t>(stream));
}
