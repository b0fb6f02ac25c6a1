// Stages 2 and 3 where the weights come by a threshold, and the summaries that fit the same pass.
//
//   for each tile of 64 queries                 (in the lanes; tiles go to the threads)
//     S (keys x queries)      = K Q^T           for all the keys that it may attend to: a strip
//     the threshold of each lane                from the scores that may still lie above it
//     O^T (width x queries)  += V^T P           for the keys that got a weight
#pragma once

#include "dropout.h"
#include "scratch.h"
#include "strip.h"
#include "top.h"
#include "views.h"

namespace regard::REGARD_SET {

class SparseForward {
 public:
  static int64_t scratch(const Problem& p, const Outputs& o) {
    return Scores::scratch(p, kRun) + Strip::scratch(p, false) + p.S * kWidth + kRun * padded(p.E) + kTile * (Scores::turned(p) + p.E + 2 * o.top) + padded(p.E) + Views::scratch(p, o);
  }

  SparseForward(const Problem& p, const Outputs& o, Scratch& scratch)
      : p_(p),
        o_(o),
        scores_(p, scratch.take(Scores::scratch(p, kRun)), kRun),
        threshold_(p, scores_.scale()),
        strip_(p, scratch, false),
        turned_(scratch.take(kTile * Scores::turned(p))),
        few_(scratch.take(p.S * kWidth)),
        values_(scratch.take(kRun * padded(p.E))),
        sums_(scratch.take(kTile * p.E)),
        lost_(scratch.take(padded(p.E))),
        top_(o.top, scratch.take(kTile * o.top), reinterpret_cast<int32_t*>(scratch.take(kTile * o.top))),
        views_(p, o, scratch) {}

  Views& views() { return views_; }

  void tile(int64_t b, int64_t h, int64_t first) {
    const Queries q(p_, b, h, first);
    if (p_.drops) dropout_.set(p_, q.b, q.h, q.first, q.count);
    for (int64_t at = 0; at < p_.E * q.lanes(); at += kWidth) store(sums_ + at, Vec{});
    for (int64_t at = 0; at < padded(p_.E); at += kWidth) store(lost_ + at, Vec{});
    for (int i = 0; i < q.vectors; i++) moment_[i] = Vec{};
    top_.clear(q.lanes());
    views_.start(q);
    scores_.turn_queries(q, turned_);
    strip_.fill(scores_, q, turned_, kRun, best_, [&](const Keys& keys, const float* s) {
      if (o_.top) top_.add(s, keys);
    });
    for (int i = 0; i < q.vectors; i++) {
      Vec at, rest;
      if (o_.lse) add_up(q, i);
      threshold_.solve(strip_.row(0) + i * kWidth, q.lanes(), strip_.count(), best_[i], few_, at, rest);
      store(at_ + i * kWidth, at), store(rest_ + i * kWidth, rest);
    }
    strip_.narrow(threshold_, q, at_, rest_, [&](int64_t key) { lose(q, key); });
    for (int64_t n = 0; n < strip_.count(); n += kRun) add(q, n, least(kRun, strip_.count() - n));
    finish(q);
  }

 private:
  static constexpr int64_t kRun = 192;  // keys a block: scores of 48 KB


  // The sum of e^(score - the largest), for the log-sum-exp.
  void add_up(const Queries& q, int i) {
    const Vec base = where(greater(best_[i], fill(-kInfinity)), best_[i], Vec{}), unit = fill(scores_.unit());
    total_[i] = Vec{};
    for (int64_t n = 0; n < strip_.count();) {
      // By blocks: the sum of sums rounds less than one long sum.
      Vec part{};
      for (const int64_t end = least(n + kRun, strip_.count()); n < end; n++) part += exp2(load(strip_.row(n) + i * kWidth) - base, unit);
      total_[i] += part;
    }
  }

  // A key without weights adds nothing, but 0 times NaN is NaN.
  void lose(const Queries& q, int64_t key) {
    const char* row = p_.v.at(q.b, q.g, key);
    for (int64_t e = 0; e < p_.E; e += kWidth)
      store(lost_ + e, fma(read(row + e * size_of(p_.v.type), p_.v.type, static_cast<int>(least(kWidth, p_.E - e))), Vec{}, load(lost_ + e)));
  }

