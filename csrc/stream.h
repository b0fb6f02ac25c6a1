// Products of a few queries with rows of keys and values as these lie in memory, in whatever type: each row is read once
// for all the queries, and lanes go along its width.
#pragma once

#include "product.h"
#include "rows.h"

namespace regard::REGARD_SET {

// Rows that lie `apart` bytes from one another.
struct Lines {
  const char* data;
  int64_t apart;
};

// How numbers of a type are read: kVectors vectors at a time, kStep numbers. Column c of a row comes to lie at place(c).
struct Floats {
  static constexpr int kVectors = 1, kStep = kWidth, kSize = 4;
  static int64_t place(int64_t c) { return c; }
  static REGARD_INLINE void read(const char* p, Vec* x) { x[0] = load(reinterpret_cast<const float*>(p)); }
};

struct Halves {
  static constexpr int kVectors = 1, kStep = kWidth, kSize = 2;
  static int64_t place(int64_t c) { return c; }
  static REGARD_INLINE void read(const char* p, Vec* x) { x[0] = from_half(*reinterpret_cast<const AnyShort*>(p)); }
};

// Numbers at even columns and those at odd ones, an operation each: in their order, they would take two.
struct BFloats {
  static constexpr int kVectors = 2, kStep = 2 * kWidth, kSize = 2;
  using Pairs = uint32_t __attribute__((vector_size(4 * kWidth), aligned(2), may_alias));
  static int64_t place(int64_t c) { return c / kStep * kStep + c % 2 * kWidth + c % kStep / 2; }
  static REGARD_INLINE void read(const char* p, Vec* x) {
    const Word pairs = *reinterpret_cast<const Pairs*>(p);
    x[0] = reinterpret_cast<Vec>(pairs << 16);
    x[1] = reinterpret_cast<Vec>(pairs & 0xffff0000u);
  }
};

// What will be read soon, into the second cache: what fetches on its own does so along one row of memory after the other, and
// too late.
REGARD_INLINE void fetch(const char* p) { __builtin_prefetch(p, 0, 2); }

// Calls `work` with the way to read a type.
template <class Work>
REGARD_INLINE void with_type(Type type, Work work) {
  if (type == Type::Float) return work(Floats{});
  if (type == Type::BFloat16) return work(BFloats{});
  work(Halves{});
}

// s[r * ld + n] = the product of query r, at q + r * width, and key n. Some kWidth sums at once, of kQueries queries by so
// many keys, come out as one vector. Numbers past the last key, up to the next so many, are of no meaning.
template <class Read, int kQueries>
inline void multiply_rows(const float* q, int64_t width, Lines k, Lines next, int64_t count, float* s, int64_t ld) {
  constexpr int kKeys = kWidth / kQueries;
  for (int64_t n = 0; n < count; n += kKeys) {
    const char* rows[kKeys];
    for (int j = 0; j < kKeys; j++) rows[j] = k.data + (n + j < count ? n + j : count - 1) * k.apart;
    Vec sums[kWidth];
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; i++) sums[i] = Vec{};
    for (int64_t c = 0; c < width; c += Read::kStep) {
#pragma GCC unroll 16
      for (int j = 0; j < kKeys; j++) {
        Vec x[Read::kVectors];
        Read::read(rows[j] + c * Read::kSize, x);
        fetch(next.data + (n + j) * next.apart + c * Read::kSize);
#pragma GCC unroll 4
        for (int r = 0; r < kQueries; r++)
#pragma GCC unroll 2
          for (int i = 0; i < Read::kVectors; i++) sums[r * kKeys + j] = fma(x[i], load(q + r * width + c + i * kWidth), sums[r * kKeys + j]);
      }
    }
    alignas(64) float found[kWidth];
    store(found, sum_each(sums));
#pragma GCC unroll 4
    for (int r = 0; r < kQueries; r++) __builtin_memcpy(s + r * ld + n, found + r * kKeys, kKeys * sizeof(float));
  }
}

// sums[r * width + c] += the sum over the keys n of weights[r * ld + n] * v[n][c], for kVectors vectors.
template <class Read, int kQueries, int kVectors>
REGARD_INLINE void add_columns(const float* weights, int64_t ld, Lines v, Lines next, int64_t count, float* sums, int64_t width) {
  Vec held[kQueries][kVectors];
#pragma GCC unroll 4
  for (int r = 0; r < kQueries; r++)
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; i++) held[r][i] = Vec{};
  for (int64_t n = 0; n < count; n++) {
    const char* row = v.data + n * v.apart;
    Vec x[kVectors];
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; i += Read::kVectors) {
      Read::read(row + i * kWidth * Read::kSize, x + i);
      fetch(next.data + n * next.apart + i * kWidth * Read::kSize);
    }
#pragma GCC unroll 4
    for (int r = 0; r < kQueries; r++) {
      const Vec weight = fill(weights[r * ld + n]);
#pragma GCC unroll 8
      for (int i = 0; i < kVectors; i++) held[r][i] = fma(weight, x[i], held[r][i]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kQueries; r++)
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; i++) {
      float* at = sums + r * width + i * kWidth;
      store(at, load(at) + held[r][i]);
    }
}

template <class Read, int kQueries>
inline void add_weighted(const float* weights, int64_t ld, Lines v, Lines next, int64_t count, float* sums, int64_t width) {
  // Sets with 32 registers hold 16 sums, those with 16 hold 8; beyond 8 vectors a row, nothing is gained.
#if defined(__AVX512F__) || defined(__aarch64__)
  constexpr int kHeld = 16;
#else
  constexpr int kHeld = 8;
#endif
  constexpr int kMost = kHeld / kQueries < 8 ? kHeld / kQueries : 8;
  int64_t c = 0;
  const auto step = [&](auto vectors) __attribute__((always_inline)) {
    constexpr int kVectors = decltype(vectors)::kValue;
    if constexpr (kVectors >= Read::kVectors)
      for (; c + kVectors * kWidth <= width; c += kVectors * kWidth)
        add_columns<Read, kQueries, kVectors>(weights, ld, {v.data + c * Read::kSize, v.apart}, {next.data + c * Read::kSize, next.apart}, count, sums + c, width);
  };
  step(Constant<kMost>{});
  if constexpr (kMost > 4) step(Constant<4>{});
  if constexpr (kMost > 2) step(Constant<2>{});
  step(Constant<1>{});
}

// Rows of queries by fours, twos and one.
template <class Work>
REGARD_INLINE void by_fours(int rows, Work work) {
  int r = 0;
  for (; r + 4 <= rows; r += 4) work(Constant<4>{}, r);
  if (r + 2 <= rows) work(Constant<2>{}, r), r += 2;
  if (r < rows) work(Constant<1>{}, r);
}

}  // namespace regard::REGARD_SET
