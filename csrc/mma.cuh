// The PTX behind the kernels that multiply with mma.sync: one function an instruction, for sm_80 and later.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace quamba {

// d += A B. A 16 x 32 int8 (a0, a2: row lane/4; a1, a3: row lane/4 + 8), B 32 x 8 int8 (column lane/4), d int32:
// d[0..1] row lane/4, d[2..3] row lane/4 + 8, columns 2 (lane%4) and the next.
__device__ __forceinline__ void mma_s8(int (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                       uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// The same with A 16 x 16 and B 16 x 8 of fp16 or bf16, d fp32.
__device__ __forceinline__ void mma_f16(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                        uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void mma_bf16(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                         uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// The same with A 16 x 8 (a0, a1: rows lane/4 and lane/4 + 8 of column lane%4; a2, a3: of column lane%4 + 4) and B 8 x 8
// (rows lane%4 and lane%4 + 4 of column lane/4) of floats that have 11 significant bits.
__device__ __forceinline__ void mma_tf32(float (&d)[4], float a0, float a1, float a2, float a3, float b0, float b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(__float_as_uint(a0)), "r"(__float_as_uint(a1)), "r"(__float_as_uint(a2)), "r"(__float_as_uint(a3)),
        "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
}

// Four matrices of 8 x 8 halves in shared memory, lane i having the address of row i % 8 of matrix i / 8: of each, row
// lane/4, columns 2 (lane%4) and the next.
__device__ __forceinline__ void load_matrices(uint32_t (&v)[4], uint32_t at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
               : "r"(at)
               : "memory");
}

// Two halves in a word: a - b, a * b + c.
__device__ __forceinline__ uint32_t sub_f16x2(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}

__device__ __forceinline__ uint32_t fma_f16x2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

__device__ __forceinline__ uint32_t fma_bf16x2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

// Weights: read once, so they take no room in L1; L2 fetches the whole line, whose other half is read next. v stays as
// it is where `inside` is false.
__device__ __forceinline__ void load_weights(uint4& v, const void* p, bool inside) {
  asm volatile(
      "{.reg .pred inside; setp.ne.s32 inside, %5, 0;\n"
      "@inside ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];}"
      : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)
      : "l"(p), "r"(static_cast<int>(inside)));
}

// Constants of the model that are narrower than a word. Volatile, so that they stay before the dependency wait.
__device__ __forceinline__ void load_constant(uint32_t& v, const uint16_t* p, bool inside) {
  asm volatile("{.reg .pred inside; setp.ne.s32 inside, %2, 0;\n@inside ld.global.nc.u16 %0, [%1];}"
               : "+r"(v)
               : "l"(p), "r"(static_cast<int>(inside)));
}

__device__ __forceinline__ void load_constant(uint32_t& v, const uint8_t* p, bool inside) {
  asm volatile("{.reg .pred inside; setp.ne.s32 inside, %2, 0;\n@inside ld.global.nc.u8 %0, [%1];}"
               : "+r"(v)
               : "l"(p), "r"(static_cast<int>(inside)));
}

// 16 bytes of activations, through L2: L1 may hold what the buffer had before.
__device__ __forceinline__ uint4 load_through_l2(const void* p) { return __ldcg(static_cast<const uint4*>(p)); }

// Constants of the model, 4, 8 or 16 bytes. Not .nc: ptxas would move those behind the dependency wait.
__device__ __forceinline__ uint32_t constant_word(const void* p) {
  uint32_t v;
  asm volatile("ld.global.u32 %0, [%1];" : "=r"(v) : "l"(p));
  return v;
}

__device__ __forceinline__ uint2 constant_pair(const void* p) {
  uint2 v;
  asm volatile("ld.global.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
  return v;
}

__device__ __forceinline__ uint4 constant_quad(const void* p) {
  uint4 v;
  asm volatile("ld.global.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}

// The 32 bytes around p into L2, which a later write finds there: unlike a load, it may run ahead of one.
__device__ __forceinline__ void prefetch_l2(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// 16 bytes from global to shared memory, through L2 only; zeros when `inside` is false (p must be valid all the same).
__device__ __forceinline__ void copy_async(void* shared, const void* p, bool inside) {
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(p), "r"(inside ? 16 : 0) : "memory");
}

// The same for weights, which the thread that copies them reads back itself; nothing happens when `inside` is false.
__device__ __forceinline__ void copy_weights_async(void* shared, const void* p, bool inside) {
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile(
      "{.reg .pred inside; setp.ne.s32 inside, %2, 0;\n@inside cp.async.cg.shared.global.L2::128B [%0], [%1], 16;}" ::"r"(
          to),
      "l"(p), "r"(static_cast<int>(inside))
      : "memory");
}

__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most N of the thread's latest groups are on their way.
template <int N>
__device__ __forceinline__ void copy_async_wait_but() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

__device__ __forceinline__ void copy_async_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Programmatic dependent launch: let the next kernel start; wait until the previous one is complete and visible.
__device__ __forceinline__ void launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Every block of the cluster runs: arrive early, wait before the first store into another block.
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
#endif
}

__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}

// A barrier in shared memory that opens once one thread has said how many bytes other blocks will send, and they came.
__device__ __forceinline__ void mailbox_init(uint64_t* mailbox) {
#if __CUDA_ARCH__ >= 900
  const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(mailbox));
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;\nfence.mbarrier_init.release.cluster;" ::"r"(at) : "memory");
#endif
}

__device__ __forceinline__ void mailbox_expect(uint64_t* mailbox, int bytes) {
#if __CUDA_ARCH__ >= 900
  const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(mailbox));
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(bytes) : "memory");
#endif
}

__device__ __forceinline__ void mailbox_wait(uint64_t* mailbox, int parity) {
#if __CUDA_ARCH__ >= 900
  const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(mailbox));
  uint32_t open = 0;
  while (!open)
    asm volatile(
        "{.reg .pred open; mbarrier.try_wait.parity.shared::cta.b64 open, [%1], %2; selp.u32 %0, 1, 0, open;}"
        : "=r"(open)
        : "r"(at), "r"(parity)
        : "memory");
#endif
}

// Stores a word in the shared memory of block `rank` of the cluster, at the place of `shared` here, and counts it there.
__device__ __forceinline__ void send(uint32_t* shared, uint64_t* mailbox, int rank, uint32_t value) {
#if __CUDA_ARCH__ >= 900
  uint32_t to, box;
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(to)
      : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared))), "r"(rank));
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(box)
      : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(mailbox))), "r"(rank));
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];" ::"r"(to), "r"(value),
               "r"(box)
               : "memory");
#endif
}

}  // namespace quamba
