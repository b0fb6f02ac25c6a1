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
  REGARD_INLINE void operator()(int64_t, int, Vec&) const {}
};

template <int kRows, int kVectors, bool kAdd, class Number, class Finish>
REGARD_INLINE void block(int64_t depth, Strided<Number> a, const Number* b, int64_t b_row, float* c, int64_t c_row, int64_t row, int vector, Finish finish) {
  Vec sums[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; r++)
#pragma GCC unroll 4
    for (int n = 0; n < kVectors; n++) sums[r][n] = Vec{};
  const Number* at = a.data;
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
#pragma GCC unroll 8
  for (int r = 0; r < kRows; r++)
#pragma GCC unroll 4
    for (int n = 0; n < kVectors; n++) {
      // Not from the start: the sum of sums rounds less than one long sum.
      if (kAdd) sums[r][n] += load(c + r * c_row + n * kWidth);
      finish(row + r, vector + n, sums[r][n]);
      store(c + r * c_row + n * kWidth, sums[r][n]);
    }
}

template <int kRows, int kVectors, bool kAdd, class Number, class Finish>
REGARD_INLINE void column(int64_t rows, int64_t depth, Strided<Number> a, const Number* b, int64_t b_row, float* c, int64_t c_row, int vector, Finish finish) {
  int64_t row = 0;
  auto step = [&](auto count) __attribute__((always_inline)) {
    constexpr int kCount = decltype(count)::kValue;
    for (; row + kCount <= rows; row += kCount)
      block<kCount, kVectors, kAdd>(depth, Strided<Number>{a.data + row * a.row, a.row, a.step}, b, b_row, c + row * c_row, c_row, row, vector, finish);
  };
  step(Constant<kRows>{});
  step(Constant<2>{});
  step(Constant<1>{});
}

// `finish(row, vector, x)` may change each vector of the result before it is stored.
template <bool kAdd, class Number, class Finish = Nothing>
REGARD_INLINE void product(int64_t rows, int vectors, int64_t depth, Strided<Number> a, const Number* b, int64_t b_row, float* c, int64_t c_row, Finish finish = {}) {
  // Sets with 32 registers hold 16 sums and 4 vectors of B, those with 16 hold 12 and 2. On Zen 4, 4 x 4 reaches 98 % of the
  // peak of floats and 95 % of that of pairs; 6 x 4 reaches 95 % and 87 %.
#if defined(__AVX512F__) || defined(__aarch64__)
  constexpr int kMost = 4, kRows = 4;
#else
  constexpr int kMost = 2, kRows = 6;
#endif
  int n = 0;
  for (; n + kMost <= vectors; n += kMost) column<kRows, kMost, kAdd>(rows, depth, a, b + n * kWidth, b_row, c + n * kWidth, c_row, n, finish);
  if constexpr (kMost == 4)
    for (; n + 2 <= vectors; n += 2) column<8, 2, kAdd>(rows, depth, a, b + n * kWidth, b_row, c + n * kWidth, c_row, n, finish);
  for (; n < vectors; n++) column<8, 1, kAdd>(rows, depth, a, b + n * kWidth, b_row, c + n * kWidth, c_row, n, finish);
}

}  // namespace regard::REGARD_SET
