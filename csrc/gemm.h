// The matrix product: C (rows x lanes) = or += A (rows x depth) B (depth x lanes).
//
// Elements of A are read one by one and broadcast, so A may have any strides; B and C are rows of whole vectors. A
// block of kRows x kVectors sums stays in registers for the whole depth. Elements are floats, or pairs of bfloat16 that
// are neighbors along the depth, which then counts pairs.
#pragma once

#include "simd.h"

namespace regard::REGARD_SET {

template <class Element>
struct Strided {
  const Element* data;
  int64_t row, step;  // strides of A, in elements
};

template <int kConstant>
struct Constant {
  static constexpr int kValue = kConstant;
};

struct NoFinish {
  template <class Rows>
  REGARD_INLINE void operator()(int64_t, int, Rows&) const {}
};

template <class Rows>
constexpr int kCountOf = sizeof(Rows) / sizeof(Vec);  // a reference has the size of its referent

// Calls work(index, row) for each row of an array; `first` is the index of its first row.
template <class Rows, class Work>
REGARD_INLINE void each_row(int64_t first, Rows& x, Work work) {
#pragma GCC unroll 8
  for (int r = 0; r < kCountOf<Rows>; r++) work(first + r, x[r]);
}

// Computes one block; `emit(row, vector, sums)` receives all of its sums at once.
template <int kRows, int kVectors, class Element, class Emit>
REGARD_INLINE void gemm_block(int64_t depth, Strided<Element> a, const Element* b, int64_t b_row, int64_t row,
                              int vector, Emit emit) {
  Vec sums[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; r++)
#pragma GCC unroll 4
    for (int n = 0; n < kVectors; n++) sums[r][n] = Vec{};
  const Element* at = a.data;
  // Unrolling saves jumps: at a depth of 32, as in a bf16 dot product, one jump per step costs 4 %.
#pragma GCC unroll 4
  for (int64_t d = 0; d < depth; d++, at += a.step, b += b_row) {
    decltype(load(b)) vectors[kVectors];
#pragma GCC unroll 4
    for (int n = 0; n < kVectors; n++) vectors[n] = load(b + n * kWidth);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; r++) {
      const auto element = broadcast(at[r * a.row]);
#pragma GCC unroll 4
      for (int n = 0; n < kVectors; n++) sums[r][n] = fma(element, vectors[n], sums[r][n]);
    }
  }
  emit(row, vector, sums);
}

template <int kRows, int kVectors, class Element, class Emit>
REGARD_INLINE void gemm_column(int64_t rows, int64_t depth, Strided<Element> a, const Element* b, int64_t b_row,
                               int vector, Emit emit) {
  int64_t row = 0;
  auto step = [&](auto count) __attribute__((always_inline)) {
    constexpr int kCount = decltype(count)::kValue;
    for (; row + kCount <= rows; row += kCount)
      gemm_block<kCount, kVectors>(depth, Strided<Element>{a.data + row * a.row, a.row, a.step}, b, b_row, row, vector,
                                   emit);
  };
  step(Constant<kRows>{});
  step(Constant<2>{});
  step(Constant<1>{});
}

// Calls `emit(row, vector, sums)` for each block of the product: an array of rows of vectors that starts at the given
// row and vector. Rows come in order; all blocks but the last have an even number of rows.
template <class Element, class Emit>
REGARD_INLINE void gemm_blocks(int64_t rows, int vectors, int64_t depth, Strided<Element> a, const Element* b,
                               int64_t b_row, Emit emit) {
  // Sets with 32 registers hold 16 sums and 4 vectors of B, sets with 16 registers hold 12 and 2. On Zen 4, 4 x 4
  // reaches 98 % of the float peak and 95 % of the bf16 dot peak; 6 x 4 reaches 95 % and 87 %.
#if defined(__AVX512F__) || defined(__aarch64__)
  constexpr int kMaxVectors = 4, kRows = 4;
#else
  constexpr int kMaxVectors = 2, kRows = 6;
#endif
  int n = 0;
  for (; n + kMaxVectors <= vectors; n += kMaxVectors)
    gemm_column<kRows, kMaxVectors>(rows, depth, a, b + n * kWidth, b_row, n, emit);
  if constexpr (kMaxVectors == 4) {
    if (n + 3 == vectors) return gemm_column<6, 3>(rows, depth, a, b + n * kWidth, b_row, n, emit);
    if (n + 2 == vectors) return gemm_column<8, 2>(rows, depth, a, b + n * kWidth, b_row, n, emit);
  }
  if (n < vectors) gemm_column<8, 1>(rows, depth, a, b + n * kWidth, b_row, n, emit);
}

// C = A B or C += A B. `finish(row, vector, x)` may modify the result before it is stored: an array of one vector per
// row, starting at `row`, so that operands common to all rows are loaded once.
template <bool kAdd, class Element, class Finish = NoFinish>
REGARD_INLINE void gemm(int64_t rows, int vectors, int64_t depth, Strided<Element> a, const Element* b, int64_t b_row,
                        float* c, int64_t c_row, Finish finish = {}) {
  gemm_blocks(rows, vectors, depth, a, b, b_row,
              [&](int64_t row, int vector, auto& sums) __attribute__((always_inline)) {
                constexpr int kVectors = kCountOf<decltype(sums[0])>, kRows = kCountOf<decltype(sums)> / kVectors;
#pragma GCC unroll 4
                for (int n = 0; n < kVectors; n++) {
                  float* at = c + row * c_row + (vector + n) * kWidth;
                  Vec x[kRows];
      // Add C last: a sum of partial sums rounds less than one long sum.
#pragma GCC unroll 8
                  for (int r = 0; r < kRows; r++) x[r] = kAdd ? sums[r][n] + load(at + r * c_row) : sums[r][n];
                  finish(row, vector + n, x);
#pragma GCC unroll 8
                  for (int r = 0; r < kRows; r++) store(at + r * c_row, x[r]);
                }
              });
}

}  // namespace regard::REGARD_SET
