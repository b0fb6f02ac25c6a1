// Some queries, in the lanes of vectors, and some keys that they may attend to.
#pragma once

#include "mask.h"
#include "rows.h"

namespace regard::REGARD_SET {

constexpr int kMostVectors = kTile / kWidth;
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kInfinity = __builtin_inff();

// Queries [first, first + count) of head h in batch row b, in `vectors` vectors.
struct Queries {
  int64_t b, h, g, first;
  int count, vectors;

  Queries() = default;
  Queries(const Problem& p, int64_t b, int64_t h, int64_t first)
      : b(b), h(h), g(h / p.repeats()), first(first), count(static_cast<int>(least(kTile, p.L - first))), vectors(whole_vectors(count)) {}
  int64_t lanes() const { return vectors * kWidth; }
};

// Keys [first, first + count); `partial` where the mask forbids some of the pairs.
struct Keys {
  int64_t first, count;
  bool partial;
};

// Calls `visit(keys)` for the keys in [first, last) that a tile of queries may attend to, in runs of at most `longest`.
template <class Visit>
inline void visit_keys(const Mask& mask, const Queries& q, int64_t first, int64_t last, int64_t longest, Visit visit) {
  Keys run{first, 0, false};
  const int64_t step = mask ? kTile : longest;
  for (int64_t j = first; j < last; j += step) {
    const int64_t count = least(step, last - j);
    const Cover cover = mask.cover({q.b, q.h, q.first, q.count, j, count});
    const bool joins = cover != Cover::None && run.count && run.partial == (cover == Cover::Some) && run.count + count <= longest;
    if (joins) {
      run.count += count;
      continue;
    }
    if (run.count) visit(run);
    run = {j, cover == Cover::None ? 0 : count, cover == Cover::Some};
  }
  if (run.count) visit(run);
}

}  // namespace regard::REGARD_SET
