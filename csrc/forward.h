// Stages 2 and 3: online softmax (or sigmoid), the weighted sum, and the summaries that fit one pass.
//
//   for each tile of 64 queries                 (in the lanes; tiles go to the threads)
//     for each block of 192 keys that it may attend to
//       S (keys x queries)    = K Q^T           the largest of each lane on the way
//       P                     = 2^(S - peak)    and its sum
//       O^T (width x queries) += V^T P
#pragma once

#include "dropout.h"
#include "score.h"
#include "scratch.h"
#include "top.h"

namespace regard::REGARD_SET {

// Keys a block: scores of 48 KB, as much as the first cache holds.
constexpr int64_t kBlock = 192;
// Weights that are summed up before their sum is added to others.
constexpr int64_t kPart = 32;

class Forward {
 public:
  static int64_t scratch(const Problem& p, const Outputs& o) {
    const int64_t keys = least(kBlock, p.S);
    return Scores::scratch(p, keys) + keys * (kTile + whole_vectors(p.E) * kWidth) + kTile * (Scores::turned(p) + p.E + 2 * o.top);
  }

  Forward(const Problem& p, const Outputs& o, Scratch& scratch)
      : p_(p),
        o_(o),
        scores_(p, scratch.take(Scores::scratch(p, least(kBlock, p.S))), least(kBlock, p.S)),
        turned_(scratch.take(kTile * Scores::turned(p))),
        weights_(scratch.take(least(kBlock, p.S) * kTile)),
        values_(scratch.take(least(kBlock, p.S) * whole_vectors(p.E) * kWidth)),
        sums_(scratch.take(kTile * p.E)),
        unit_(fill(scores_.unit())),
        top_(o.top, scratch.take(kTile * o.top), reinterpret_cast<int32_t*>(scratch.take(kTile * o.top))) {}

  void tile(int64_t b, int64_t h, int64_t first) {
    const Queries q(p_, b, h, first);
    scores_.turn_queries(q, turned_);
    start(q);
    visit_keys(scores_.mask(), q, 0, p_.S, kBlock, [&](const Keys& keys) { add(q, keys); });
    finish(q);
  }

 private:
  void start(const Queries& q) {
    if (p_.drops) dropout_.set(p_, q.b, q.h, q.first, q.count);
    for (int i = 0; i < q.vectors; i++) best_[i] = fill(-kInfinity), total_[i] = Vec{}, moment_[i] = Vec{};
    for (int64_t at = 0; at < p_.E * q.lanes(); at += kWidth) store(sums_ + at, Vec{});
    top_.clear(q.lanes());
  }

  void add(const Queries& q, const Keys& keys) {
    Vec before[kMostVectors];
    for (int i = 0; i < q.vectors; i++) before[i] = best_[i];
    scores_.fill(q, turned_, keys, weights_, best_);
    if (o_.top) top_.add(weights_, keys.first, keys.count, q.vectors);
    if (p_.normalizer == Normalizer::Softmax) {
      rise(q, before);
      for (int i = 0; i < q.vectors; i++) weigh(q, keys.count, i);
    } else {
      for (int i = 0; i < q.vectors; i++) {
        if (o_.lse) follow(q, keys.count, before[i], i);
        weigh_each(q, keys.count, i);
      }
    }
    if (p_.drops) drop(q, keys);
    add_values(q, keys);
  }

  void add_values(const Queries& q, const Keys& keys) {
    if (scores_.pairs()) {
      const int64_t two = (keys.count + 1) / 2, ld = whole_vectors(p_.E) * kWidth;
      pair_keys(weights_, keys.count, q.lanes());
      pair_rows(p_.v, q.b, q.g, keys.first, keys.count, p_.E, values_, 2 * two, ld);
      return product<true>(p_.E, q.vectors, two, Strided<Pair>{pairs(values_), 1, ld}, pairs(weights_), q.lanes(), sums_, q.lanes());
    }
    const FloatRows v = as_floats(p_.v, q.b, q.g, keys.first, keys.count, p_.E, values_);
    product<true>(p_.E, q.vectors, keys.count, Strided<float>{v.data, 1, v.row}, weights_, q.lanes(), sums_, q.lanes());
  }

  // The largest score has risen: what was summed up beside the old one shrinks.
  void rise(const Queries& q, const Vec* before) {
    Bits risen = 0;
    Vec shrink[kMostVectors];
    for (int i = 0; i < q.vectors; i++) {
      risen |= greater(best_[i], before[i]);
      base_[i] = where(greater(best_[i], fill(-kInfinity)), best_[i], Vec{});
      const Vec step = before[i] - base_[i];  // -inf at the first keys
      shrink[i] = exp2(step, unit_);
      if (o_.entropy) moment_[i] = shrink[i] * fma(total_[i], max(step * unit_, fill(-200.0f)), moment_[i]);
      total_[i] *= shrink[i];
    }
    if (!risen) return;
    for (int64_t e = 0; e < p_.E; e++)
      for (int i = 0; i < q.vectors; i++) {
        float* at = sums_ + e * q.lanes() + i * kWidth;
        store(at, load(at) * shrink[i]);
      }
  }

  void weigh(const Queries& q, int64_t count, int i) {
    const Vec base = base_[i], unit = unit_;
    // Summed up by blocks, and each of them by parts: the sum of sums rounds less than one long sum, above all where the
    // weights are all but equal.
    Vec total{}, moment{};
    float* at = weights_ + i * kWidth;
    for (int64_t n = 0; n < count;) {
      Vec part{};
      for (const int64_t end = least(n + kPart, count); n < end; n++, at += q.lanes()) {
        const Vec x = load(at) - base, weight = exp2(x, unit);
        part += weight;
        if (o_.entropy) moment = fma(weight, max(x * unit, fill(-200.0f)), moment);
        store(at, weight);
      }
      total += part;
    }
    total_[i] += total, moment_[i] += moment;
  }