  void add(const Queries& q, int64_t first, int64_t count) {
    threshold_.by_power([&](auto power) {
      for (int i = 0; i < q.vectors; i++) weigh<decltype(power)::kValue>(first, count, i);
    });
    if (views_) look(q, first, count);
    if (p_.drops) drop(q, first, count);
    const FloatRows v = strip_.gather(p_.v, q, first, count, p_.E, values_);
    product<true>(p_.E, q.vectors, count, Strided<float>{v.data, 1, v.row}, strip_.row(first), q.lanes(), sums_, q.lanes());
  }

  template <int kPower>
  void weigh(int64_t first, int64_t count, int i) {
    Vec moment{};
    for (int64_t n = first; n < first + count;) {
      Vec part{};
      for (const int64_t end = least(n + kSummed, first + count); n < end; n++) {
        float* at = strip_.row(n) + i * kWidth;
        const Vec gap = load(at);
        const Vec weight = threshold_.worth<kPower>(gap).weight;
        if (o_.entropy) part = fma(weight, log2(where(greater(gap, Vec{}), gap, fill(1.0f))), part);
        store(at, weight);
      }
      moment += part;
    }
    moment_[i] += moment;
  }

  void look(const Queries& q, int64_t first, int64_t count) {
    Vec ones[kMostVectors];
    for (Vec& one : ones) one = fill(1.0f);
    for (int64_t n = first, run; n < first + count; n += run) {
      run = strip_.run(n, first + count - n);
      views_.add(q, {strip_.key(n), run, false, 0, q.vectors, nullptr}, strip_.row(n), ones);
    }
  }

  void drop(const Queries& q, int64_t first, int64_t count) {
    for (int64_t n = first; n < first + count; n++)
      for (int i = 0; i < q.vectors; i++) {
        float* at = strip_.row(n) + i * kWidth;
        store(at, where(dropout_.kept(strip_.key(n), i), load(at), Vec{}));
      }
  }

  void finish(const Queries& q) {
    for (int64_t e = 0; e < p_.E; e++)
      for (int i = 0; i < q.vectors; i++) {
        float* at = sums_ + e * q.lanes() + i * kWidth;
        store(at, load(at) + fill(lost_[e]));
      }
    alignas(64) float scale[kTile], largest[kTile];
    for (float& x : scale) x = p_.kept;
    turn_back(sums_, q.lanes(), scale, p_.E, o_.out, q.b, q.h, q.first, q.count);
    if (o_.exact.data) turn_back(sums_, q.lanes(), scale, p_.E, o_.exact, q.b, q.h, q.first, q.count);
    for (int i = 0; i < q.vectors; i++) store(largest + i * kWidth, weight(i, best_[i]));
    const int64_t row = (q.b * p_.H + q.h) * p_.L + q.first;
    for (int i = 0; i < q.count; i++) {
      if (o_.peak) o_.peak[row + i] = at_[i], o_.total[row + i] = rest_[i];
      if (o_.largest) o_.largest[row + i] = largest[i];
      if (o_.entropy) o_.entropy[row + i] = static_cast<float>(-kLn2 * threshold_.power() * lane(moment_, i));
      if (o_.lse) {
        const float total = lane(total_, i);
        o_.lse[row + i] = total == 0.0f ? -kInfinity : static_cast<float>(static_cast<double>(lane(best_, i)) * scores_.scale() + kLn2 * __builtin_log2(total));
      }
    }
    if (views_) views_.finish(q);
    if (!o_.top) return;
    for (int i = 0; i < q.vectors; i++) top_.each(i, [&](Vec score) { return weight(i, score); });
    top_.give(q.count, o_.top_weights + row * o_.top, o_.top_keys + row * o_.top);
  }

  Vec weight(int i, Vec score) const { return threshold_.weight(threshold_.gap(score, load(at_ + i * kWidth), load(rest_ + i * kWidth))); }

  const Problem& p_;
  const Outputs& o_;
  Scores scores_;
  Threshold threshold_;
  Strip strip_;
  float* turned_;  // q, turned
  float* few_;     // (keys, lanes of one vector)
  float* values_;  // those of some keys
  float* sums_;    // (E, lanes)
  float* lost_;    // (E)
  Top top_;
  Views views_;
  Dropout dropout_;
  alignas(64) float at_[kTile], rest_[kTile];
  // Of each query: the largest score, the sum of e^(score - the largest), and that of p log2(gap).
  Vec best_[kMostVectors], total_[kMostVectors], moment_[kMostVectors];
};

}  // namespace regard::REGARD_SET
