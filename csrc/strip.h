// The scores of a tile of queries with all the keys that it may attend to; and, once the thresholds are known, those keys
// alone that some query of the tile gives a weight. Memory is linear in length: a strip is 64 queries wide.
#pragma once

#include "threshold.h"

namespace regard::REGARD_SET {

class Strip {
 public:
  // Numbers of scratch, in three parts; `caps` for the derivatives of the softcap.
  static int64_t scratch(const Problem& p, bool caps) { return p.S * (kTile * (caps ? 2 : 1) + 1); }

  Strip(const Problem& p, Scratch& scratch, bool caps)
      : p_(p),
        rows_(scratch.take(p.S * kTile)),
        caps_(caps ? scratch.take(p.S * kTile) : nullptr),
        keys_(reinterpret_cast<int32_t*>(scratch.take(p.S))) {}

  int64_t count() const { return count_; }
  float* row(int64_t n) const { return rows_ + n * lanes_; }
  const float* caps(int64_t n) const { return caps_ ? caps_ + n * lanes_ : nullptr; }
  int32_t key(int64_t n) const { return keys_[n]; }

  // `visit(keys, s)` sees each run of scores, of at most `longest` keys.
  template <class Visit>
  void fill(Scores& scores, const Queries& q, const float* turned, int64_t longest, Vec* best, Visit visit) {
    lanes_ = q.lanes(), count_ = 0;
    for (int i = 0; i < q.vectors; i++) best[i] = regard::REGARD_SET::fill(-kInfinity);
    visit_keys(scores.mask(), q, 0, p_.S, longest, [&](const Keys& keys) {
      scores.fill(q, turned, keys, row(count_), [&](int64_t, int i, auto& x) __attribute__((always_inline)) { raise(best[i], x); }, caps_ ? caps_ + count_ * lanes_ : nullptr);
      for (int64_t n = count_; n < count_ + keys.count; n++)
        for (int i = 0; i < q.vectors; i++) {
          if (i >= keys.from && i < keys.upto) continue;
          store(row(n) + i * kWidth, regard::REGARD_SET::fill(-kInfinity));
          // What is left of another tile may be NaN, and 0 times it is, too.
          if (caps_) store(caps_ + n * lanes_ + i * kWidth, Vec{});
        }
      visit(keys, row(count_));
      for (int64_t n = 0; n < keys.count; n++) keys_[count_++] = static_cast<int32_t>(keys.first + n);
    });
  }

  // Gaps take the place of the scores, and keys without any make way. `drop(key)` is told of them.
  template <class Drop>
  void narrow(const Threshold& threshold, const Queries& q, const float* at, const float* rest, Drop drop) {
    int64_t kept = 0;
    for (int64_t n = 0; n < count_; n++) {
      Bits some = 0;
      for (int i = 0; i < q.vectors; i++) {
        const Vec gap = threshold.gap(load(row(n) + i * kWidth), load(at + i * kWidth), load(rest + i * kWidth));
        some |= bits_of(gap != Vec{});
        store(row(kept) + i * kWidth, gap);
      }
      if (!some) {
        drop(keys_[n]);
        continue;
      }
      if (caps_)
        for (int64_t i = 0; i < lanes_; i += kWidth) store(caps_ + kept * lanes_ + i, load(caps_ + n * lanes_ + i));
      keys_[kept++] = keys_[n];
    }
    count_ = kept;
  }

  // Do these rows belong to keys that follow one another?
  bool is_run(int64_t first, int64_t count) const { return keys_[first + count - 1] - keys_[first] == count - 1; }

  // How many rows from the first on do so, at most `count`.
  int64_t run(int64_t first, int64_t count) const {
    int64_t n = 1;
    while (n < count && keys_[first + n] == keys_[first] + n) n++;
    return n;
  }

  // The rows of keys or values that belong to rows [first, first + count), as floats.
  FloatRows gather(const Rows& x, const Queries& q, int64_t first, int64_t count, int64_t width, float* copy) const {
    if (is_run(first, count)) return as_floats(x, q.b, q.g, keys_[first], count, width, copy);
    const int64_t ld = whole_vectors(width) * kWidth;
    for (int64_t n = 0; n < count; n++) copy_rows(x, q.b, q.g, keys_[first + n], 1, width, nullptr, copy + n * ld, ld);
    return {copy, ld};
  }

 private:
  const Problem& p_;
  float *rows_, *caps_;  // (keys, lanes)
  int32_t* keys_;
  int64_t count_ = 0, lanes_ = 0;
};

}  // namespace regard::REGARD_SET
