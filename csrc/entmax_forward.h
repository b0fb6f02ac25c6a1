// Stages 2 and 3 of entmax: normalization, weighted sum, and the summaries computed in the same pass.
//
//   for each tile of 64 queries                 (in the lanes; tiles are distributed over the threads)
//     S (keys x queries)      = K Q^T           for all keys it may attend to: a score panel
//     tau of each lane                          from the scores that may still exceed it
//     O^T (width x queries)  += V^T P           for the keys with a nonzero weight
#pragma once

#include "dropout.h"
#include "score_panel.h"
#include "scratch.h"
#include "topk.h"
#include "weight_summaries.h"

namespace regard::REGARD_SET {

class EntmaxForward {
 public:
  static int64_t scratch(const Problem& p, const Outputs& o) {
    return Scores::scratch(p, kKeysPerBlock) + ScorePanel::scratch(p, false) + p.S * kWidth +
           kKeysPerBlock * padded(p.E) + kTile * (Scores::query_width(p) + p.E + 2 * o.top) + padded(p.E) +
           WeightSummaries::scratch(p, o);
  }

  EntmaxForward(const Problem& p, const Outputs& o, Scratch& scratch)
      : p_(p),
        o_(o),
        scores_(p, scratch.take(Scores::scratch(p, kKeysPerBlock)), kKeysPerBlock),
        entmax_(p, scores_.scale()),
        panel_(p, scratch, false),
        q_transposed_(scratch.take(kTile * Scores::query_width(p))),
        active_(scratch.take(p.S * kWidth)),
        values_(scratch.take(kKeysPerBlock * padded(p.E))),
        sums_(scratch.take(kTile * p.E)),
        nan_sums_(scratch.take(padded(p.E))),
        top_(o.top, scratch.take(kTile * o.top), reinterpret_cast<int32_t*>(scratch.take(kTile * o.top))),
        summaries_(p, o, scratch) {}

  WeightSummaries& summaries() { return summaries_; }

  void tile(int64_t b, int64_t h, int64_t first) {
    const QueryTile q(p_, b, h, first);
    if (p_.has_dropout) dropout_.set(p_, q.b, q.h, q.first, q.count);
    for (int64_t at = 0; at < p_.E * q.lanes(); at += kWidth) store(sums_ + at, Vec{});
    for (int64_t at = 0; at < padded(p_.E); at += kWidth) store(nan_sums_ + at, Vec{});
    for (int i = 0; i < q.vectors; i++) moment_[i] = Vec{};
    top_.clear(q.lanes());
    summaries_.start(q);
    scores_.load_queries(q, q_transposed_);
    panel_.fill(scores_, q, q_transposed_, kKeysPerBlock, best_, [&](const KeyBlock& keys, const float* s) {
      if (o_.top) top_.add(s, keys);
    });
    for (int i = 0; i < q.vectors; i++) {
      Vec tau, correction;
      if (o_.lse) add_exponentials(q, i);
      entmax_.solve_tau(panel_.row(0) + i * kWidth, q.lanes(), panel_.count(), best_[i], active_, tau, correction);
      store(tau_ + i * kWidth, tau), store(correction_ + i * kWidth, correction);
    }
    panel_.compact(entmax_, q, tau_, correction_, [&](int64_t key) { propagate_nan(q, key); });
    for (int64_t n = 0; n < panel_.count(); n += kKeysPerBlock) add(q, n, min64(kKeysPerBlock, panel_.count() - n));
    finish(q);
  }

 private:
  static constexpr int64_t kKeysPerBlock = 192;  // 48 KB of scores

  // Sums e^(score - maximum) for the log-sum-exp.
  void add_exponentials(const QueryTile& q, int i) {
    const Vec base = where(greater(best_[i], broadcast(-kInfinity)), best_[i], Vec{}), unit = broadcast(scores_.unit());
    total_[i] = Vec{};
    for (int64_t n = 0; n < panel_.count();) {
      // A sum of partial sums rounds less than one long sum.
      Vec part{};
      for (const int64_t end = min64(n + kSumBlock, panel_.count()); n < end; n++)
        part += exp2(load(panel_.row(n) + i * kWidth) - base, unit);
      total_[i] += part;
    }
  }

  // A key without weights adds nothing, but 0 * NaN is NaN.
  void propagate_nan(const QueryTile& q, int64_t key) {
    const char* row = p_.v.at(q.b, q.g, key);
    for (int64_t e = 0; e < p_.E; e += kWidth)
      store(nan_sums_ + e, fma(read(row + e * size_of(p_.v.type), p_.v.type, static_cast<int>(min64(kWidth, p_.E - e))),
                               Vec{}, load(nan_sums_ + e)));
  }

