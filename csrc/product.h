// The one matrix product that everything stands on: C (rows x lanes) = or += A (rows x depth) B (depth x lanes).
//
// A is read number by number and spread over a register, so it may lie in memory in any way; B and C are rows of whole
// vectors. A block of kRows x kVectors sums stays in registers for the whole depth. Numbers are floats, or pairs of bfloat16
// that are neighbours along the depth, which then counts pairs.
#pragma once

#include "simd.h"

namespace regard::REGARD_SET {

template <class Number>
struct Strided {
  const Number* data;
  int64_t row, step;  // from one row of A to the next, and from one place along its depth to the next
};

template <int kNumber>
struct Constant {
  static constexpr int kValue = kNumber;
};

struct Nothing {
  template <class Rows>
  REGARD_INLINE void operator()(int64_t, int, Rows&) const {}
};

template <class Rows>
constexpr int kCountOf = sizeof(Rows) / sizeof(Vec);  // a reference has the size of what it refers to

// Does something with each row of an array, `first` being the number of the first one.
template <class Rows, class Work>
REGARD_INLINE void each_row(int64_t first, Rows& x, Work work) {
#pragma GCC unroll 8
  for (int r = 0; r < kCountOf<Rows>; r++) work(first + r, x[r]);
}

// Adds a block up; `give(row, vector, sums)` gets all of its sums at once.
template <int kRows, int kVectors, class Number, class Give>
REGARD_INLINE void block(int64_t depth, Strided<Number> a, const Number* b, int64_t b_row, int64_t row, int vector, Give give) {
  Vec sums[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; r++)
#pragma GCC unroll 4
    for (int n = 0; n < kVectors; n++) sums[r][n] = Vec{};
  const Number* at = a.data;
  // Fewer jumps than places: where the depth is 32, as in a product of pairs, a step a place costs 4 %.
#pragma GCC unroll 4
  for (int64_t d = 0; d < depth; d++, at += a.step, b += b_row) {
    decltype(load(b)) vectors[kVectors];
#pragma GCC unroll 4
    for (int n = 0; n < kVectors; n++) vectors[n] = load(b + n * kWidth);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; r++) {
      const auto number = fill(at[r * a.row]);
#pragma GCC unroll 4
      for (int n = 0; n < kVectors; n++) sums[r][n] = fma(number, vectors[n], sums[r][n]);
    }
  }
  give(row, vector, sums);
}

template <int kRows, int kVectors, class Number, class Give>
REGARD_INLINE void column(int64_t rows, int64_t depth, Strided<Number> a, const Number* b, int64_t b_row, int vector, Give give) {
  int64_t row = 0;
  auto step = [&](auto count) __attribute__((always_inline)) {
    constexpr int kCount = decltype(count)::kValue;
    for (; row + kCount <= rows; row += kCount) block<kCount, kVectors>(depth, Strided<Number>{a.data + row * a.row, a.row, a.step}, b, b_row, row, vector, give);
  };
  step(Constant<kRows>{});
  step(Constant<2>{});
  step(Constant<1>{});
}

// Calls `give(row, vector, sums)` for each block of the product: an array of rows of vectors, the first of which is so many
// rows and vectors from the start. Rows come in order, those of a block being even in number but for the last one.
template <class Number, class Give>
REGARD_INLINE void multiply(int64_t rows, int vectors, int64_t depth, Strided<Number> a, const Number* b, int64_t b_row, Give give) {
  // Sets with 32 registers hold 16 sums and 4 vectors of B, those with 16 hold 12 and 2. On Zen 4, 4 x 4 reaches 98 % of the
  // peak of floats and 95 % of that of pairs; 6 x 4 reaches 95 % and 87 %.
#if defined(__AVX512F__) || defined(__aarch64__)
  constexpr int kMost = 4, kRows = 4;
#else
  constexpr int kMost = 2, kRows = 6;
#endif
  int n = 0;
  for (; n + kMost <= vectors; n += kMost) column<kRows, kMost>(rows, depth, a, b + n * kWidth, b_row, n, give);
  if constexpr (kMost == 4) {
    if (n + 3 == vectors) return column<6, 3>(rows, depth, a, b + n * kWidth, b_row, n, give);
    if (n + 2 == vectors) return column<8, 2>(rows, depth, a, b + n * kWidth, b_row, n, give);
  }
  if (n < vectors) column<8, 1>(rows, depth, a, b + n * kWidth, b_row, n, give);
}

// C = or += A B. `finish(row, vector, x)` may change the result before it is stored: an array of one vector for each of some
// rows, from `row` on, so that what belongs to all rows is read and written once for them.
template <bool kAdd, class Number, class Finish = Nothing>
REGARD_INLINE void product(int64_t rows, int vectors, int64_t depth, Strided<Number> a, const Number* b, int64_t b_row, float* c, int64_t c_row, Finish finish = {}) {
  multiply(rows, vectors, depth, a, b, b_row, [&](int64_t row, int vector, auto& sums) __attribute__((always_inline)) {
    constexpr int kVectors = kCountOf<decltype(sums[0])>, kRows = kCountOf<decltype(sums)> / kVectors;
#pragma GCC unroll 4
    for (int n = 0; n < kVectors; n++) {
      float* at = c + row * c_row + (vector + n) * kWidth;
      Vec x[kRows];
      // Not from the start: the sum of sums rounds less than one long sum.
#pragma GCC unroll 8
      for (int r = 0; r < kRows; r++) x[r] = kAdd ? sums[r][n] + load(at + r * c_row) : sums[r][n];
      finish(row, vector + n, x);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; r++) store(at + r * c_row, x[r]);
    }
  });
}

}  // namespace regard::REGARD_SET