  // What a sigmoid makes of the scores does not tell their log-sum-exp.
  void follow(const Queries& q, int64_t count, Vec before, int i) {
    base_[i] = where(greater(best_[i], fill(-kInfinity)), best_[i], Vec{});
    Vec total{};
    for (int64_t n = 0; n < count;) {
      Vec part{};
      for (const int64_t end = least(n + kPart, count); n < end; n++) part += exp2(load(weights_ + n * q.lanes() + i * kWidth) - base_[i], unit_);
      total += part;
    }
    total_[i] = fma(total_[i], exp2(before - base_[i], unit_), total);
  }

  void weigh_each(const Queries& q, int64_t count, int i) {
    Vec moment{};
    const Vec bias = fill(p_.sink ? p_.sink[q.h] * kLog2e : 0.0f);
    float* at = weights_ + i * kWidth;
    for (int64_t n = 0; n < count; n++, at += q.lanes()) {
      const Vec weight = sigmoid(fma(load(at), unit_, bias));
      if (o_.entropy) moment = fma(weight, log2(where(greater(weight, Vec{}), weight, fill(1.0f))), moment);
      store(at, weight);
    }
    moment_[i] += moment;
  }

  void drop(const Queries& q, const Keys& keys) {
    for (int64_t n = 0; n < keys.count; n++)
      for (int i = 0; i < q.vectors; i++) {
        float* at = weights_ + n * q.lanes() + i * kWidth;
        store(at, where(dropout_.kept(keys.first + n, i), load(at), Vec{}));
      }
  }

  void finish(const Queries& q) {
    alignas(64) float scale[kTile], peak[kTile], inverse[kTile], share[kTile];
    const bool softmax = p_.normalizer == Normalizer::Softmax;
    for (int i = 0; i < q.vectors; i++) {
      Vec factor = fill(1.0f), high = Vec{}, rest = fill(1.0f);
      if (softmax) {
        // The sink is an extra key whose value is 0.
        const Vec sink = fill(p_.sink ? scores_.sink(q.h) : -kInfinity);
        high = max(best_[i], sink);
        const Bits none = bits_of(high == fill(-kInfinity));
        high = where(none, Vec{}, high);
        factor = exp2_far(best_[i] - high, unit_);  // the sink may be so much larger than all keys
        rest = where(none, Vec{}, fill(1.0f) / fma(total_[i], factor, exp2(sink - high, unit_)));
      }
      store(peak + i * kWidth, high);
      store(inverse + i * kWidth, rest);
      store(share + i * kWidth, factor * rest);
      store(scale + i * kWidth, factor * rest * fill(p_.kept));
    }
    turn_back(sums_, q.lanes(), scale, p_.E, o_.out, q.b, q.h, q.first, q.count);
    if (o_.exact.data) turn_back(sums_, q.lanes(), scale, p_.E, o_.exact, q.b, q.h, q.first, q.count);
    const int64_t row = (q.b * p_.H + q.h) * p_.L + q.first;
    for (int i = 0; i < q.count; i++) {
      if (o_.peak) o_.peak[row + i] = peak[i], o_.total[row + i] = inverse[i];
      if (o_.lse) o_.lse[row + i] = softmax ? log_sum(peak[i], inverse[i] == 0.0f ? 0.0 : 1.0 / inverse[i]) : log_sum(lane(base_, i), lane(total_, i));
      if (o_.largest) o_.largest[row + i] = softmax ? share[i] : largest_sigmoid(q, i);
      if (o_.entropy) {
        // -sum p log p, with p = share * 2^x and the sums of 2^x and of x 2^x.
        const double part = share[i], total = lane(total_, i), moment = lane(moment_, i);
        o_.entropy[row + i] = part > 0.0 ? static_cast<float>(-kLn2 * part * (moment + __builtin_log2(part) * total)) : 0.0f;
      }
    }
    if (!o_.top) return;
    for (int i = 0; i < q.vectors; i++) {
      const Vec high = load(peak + i * kWidth), rest = load(inverse + i * kWidth), bias = fill(p_.sink && !softmax ? p_.sink[q.h] * kLog2e : 0.0f);
      top_.each(i, [&](Vec score) { return softmax ? exp2_far(score - high, unit_) * rest : sigmoid(fma(score, unit_, bias)); });
    }
    top_.give(q.count, o_.top_weights + row * o_.top, o_.top_keys + row * o_.top);
  }

  // Of `total` times 2^(unit * base).
  float log_sum(double base, double total) const {
    return total == 0.0 ? -kInfinity : static_cast<float>((base * unit_[0] + __builtin_log2(total)) * kLn2);
  }

  float largest_sigmoid(const Queries& q, int i) const { return sigmoid(fill(lane(best_, i) * scores_.unit() + (p_.sink ? p_.sink[q.h] * kLog2e : 0.0f)))[0]; }
  static float lane(const Vec* x, int i) { return x[i / kWidth][i % kWidth]; }

  static constexpr double kLn2 = 0.6931471805599453;

  const Problem& p_;
  const Outputs& o_;
  Scores scores_;
  float* turned_;   // q, turned
  float* weights_;  // (keys, lanes)
  float* values_;   // values as floats, where they are of another type, or in pairs of keys
  float* sums_;     // (E, lanes)
  Vec unit_;
  Top top_;
  Dropout dropout_;
  // Of each query: the largest score; the same, but never -inf, as what is subtracted; the sum of 2^x, where x = unit *
  // (score - base), and the sum of x 2^x.
  Vec best_[kMostVectors], base_[kMostVectors], total_[kMostVectors], moment_[kMostVectors];
};

}  // namespace regard::REGARD_SET