  void add(const QueryTile& q, int64_t first, int64_t count) {
    entmax_.by_power([&](auto power) {
      for (int i = 0; i < q.vectors; i++) compute_weights<decltype(power)::kValue>(first, count, i);
    });
    if (summaries_) summarize(q, first, count);
    if (p_.has_dropout) drop(q, first, count);
    const FloatRows v = panel_.gather(p_.v, q, first, count, p_.E, values_);
    gemm<true>(p_.E, q.vectors, count, Strided<float>{v.data, 1, v.row}, panel_.row(first), q.lanes(), sums_,
               q.lanes());
  }

  template <int kPower>
  void compute_weights(int64_t first, int64_t count, int i) {
    Vec moment{};
    for (int64_t n = first; n < first + count;) {
      Vec part{};
      for (const int64_t end = min64(n + kSumBlock, first + count); n < end; n++) {
        float* at = panel_.row(n) + i * kWidth;
        const Vec gap = load(at);
        const Vec weight = entmax_.to_weight<kPower>(gap).weight;
        if (o_.entropy) part = fma(weight, log2(where(greater(gap, Vec{}), gap, broadcast(1.0f))), part);
        store(at, weight);
      }
      moment += part;
    }
    moment_[i] += moment;
  }

  void summarize(const QueryTile& q, int64_t first, int64_t count) {
    Vec ones[kMaxVectors];
    for (Vec& one : ones) one = broadcast(1.0f);
    for (int64_t n = first, run; n < first + count; n += run) {
      run = panel_.run(n, first + count - n);
      summaries_.add(q, {panel_.key(n), run, false, 0, q.vectors, nullptr}, panel_.row(n), ones);
    }
  }

  void drop(const QueryTile& q, int64_t first, int64_t count) {
    for (int64_t n = first; n < first + count; n++)
      for (int i = 0; i < q.vectors; i++) {
        float* at = panel_.row(n) + i * kWidth;
        store(at, where(dropout_.kept_lanes(panel_.key(n), i), load(at), Vec{}));
      }
  }

  void finish(const QueryTile& q) {
    for (int64_t e = 0; e < p_.E; e++)
      for (int i = 0; i < q.vectors; i++) {
        float* at = sums_ + e * q.lanes() + i * kWidth;
        store(at, load(at) + broadcast(nan_sums_[e]));
      }
    alignas(64) float scale[kTile], max_weight[kTile];
    for (float& x : scale) x = p_.keep_scale;
    transpose_back(sums_, q.lanes(), scale, p_.E, o_.out, q.b, q.h, q.first, q.count);
    if (o_.exact.data) transpose_back(sums_, q.lanes(), scale, p_.E, o_.exact, q.b, q.h, q.first, q.count);
    for (int i = 0; i < q.vectors; i++) store(max_weight + i * kWidth, weight(i, best_[i]));
    const int64_t row = (q.b * p_.H + q.h) * p_.L + q.first;
    for (int i = 0; i < q.count; i++) {
      if (o_.row_max) o_.row_max[row + i] = tau_[i], o_.inverse_sum[row + i] = correction_[i];
      if (o_.max) o_.max[row + i] = max_weight[i];
      if (o_.entropy) o_.entropy[row + i] = static_cast<float>(-kLn2 * entmax_.power() * lane(moment_, i));
      if (o_.lse) {
        const float total = lane(total_, i);
        o_.lse[row + i] = total == 0.0f ? -kInfinity
                                        : static_cast<float>(static_cast<double>(lane(best_, i)) * scores_.scale() +
                                                             kLn2 * __builtin_log2(total));
      }
    }
    if (summaries_) summaries_.finish(q);
    if (!o_.top) return;
    for (int i = 0; i < q.vectors; i++) top_.transform(i, [&](Vec score) { return weight(i, score); });
    top_.write(q.count, o_.top_weights + row * o_.top, o_.top_keys + row * o_.top);
  }

  Vec weight(int i, Vec score) const {
    return entmax_.weight(entmax_.gap(score, load(tau_ + i * kWidth), load(correction_ + i * kWidth)));
  }

  const Problem& p_;
  const Outputs& o_;
  Scores scores_;
  Entmax entmax_;
  ScorePanel panel_;
  float* q_transposed_;  // (width, lanes)
  float* active_;        // (keys, lanes of one vector)
  float* values_;        // (keys, E): the values of some keys as floats
  float* sums_;          // (E, lanes)
  float* nan_sums_;      // (E): 0, or NaN from values of keys without weights
  TopK top_;
  WeightSummaries summaries_;
  Dropout dropout_;
  alignas(64) float tau_[kTile], correction_[kTile];
  // Per query: the maximum score, the sum of e^(score - maximum), and the sum of p log2(gap).
  Vec best_[kMaxVectors], total_[kMaxVectors], moment_[kMaxVectors];
};

}  // namespace regard::REGARD_SET
