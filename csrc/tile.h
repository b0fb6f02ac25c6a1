// Some queries, in the lanes of vectors, and some keys that they may attend to.
#pragma once

#include "mask.h"
#include "rows.h"

namespace regard::REGARD_SET {

constexpr int kMostVectors = kTile / kWidth;
// Of numbers that all have one sign, so many are summed before they go to the others: the sum of sums rounds less than one
// long sum, by 14 units of the last place for 90 numbers.
constexpr int64_t kSummed = 16;
constexpr float kLog2e = 1.4426950408889634f;
constexpr double kLn2 = 0.6931471805599453;
constexpr float kInfinity = __builtin_inff();

// What a tile's vectors hold for query i.
REGARD_INLINE float lane(const Vec* x, int i) { return x[i / kWidth][i % kWidth]; }

// Queries [first, first + count) of head h in batch row b, in `vectors` vectors.
struct Queries {
  int64_t b, h, g, first;
  int count, vectors;

  Queries() = default;
  Queries(const Problem& p, int64_t b, int64_t h, int64_t first)
      : b(b), h(h), g(h / p.repeats()), first(first), count(static_cast<int>(least(kTile, p.L - first))), vectors(whole_vectors(count)) {}
  int64_t lanes() const { return vectors * kWidth; }
};

// Keys [first, first + count), and the vectors [from, upto) of the queries that may attend to some of them. `partial` where
// the mask forbids some of these pairs: then bits[n] tells which queries may attend to key first + n.
struct Keys {
  int64_t first, count;
  bool partial;
  int from, upto;
  const uint64_t* bits;

  int vectors() const { return upto - from; }
  // Of the queries of a tile, those that are in the vectors.
  int64_t queries(const Queries& q) const { return least(upto * kWidth, q.count) - from * kWidth; }
};

// What a run of keys is at most.
constexpr int64_t kMostKeys = 256;

// The keys of a tile that is neither full nor empty, by groups of neighbours: at the diagonal of a causal mask, 6 of 16 such
// groups of 16 x 16 pairs are empty; and where a batch is padded, what is left of the last tile is full. No group begins at an
// odd key, since keys may be taken in pairs.
template <class Give>
inline void trim(const Queries& q, int64_t first, int64_t count, const uint64_t* bits, Give give) {
  constexpr int64_t kGroup = 16;
  const uint64_t every = bit_range(0, q.count);
  for (int64_t group = 0; group < count; group += kGroup) {
    int64_t n = group, end = least(group + kGroup, count);
    while (n < end && !(bits[n] & every)) n++;
    while (n < end && !(bits[end - 1] & every)) end--;
    if (n == end) continue;
    n &= ~int64_t{1};
    uint64_t some = 0, all = every;
    for (int64_t key = n; key < end; key++) some |= bits[key] & every, all &= bits[key];
    const int from = __builtin_ctzll(some) / kWidth, upto = (63 - __builtin_clzll(some)) / kWidth + 1;
    const bool partial = (every & bit_range(from * kWidth, upto * kWidth)) != (all & bit_range(from * kWidth, upto * kWidth));
    give(Keys{first + n, end - n, partial, from, upto, bits + n});
  }
}

// Calls `visit(keys)` for the keys in [first, last) that a tile of queries may attend to, in runs of at most `longest`.
template <class Visit>
inline void visit_keys(const Mask& mask, const Queries& q, int64_t first, int64_t last, int64_t longest, Visit visit) {
  if (!mask) {
    // Of one length, which rows by fours go into.
    const int64_t pieces = (last - first + longest - 1) / longest;
    const int64_t step = pieces ? ((last - first + pieces - 1) / pieces + 3) / 4 * 4 : 1;
    for (int64_t j = first; j < last; j += step) visit(Keys{j, least(step, last - j), false, 0, q.vectors, nullptr});
    return;
  }
  uint64_t run_bits[kMostKeys];
  Keys run{0, 0, false, 0, 0, run_bits};
  const auto join = [&](const Keys& keys) {
    const bool joins = keys.first == run.first + run.count && keys.partial == run.partial && keys.from == run.from && keys.upto == run.upto && run.count + keys.count <= longest;
    if (!joins) {
      if (run.count) visit(run);
      run = {keys.first, 0, keys.partial, keys.from, keys.upto, run_bits};
    }
    for (int64_t n = 0; keys.partial && n < keys.count; n++) run_bits[run.count + n] = keys.bits[n];
    run.count += keys.count;
  };
  for (int64_t j = first; j < last; j += kTile) {
    const Box box{q.b, q.h, q.first, q.count, j, least(kTile, last - j)};
    const Cover cover = mask.cover(box);
    if (cover == Cover::None) continue;
    if (cover == Cover::All) {
      join({j, box.nj, false, 0, q.vectors, nullptr});
      continue;
    }
    uint64_t bits[kTile];
    mask.bits(box, bits);
    trim(q, j, box.nj, bits, join);
  }
  if (run.count) visit(run);
}

}  // namespace regard::REGARD_SET
