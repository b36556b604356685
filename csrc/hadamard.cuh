// The Hadamard rotation of a row in shared memory, by one block of threads, as hadamard.py defines it:
// y = x H with H = (base matrix) (x) (Sylvester matrix of order 2^bits) / sqrt(base 2^bits), in blocks along the row.
//
//   Rotation r;
//   if (!make_rotation(block, r)) return QUAMBA_UNSUPPORTED;                    // host
//   for (i in this thread's share) row[padded(i)] = x[i];                       // device, row: padded(channels) floats
//   __syncthreads();
//   rotate(row, channels, r);                                                   // ends with __syncthreads()
//   y[i] = row[padded(i)] * r.gain;
//
// The row is passed over once for up to five of the factors 2 and once for the base, each thread taking a few whole
// butterflies into registers: 5120 = 32 x 8 x 20 takes three passes, so 6 x 4 bytes of shared memory an element and
// 5 + 3 + 7 additions. A float of padding after every 32 keeps all passes free of bank conflicts. A thread that holds 32
// neighbours anyway may do the first pass itself: butterfly(v), then rotate(row, channels, r, 5).
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <utility>

namespace quamba {

struct Rotation {
  int base = 0, bits = 0;  // blocks of base << bits channels; base 0: no rotation
  float gain = 1.f;        // 1 / sqrt(block)
};

constexpr int kFirstBits = 5;
constexpr int kBases[] = {1, 12, 20, 28, 36};

// base and bits of a block size, the largest power of two first; false where no matrix is known here.
inline bool make_rotation(int block, Rotation& r) {
  r = Rotation{};
  if (block <= 1) return block >= 0;  // 0 and 1: nothing to do
  for (int bits = 30; bits >= 0; --bits) {
    if (block & ((1 << bits) - 1)) continue;
    for (int base : kBases)
      if (block >> bits == base) {
        r = {base, bits, static_cast<float>(1.0 / std::sqrt(static_cast<double>(block)))};
        return true;
      }
  }
  return false;
}

__host__ __device__ constexpr int padded(int i) { return i + (i >> 5); }

namespace hadamard {

constexpr bool is_square(int v, int q) {  // a nonzero quadratic residue modulo the prime q
  for (int i = 1; i < q; ++i)
    if (i * i % q == v) return true;
  return false;
}

// Whether entry [p][q] of Paley's matrix of order n is -1: the first construction for 12 and 20, the second for 28, 36.
constexpr bool negative(int n, int p, int q) {
  if (n == 12 || n == 20) {
    if (p == q || p == 0) return false;
    return q == 0 || !is_square((p - q + n - 1) % (n - 1), n - 1);
  }
  const int prime = n / 2 - 1, i = p / 2, j = q / 2;
  if (i == j) return p % 2 || q % 2;
  const bool minus = i && j && !is_square((i - j + prime) % prime, prime);
  return minus != (p % 2 && q % 2);
}

constexpr uint64_t column_signs(int n, int q) {
  uint64_t signs = 0;
  for (int p = 0; p < n; ++p) signs |= static_cast<uint64_t>(negative(n, p, q)) << p;
  return signs;
}

template <int BASE, int Q>
struct Column {
  static constexpr uint64_t kSigns = column_signs(BASE, Q);
};

template <int BASE, int G, int Q>
__device__ __forceinline__ void add_column(float (&y)[BASE], const float (&sums)[8]) {
  constexpr unsigned kSigns = Column<BASE, Q>::kSigns >> (4 * G) & 15;
  constexpr bool kMinus = kSigns & 1;
  constexpr unsigned kWhich = (kSigns >> 1) ^ (kMinus ? 7 : 0);
  if constexpr (G == 0)
    y[Q] = kMinus ? -sums[kWhich] : sums[kWhich];
  else
    y[Q] += kMinus ? -sums[kWhich] : sums[kWhich];
}

template <int BASE, int G, int... Q>
__device__ __forceinline__ void add_four(float (&y)[BASE], const float (&x)[BASE], std::integer_sequence<int, Q...>) {
  // x0 +- x1 +- x2 +- x3 in all eight ways; each column takes one of them, or its negative
  const float a = x[4 * G] + x[4 * G + 1], b = x[4 * G] - x[4 * G + 1];
  const float c = x[4 * G + 2] + x[4 * G + 3], d = x[4 * G + 2] - x[4 * G + 3];
  const float sums[8] = {a + c, b + c, a - d, b - d, a + d, b + d, a - c, b - c};
  (add_column<BASE, G, Q>(y, sums), ...);
}

template <int BASE, int... G>
__device__ __forceinline__ void multiply(float (&y)[BASE], const float (&x)[BASE], std::integer_sequence<int, G...>) {
  (add_four<BASE, G>(y, x, std::make_integer_sequence<int, BASE>{}), ...);
}

}  // namespace hadamard

// v <- v H for a base matrix of order 12, 20, 28 or 36, not normalised.
template <int BASE>
__device__ __forceinline__ void multiply_base(float (&v)[BASE]) {
  float y[BASE];
  hadamard::multiply<BASE>(y, v, std::make_integer_sequence<int, BASE / 4>{});
#pragma unroll
  for (int i = 0; i < BASE; ++i) v[i] = y[i];
}

// v <- v H for the Sylvester matrix of order SIZE, not normalised.
template <int SIZE>
__device__ __forceinline__ void butterfly(float (&v)[SIZE]) {
#pragma unroll
  for (int half = 1; half < SIZE; half *= 2)
#pragma unroll
    for (int i = 0; i < SIZE; ++i)
      if (!(i & half)) {
        const float a = v[i], b = v[i + half];
        v[i] = a + b;
        v[i + half] = a - b;
      }
}

// The threads that rotate a row: those of the block. Where element i of it lies.
struct WholeBlock {
  static __device__ __forceinline__ int threads() { return blockDim.x; }
  static __device__ __forceinline__ void sync() { __syncthreads(); }
  static __device__ __forceinline__ int place(int i) { return padded(i); }
};

namespace hadamard {

// All butterflies over SIZE elements at a distance of 1 << shift; SHIFT, where that is known when the kernel is compiled. FAR:
// known to be 32 or more.
template <int SIZE, bool BASE, class Team, int SHIFT = -1, bool FAR = false>
__device__ __forceinline__ void pass(float* row, int channels, int shift) {
  if constexpr (SHIFT >= 0) shift = SHIFT;
  constexpr bool kEven = !BASE || FAR;
  const int items = channels / SIZE;
  for (int item = threadIdx.x; item < items; item += Team::threads()) {
    int first = (((item >> shift) * SIZE) << shift) + (item & ((1 << shift) - 1));
    // powers of two are taken within a stretch of 32 or across whole stretches, so their places are equally far apart
    float* const at = row + Team::place(first);
    const int step = Team::place(1 << shift);
    float v[SIZE];
#pragma unroll
    for (int i = 0; i < SIZE; ++i) v[i] = kEven ? at[i * step] : row[Team::place(first + (i << shift))];
    if constexpr (BASE) {
      multiply_base<SIZE>(v);
      if (!FAR) asm volatile("" : "+r"(first));  // so that places are computed again instead of kept in SIZE registers
    } else {
      butterfly<SIZE>(v);
    }
#pragma unroll
    for (int i = 0; i < SIZE; ++i) (kEven ? at[i * step] : row[Team::place(first + (i << shift))]) = v[i];
  }
  Team::sync();
}

}  // namespace hadamard

// Rotate a row in place (see above), without the gain. `done`: factors 2 that have been dealt with, 0 or 5 (or all, if
// there are fewer). All threads of the team take part, after a sync of theirs. The larger bases want more than 100
// registers: MAX_BASE leaves them out of a kernel that is not called for them.
template <int MAX_BASE = 36, class Team = WholeBlock>
__device__ __forceinline__ void rotate(float* row, int channels, const Rotation& r, int done = 0) {
  while (done < r.bits) {
    const int left = r.bits - done;
    const int take = done == 0 ? (left < kFirstBits ? left : kFirstBits) : left <= 5 ? left : (left + 1) / 2;
    if (take == 5) hadamard::pass<32, false, Team>(row, channels, done);
    if (take == 4) hadamard::pass<16, false, Team>(row, channels, done);
    if (take == 3) hadamard::pass<8, false, Team>(row, channels, done);
    if (take == 2) hadamard::pass<4, false, Team>(row, channels, done);
    if (take == 1) hadamard::pass<2, false, Team>(row, channels, done);
    done += take;
  }
  if (r.base == 12) hadamard::pass<12, true, Team>(row, channels, r.bits);
  if (r.base == 20) hadamard::pass<20, true, Team>(row, channels, r.bits);
  if constexpr (MAX_BASE >= 28)
    if (r.base == 28) hadamard::pass<28, true, Team>(row, channels, r.bits);
  if constexpr (MAX_BASE >= 36)
    if (r.base == 36) hadamard::pass<36, true, Team>(row, channels, r.bits);
}

}  // namespace quamba
