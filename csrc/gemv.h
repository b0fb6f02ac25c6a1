// Products of a few queries with rows of keys and values in their original memory layout and dtype. Each row is read
// once for all queries; lanes run along the width.
#pragma once

#include "gemm.h"
#include "transpose.h"

namespace regard::REGARD_SET {

// Rows that are `stride` bytes apart.
struct RowView {
  const char* data;
  int64_t stride;
};

// How elements of a dtype are read: kVectors vectors, kStep elements at a time. Column c is found at position(c).
struct ReadFloat {
  static constexpr int kVectors = 1, kStep = kWidth, kSize = 4;
  static int64_t position(int64_t c) { return c; }
  static REGARD_INLINE void read(const char* p, Vec* x) { x[0] = load(reinterpret_cast<const float*>(p)); }
};

struct ReadHalf {
  static constexpr int kVectors = 1, kStep = kWidth, kSize = 2;
  static int64_t position(int64_t c) { return c; }
  static REGARD_INLINE void read(const char* p, Vec* x) {
    x[0] = from_half(*reinterpret_cast<const UnalignedShort*>(p));
  }
};

// Reads even and odd columns into separate vectors, one operation each; keeping the column order would take two.
struct ReadBFloat16 {
  static constexpr int kVectors = 2, kStep = 2 * kWidth, kSize = 2;
  using Pairs = uint32_t __attribute__((vector_size(4 * kWidth), aligned(2), may_alias));
  static int64_t position(int64_t c) { return c / kStep * kStep + c % 2 * kWidth + c % kStep / 2; }
  static REGARD_INLINE void read(const char* p, Vec* x) {
    const UInt pairs = *reinterpret_cast<const Pairs*>(p);
    x[0] = reinterpret_cast<Vec>(pairs << 16);
    x[1] = reinterpret_cast<Vec>(pairs & 0xffff0000u);
  }
};

// Prefetches into the L2 cache. The hardware prefetcher follows one memory row after another, and starts too late.
REGARD_INLINE void prefetch(const char* p) { __builtin_prefetch(p, 0, 2); }

// Calls `work` with the reader of a dtype.
template <class Work>
REGARD_INLINE void with_type(Type type, Work work) {
  if (type == Type::Float) return work(ReadFloat{});
  if (type == Type::BFloat16) return work(ReadBFloat16{});
  work(ReadHalf{});
}

// s[r * ld + n] = dot product of query r, at q + r * width, and key n. kWidth sums of kQueries queries and kKeys keys
// are reduced to one vector. Elements past the last key, up to the next multiple of kKeys, are unspecified.
template <class Read, int kQueries>
inline void dot_rows(const float* q, int64_t width, RowView k, RowView next, int64_t count, float* s, int64_t ld) {
  constexpr int kKeys = kWidth / kQueries;
  for (int64_t n = 0; n < count; n += kKeys) {
    const char* rows[kKeys];
    for (int j = 0; j < kKeys; j++) rows[j] = k.data + (n + j < count ? n + j : count - 1) * k.stride;
    Vec sums[kWidth];
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; i++) sums[i] = Vec{};
    for (int64_t c = 0; c < width; c += Read::kStep) {
#pragma GCC unroll 16
      for (int j = 0; j < kKeys; j++) {
        Vec x[Read::kVectors];
        Read::read(rows[j] + c * Read::kSize, x);
        prefetch(next.data + (n + j) * next.stride + c * Read::kSize);
#pragma GCC unroll 4
        for (int r = 0; r < kQueries; r++)
#pragma GCC unroll 2
          for (int i = 0; i < Read::kVectors; i++)
            sums[r * kKeys + j] = fma(x[i], load(q + r * width + c + i * kWidth), sums[r * kKeys + j]);
      }
    }
    alignas(64) float block[kWidth];
    store(block, sum_each(sums));
#pragma GCC unroll 4
    for (int r = 0; r < kQueries; r++) __builtin_memcpy(s + r * ld + n, block + r * kKeys, kKeys * sizeof(float));
  }
}

// sums[r * width + c] += sum over keys n of weights[r * ld + n] * v[n][c], for kVectors vectors.
template <class Read, int kQueries, int kVectors>
REGARD_INLINE void add_weighted_columns(const float* weights, int64_t ld, RowView v, RowView next, int64_t count,
                                        float* sums, int64_t width) {
  Vec acc[kQueries][kVectors];
#pragma GCC unroll 4
  for (int r = 0; r < kQueries; r++)
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; i++) acc[r][i] = Vec{};
  for (int64_t n = 0; n < count; n++) {
    const char* row = v.data + n * v.stride;
    Vec x[kVectors];
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; i += Read::kVectors) {
      Read::read(row + i * kWidth * Read::kSize, x + i);
      prefetch(next.data + n * next.stride + i * kWidth * Read::kSize);
    }
#pragma GCC unroll 4
    for (int r = 0; r < kQueries; r++) {
      const Vec weight = broadcast(weights[r * ld + n]);
#pragma GCC unroll 8
      for (int i = 0; i < kVectors; i++) acc[r][i] = fma(weight, x[i], acc[r][i]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kQueries; r++)
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; i++) {
      float* at = sums + r * width + i * kWidth;
      store(at, load(at) + acc[r][i]);
    }
}

template <class Read, int kQueries>
inline void add_weighted_rows(const float* weights, int64_t ld, RowView v, RowView next, int64_t count, float* sums,
                              int64_t width) {
  // Sets with 32 registers hold 16 sums, sets with 16 registers hold 8; more than 8 vectors per row gain nothing.
#if defined(__AVX512F__) || defined(__aarch64__)
  constexpr int kMaxSums = 16;
#else
  constexpr int kMaxSums = 8;
#endif
  constexpr int kMaxVectorsAtOnce = kMaxSums / kQueries < 8 ? kMaxSums / kQueries : 8;
  int64_t c = 0;
  const auto step = [&](auto vectors) __attribute__((always_inline)) {
    constexpr int kVectors = decltype(vectors)::kValue;
    if constexpr (kVectors >= Read::kVectors)
      for (; c + kVectors * kWidth <= width; c += kVectors * kWidth)
        add_weighted_columns<Read, kQueries, kVectors>(weights, ld, {v.data + c * Read::kSize, v.stride},
                                                       {next.data + c * Read::kSize, next.stride}, count, sums + c,
                                                       width);
  };
  step(Constant<kMaxVectorsAtOnce>{});
  if constexpr (kMaxVectorsAtOnce > 4) step(Constant<4>{});
  if constexpr (kMaxVectorsAtOnce > 2) step(Constant<2>{});
  step(Constant<1>{});
}

// Calls work(count, row) for rows in groups of four, two and one.
template <class Work>
REGARD_INLINE void by_fours(int rows, Work work) {
  int r = 0;
  for (; r + 4 <= rows; r += 4) work(Constant<4>{}, r);
  if (r + 2 <= rows) work(Constant<2>{}, r), r += 2;
  if (r < rows) work(Constant<1>{}, r);
}

}  // namespace regard::REGARD_SET
