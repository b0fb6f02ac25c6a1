// The scores of a tile of 64 queries and all keys that it may attend to. Once the thresholds are known, the panel is
// compacted to the keys that have a nonzero weight for some query of the tile. Memory is linear in the number of keys.
#pragma once

#include "entmax.h"

namespace regard::REGARD_SET {

class ScorePanel {
 public:
  // Floats of scratch, in three parts; `softcap_grad` if the derivative of the softcap is needed.
  static int64_t scratch(const Problem& p, bool softcap_grad) { return p.S * (kTile * (softcap_grad ? 2 : 1) + 1); }

  ScorePanel(const Problem& p, Scratch& scratch, bool softcap_grad)
      : p_(p),
        rows_(scratch.take(p.S * kTile)),
        softcap_grad_(softcap_grad ? scratch.take(p.S * kTile) : nullptr),
        keys_(reinterpret_cast<int32_t*>(scratch.take(p.S))) {}

  int64_t count() const { return count_; }
  float* row(int64_t n) const { return rows_ + n * lanes_; }
  const float* softcap_grad(int64_t n) const { return softcap_grad_ ? softcap_grad_ + n * lanes_ : nullptr; }
  int32_t key(int64_t n) const { return keys_[n]; }

  // Calls `visit(keys, s)` for each block of at most `max_keys` keys.
  template <class Visit>
  void fill(Scores& scores, const QueryTile& q, const float* q_transposed, int64_t max_keys, Vec* best, Visit visit) {
    lanes_ = q.lanes(), count_ = 0;
    for (int i = 0; i < q.vectors; i++) best[i] = broadcast(-kInfinity);
    visit_keys(scores.mask(), q, 0, p_.S, max_keys, [&](const KeyBlock& keys) {
      scores.compute(
          q, q_transposed, keys, row(count_),
          [&](int64_t, int i, auto& x) __attribute__((always_inline)) { update_max(best[i], x); },
          softcap_grad_ ? softcap_grad_ + count_ * lanes_ : nullptr);
      for (int64_t n = count_; n < count_ + keys.count; n++)
        for (int i = 0; i < q.vectors; i++) {
          if (i >= keys.from && i < keys.until) continue;
          store(row(n) + i * kWidth, broadcast(-kInfinity));
          // The memory may hold NaN from another tile, and 0 * NaN is NaN.
          if (softcap_grad_) store(softcap_grad_ + n * lanes_ + i * kWidth, Vec{});
        }
      visit(keys, row(count_));
      for (int64_t n = 0; n < keys.count; n++) keys_[count_++] = static_cast<int32_t>(keys.first + n);
    });
  }

  // Replaces scores by gaps and removes keys without any positive gap, calling `drop(key)` for them.
  template <class Drop>
  void compact(const Entmax& entmax, const QueryTile& q, const float* tau, const float* correction, Drop drop) {
    int64_t kept = 0;
    for (int64_t n = 0; n < count_; n++) {
      LaneMask some = 0;
      for (int i = 0; i < q.vectors; i++) {
        const Vec gap = entmax.gap(load(row(n) + i * kWidth), load(tau + i * kWidth), load(correction + i * kWidth));
        some |= lane_mask(gap != Vec{});
        store(row(kept) + i * kWidth, gap);
      }
      if (!some) {
        drop(keys_[n]);
        continue;
      }
      if (softcap_grad_)
        for (int64_t i = 0; i < lanes_; i += kWidth)
          store(softcap_grad_ + kept * lanes_ + i, load(softcap_grad_ + n * lanes_ + i));
      keys_[kept++] = keys_[n];
    }
    count_ = kept;
  }

  // Whether these rows belong to consecutive keys.
  bool is_run(int64_t first, int64_t count) const { return keys_[first + count - 1] - keys_[first] == count - 1; }

  // The number of rows with consecutive keys, starting at `first`, at most `count`.
  int64_t run(int64_t first, int64_t count) const {
    int64_t n = 1;
    while (n < count && keys_[first + n] == keys_[first] + n) n++;
    return n;
  }

  // The rows of keys or values for rows [first, first + count) of the panel, as floats.
  FloatRows gather(const Rows& x, const QueryTile& q, int64_t first, int64_t count, int64_t width, float* copy) const {
    if (is_run(first, count)) return as_floats(x, q.b, q.g, keys_[first], count, width, copy);
    const int64_t ld = whole_vectors(width) * kWidth;
    for (int64_t n = 0; n < count; n++) copy_rows(x, q.b, q.g, keys_[first + n], 1, width, nullptr, copy + n * ld, ld);
    return {copy, ld};
  }

 private:
  const Problem& p_;
  float *rows_, *softcap_grad_;  // (keys, lanes)
  int32_t* keys_;
  int64_t count_ = 0, lanes_ = 0;
};

}  // namespace regard::REGARD_SET
