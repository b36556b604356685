// wgmma of 160 columns, as atoms of make_tiled_mma. CUTLASS has them behind a switch, among so many other shapes that
// reading these takes longer than compiling a kernel.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cute/tensor.hpp"

namespace quamba {

// Element: half_t or bfloat16_t, summed in fp32, or int8_t, in int32. The left operand comes from registers or, Shared,
// from shared memory; both have K contiguous.
template <class Element, bool Shared>
struct Columns160 {
  using Sum = std::conditional_t<sizeof(Element) == 1, int, float>;
  using DRegisters = void;
  using ARegisters = std::conditional_t<Shared, uint64_t[1], uint32_t[4]>;
  using BRegisters = uint64_t[1];
  using CRegisters = Sum[80];
};

#define QUAMBA_SUMS8(as, i) \
  as(d[i]), as(d[i + 1]), as(d[i + 2]), as(d[i + 3]), as(d[i + 4]), as(d[i + 5]), as(d[i + 6]), as(d[i + 7])
#define QUAMBA_SUMS40(as, i)                                                                        \
  QUAMBA_SUMS8(as, i), QUAMBA_SUMS8(as, i + 8), QUAMBA_SUMS8(as, i + 16), QUAMBA_SUMS8(as, i + 24), \
      QUAMBA_SUMS8(as, i + 32)
#define QUAMBA_WGMMA_160(shape, as, operands, adds, end, ...)                                                    \
  asm volatile(                                                                                                  \
      "{\n.reg .pred p;\nsetp.ne.b32 p, " adds ", 0;\nwgmma.mma_async.sync.aligned.m64n160" shape                \
      " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27," \
      "%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53," \
      "%54,%55,%56,%57,%58,%59,%60,%61,%62,%63,%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79}," \
      operands ", p" end ";\n}\n"                                                                                \
      : QUAMBA_SUMS40(as, 0), QUAMBA_SUMS40(as, 40)                                                              \
      : __VA_ARGS__)
#define QUAMBA_FROM_REGISTERS(shape, as, end)                                                           \
  QUAMBA_WGMMA_160(shape, as, "{%80,%81,%82,%83}, %84", "%85", end, "r"(a[0]), "r"(a[1]), "r"(a[2]), \
                   "r"(a[3]), "l"(b), "r"(adds))

// d [64 x 160] = (adds: +=) a, 16 rows of each of four warps, times what the descriptor b says.
template <class Sum, class Element>
__device__ __forceinline__ void multiply_160(Sum* d, const uint32_t* a, uint64_t b, int adds, Element) {
  if constexpr (std::is_same_v<Element, int8_t>)
    QUAMBA_FROM_REGISTERS("k32.s32.s8.s8", "+r", "");
  else if constexpr (std::is_same_v<Element, cute::half_t>)
    QUAMBA_FROM_REGISTERS("k16.f32.f16.f16", "+f", ", 1, 1, 0");
  else
    QUAMBA_FROM_REGISTERS("k16.f32.bf16.bf16", "+f", ", 1, 1, 0");
}

// The same of what the descriptor a says.
__device__ __forceinline__ void multiply_160(int* d, const uint64_t* a, uint64_t b, int adds, int8_t) {
  QUAMBA_WGMMA_160("k32.s32.s8.s8", "+r", "%80, %81", "%82", "", "l"(*a), "l"(b), "r"(adds));
}

#undef QUAMBA_FROM_REGISTERS
#undef QUAMBA_WGMMA_160
#undef QUAMBA_SUMS40
#undef QUAMBA_SUMS8

// What cute::gemm calls.
template <class Element, bool Shared, class D, class DLayout, class A, class ALayout, class B, class BLayout, class C,
          class CLayout>
__device__ __forceinline__ void mma_unpack(const cute::MMA_Traits<Columns160<Element, Shared>>& traits,
                                           cute::Tensor<D, DLayout>& d, const cute::Tensor<A, ALayout>& a,
                                           const cute::Tensor<B, BLayout>& b, const cute::Tensor<C, CLayout>&) {
  using Registers = typename Columns160<Element, Shared>::ARegisters;
  cute::Tensor left = cute::recast<std::remove_extent_t<Registers>>(a);
  cute::Tensor right = cute::recast<uint64_t>(b);
  constexpr int kCount = std::extent_v<Registers>;
  static_assert(decltype(size(left))::value == kCount && decltype(size(d))::value == 80);
  Registers of_left;
#pragma unroll
  for (int i = 0; i < kCount; ++i) of_left[i] = left[i];
  multiply_160(cute::raw_pointer_cast(d.data()), of_left, right[0], static_cast<int>(traits.accumulate_), Element{});
}

}  // namespace quamba

template <class Element, bool Shared>
struct cute::MMA_Traits<quamba::Columns160<Element, Shared>> {
  using Op = quamba::Columns160<Element, Shared>;
  static constexpr int kColumns = 32 / sizeof(Element);
  using ValTypeD = typename Op::Sum;
  using ValTypeA = Element;
  using ValTypeB = Element;
  using ValTypeC = ValTypeD;
  using FrgTypeB = SM90::GMMA::smem_desc<SM90::GMMA::Major::K>;
  using FrgTypeA = std::conditional_t<Shared, FrgTypeB, ValTypeA>;
  using Shape_MNK = Shape<_64, Int<160>, Int<kColumns>>;
  using ThrID = Layout<_128>;
  using OfRegisters = std::conditional_t<kColumns == 32, SM90::GMMA::ALayout_64x32, SM90::GMMA::ALayout_64x16>;
  using ALayout = std::conditional_t<Shared, SM90::GMMA::ABLayout<64, kColumns>, OfRegisters>;
  using BLayout = SM90::GMMA::ABLayout<160, kColumns>;
  using CLayout = SM90::GMMA::CLayout_64xN<160>;

  SM90::GMMA::ScaleOut accumulate_ = SM90::GMMA::ScaleOut::One;
};
