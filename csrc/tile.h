// A tile of queries, in the lanes of vectors, and a block of keys that they may attend to.
#pragma once

#include "mask.h"
#include "transpose.h"

namespace regard::REGARD_SET {

constexpr int kMaxVectors = kTile / kWidth;
// Number of nonnegative terms summed before they are added to the total: a sum of partial sums rounds less than one
// long sum, by 14 ulp for 90 terms.
constexpr int64_t kSumBlock = 16;
constexpr float kLog2e = 1.4426950408889634f;
constexpr double kLn2 = 0.6931471805599453;
constexpr float kInfinity = __builtin_inff();

// The element of query i in the vectors of a tile.
REGARD_INLINE float lane(const Vec* x, int i) { return x[i / kWidth][i % kWidth]; }

// Queries [first, first + count) of head h in batch row b, in `vectors` vectors.
struct QueryTile {
  int64_t b, h, g, first;
  int count, vectors;

  QueryTile() = default;
  QueryTile(const Problem& p, int64_t b, int64_t h, int64_t first)
      : b(b),
        h(h),
        g(h / p.repeats()),
        first(first),
        count(static_cast<int>(min64(kTile, p.L - first))),
        vectors(whole_vectors(count)) {}
  int64_t lanes() const { return vectors * kWidth; }
};

// Keys [first, first + count), and the range [from, until) of vectors with queries that may attend to some of them. If
// `partial`, the mask forbids some of these pairs, and bits[n] holds the queries that may attend to key first + n.
struct KeyBlock {
  int64_t first, count;
  bool partial;
  int from, until;
  const uint64_t* bits;

  int vectors() const { return until - from; }
  // The number of queries in these vectors.
  int64_t queries(const QueryTile& q) const { return min64(until * kWidth, q.count) - from * kWidth; }
};

// Maximum number of keys per block.
constexpr int64_t kMaxKeys = 256;

// Divides a partial tile into groups of neighboring keys. At the diagonal of a causal mask, 6 of 16 groups of 16 x 16
// pairs are empty; for a padded batch, the rest of the last tile is full. No group begins at an odd key, since keys may
// be processed in pairs.
template <class Emit>
inline void trim_block(const QueryTile& q, int64_t first, int64_t count, const uint64_t* bits, Emit emit) {
  constexpr int64_t kGroup = 16;
  const uint64_t every = bit_range(0, q.count);
  for (int64_t group = 0; group < count; group += kGroup) {
    int64_t n = group, end = min64(group + kGroup, count);
    while (n < end && !(bits[n] & every)) n++;
    while (n < end && !(bits[end - 1] & every)) end--;
    if (n == end) continue;
    n &= ~int64_t{1};
    uint64_t some = 0, all = every;
    for (int64_t key = n; key < end; key++) some |= bits[key] & every, all &= bits[key];
    const int from = __builtin_ctzll(some) / kWidth, until = (63 - __builtin_clzll(some)) / kWidth + 1;
    const bool partial =
        (every & bit_range(from * kWidth, until * kWidth)) != (all & bit_range(from * kWidth, until * kWidth));
    emit(KeyBlock{first + n, end - n, partial, from, until, bits + n});
  }
}

// Calls `visit(keys)` for the keys in [first, last) that a tile of queries may attend to, in blocks of at most
// `max_keys`.
template <class Visit>
inline void visit_keys(const Mask& mask, const QueryTile& q, int64_t first, int64_t last, int64_t max_keys,
                       Visit visit) {
  if (!mask) {
    // Blocks of equal length, a multiple of four.
    const int64_t pieces = (last - first + max_keys - 1) / max_keys;
    const int64_t step = pieces ? ((last - first + pieces - 1) / pieces + 3) / 4 * 4 : 1;
    for (int64_t j = first; j < last; j += step)
      visit(KeyBlock{j, min64(step, last - j), false, 0, q.vectors, nullptr});
    return;
  }
  uint64_t run_bits[kMaxKeys];
  KeyBlock run{0, 0, false, 0, 0, run_bits};
  const auto join = [&](const KeyBlock& keys) {
    const bool joins = keys.first == run.first + run.count && keys.partial == run.partial && keys.from == run.from &&
                       keys.until == run.until && run.count + keys.count <= max_keys;
    if (!joins) {
      if (run.count) visit(run);
      run = {keys.first, 0, keys.partial, keys.from, keys.until, run_bits};
    }
    for (int64_t n = 0; keys.partial && n < keys.count; n++) run_bits[run.count + n] = keys.bits[n];
    run.count += keys.count;
  };
  for (int64_t j = first; j < last; j += kTile) {
    const Box box{q.b, q.h, q.first, q.count, j, min64(kTile, last - j)};
    const Coverage coverage = mask.coverage(box);
    if (coverage == Coverage::Empty) continue;
    if (coverage == Coverage::Full) {
      join({j, box.nj, false, 0, q.vectors, nullptr});
      continue;
    }
    uint64_t bits[kTile];
    mask.bits(box, bits);
    trim_block(q, j, box.nj, bits, join);
  }
  if (run.count) visit(run);
}

}  // namespace regard::REGARD_SET
