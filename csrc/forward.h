// Stages 2 and 3: online softmax (or sigmoid), the weighted sum, and the summaries that fit one pass.
//
//   for each tile of 64 queries                 (in the lanes; tiles go to the threads)
//     for each block of 192 keys that it may attend to
//       S (keys x queries)    = K Q^T           the largest of each lane on the way
//       P                     = 2^(S - peak)    and its sum
//       O^T (width x queries) += V^T P
//
// Where something is to be told of all weights, a strip keeps those of a tile until the sums of its rows are known.
#pragma once

#include "dropout.h"
#include "score.h"
#include "scratch.h"
#include "top.h"
#include "views.h"

namespace regard::REGARD_SET {

// Keys a block: scores of 48 KB, as much as the first cache holds, or stays near.
constexpr int64_t kBlock = 192;

class Forward {
 public:
  static int64_t scratch(const Problem& p, const Outputs& o) {
    const int64_t keys = least(kBlock, p.S);
    return Scores::scratch(p, keys) + (keys + 1) * kTile + values(p) + kTile * (Scores::turned(p) + p.E + 2 * o.top) + packed(p) + Views::scratch(p, o) + strip(p, o) + runs(p, o);
  }

  Forward(const Problem& p, const Outputs& o, Scratch& scratch)
      : p_(p),
        o_(o),
        scores_(p, scratch.take(Scores::scratch(p, least(kBlock, p.S))), least(kBlock, p.S)),
        turned_(scratch.take(kTile * Scores::turned(p))),
        weights_(scratch.take((least(kBlock, p.S) + 1) * kTile)),
        values_(scratch.take(values(p))),
        packed_(reinterpret_cast<int32_t*>(scratch.take(packed(p)))),
        sums_(scratch.take(kTile * p.E)),
        unit_(fill(scores_.unit())),
        rounded_(scores_.pairs() && !(o.lse || o.largest || o.entropy || o.top || o.looks())),
        top_(o.top, scratch.take(kTile * o.top), reinterpret_cast<int32_t*>(scratch.take(kTile * o.top))),
        views_(p, o, scratch),
        strip_(scratch.take(strip(p, o))),
        runs_(reinterpret_cast<Run*>(scratch.take(runs(p, o)))) {
    for (int64_t n = 0; n < packed(p); n++) packed_[n] = 0;
  }

  Views& views() { return views_; }

  void tile(int64_t b, int64_t h, int64_t first) {
    const Queries q(p_, b, h, first);
    scores_.turn_queries(q, turned_);
    start(q);
    visit_keys(scores_.mask(), q, 0, p_.S, kBlock, [&](const Keys& keys) { add(q, keys); });
    finish(q);
  }

 private:
  enum class Way { Softmax, Rounded, Sigmoid };

  // Some keys of the strip, and what their weights are of: 2^(unit * (score - base)).
  struct Run {
    Vec base[kMostVectors];
    Keys keys;
  };

  // Where products are of pairs, all values of a head, in pairs of keys; otherwise those of a block, as floats.
  static int64_t values(const Problem& p) { return (Scores::takes_pairs(p) ? (p.S + 1) / 2 : least(kBlock, p.S)) * padded(p.E); }
  static int64_t packed(const Problem& p) { return Scores::takes_pairs(p) ? (p.S + kTile - 1) / kTile : 0; }
  static int64_t strip(const Problem& p, const Outputs& o) { return o.looks() ? p.S * kTile : 0; }
  static int64_t runs(const Problem& p, const Outputs& o) { return o.looks() ? (p.S / 16 + 4) * static_cast<int64_t>(sizeof(Run) / 4) : 0; }

  void start(const Queries& q) {
    if (p_.drops) dropout_.set(p_, q.b, q.h, q.first, q.count);
    for (int i = 0; i < q.vectors; i++) best_[i] = fill(-kInfinity), base_[i] = total_[i] = moment_[i] = Vec{};
    for (int64_t at = 0; at < p_.E * q.lanes(); at += kWidth) store(sums_ + at, Vec{});
    top_.clear(q.lanes());
    views_.start(q);
    run_count_ = kept_ = 0;
  }

  void add(const Queries& q, const Keys& keys) {
    Vec before[kMostVectors];
    for (int i = keys.from; i < keys.upto; i++) before[i] = best_[i];
    scores_.fill(q, turned_, keys, weights_, [&](int64_t, int i, auto& x) __attribute__((always_inline)) { raise(best_[i], x); });
    if (o_.top) top_.add(weights_, keys);
    const bool softmax = p_.normalizer == Normalizer::Softmax;
    if (softmax) rise(q, keys, before);
    for (int i = keys.from; i < keys.upto; i++) {
      if (!softmax && o_.lse) follow(q, keys, before[i], i);
      !softmax ? weigh<Way::Sigmoid>(q, keys, i) : rounded_ ? weigh<Way::Rounded>(q, keys, i) : weigh<Way::Softmax>(q, keys, i);
    }
    if (views_) {
      Run& run = runs_[run_count_++];
      for (int i = keys.from; i < keys.upto; i++) run.base[i] = base_[i];
      run.keys = keys, kept_ += keys.count;
    }
    add_values(q, keys);
  }

  void add_values(const Queries& q, const Keys& keys) {
    const int64_t from = keys.from * kWidth;
    if (scores_.pairs()) {
      pack(q, keys);
      const int64_t ld = padded(p_.E);
      return product<true>(p_.E, keys.vectors(), (keys.count + 1) / 2, Strided<Pair>{pairs(values_) + keys.first / 2 * ld, 1, ld}, pairs(weights_) + from, q.lanes(), sums_ + from, q.lanes());
    }
    const FloatRows v = as_floats(p_.v, q.b, q.g, keys.first, keys.count, p_.E, values_);
    product<true>(p_.E, keys.vectors(), keys.count, Strided<float>{v.data, 1, v.row}, weights_ + from, q.lanes(), sums_ + from, q.lanes());
  }

  // The values of some keys in pairs: once for all tiles of a head that follow one another.
  void pack(const Queries& q, const Keys& keys) {
    const int32_t head = static_cast<int32_t>(q.b * p_.G + q.g + 1);
    for (int64_t n = keys.first / kTile; n * kTile < keys.first + keys.count; n++) {
      if (packed_[n] == head) continue;
      packed_[n] = head;
      const int64_t count = least(kTile, p_.S - n * kTile);
      pair_rows(p_.v, q.b, q.g, n * kTile, count, p_.E, values_ + n * kTile / 2 * padded(p_.E), count + count % 2, padded(p_.E));
    }
  }

  // The largest score has risen: what was summed up beside the old one shrinks.
  void rise(const Queries& q, const Keys& keys, const Vec* before) {
    Bits risen = 0;
    Vec shrink[kMostVectors];
    for (int i = keys.from; i < keys.upto; i++) {
      risen |= greater(best_[i], before[i]);
      base_[i] = where(greater(best_[i], fill(-kInfinity)), best_[i], Vec{});
      const Vec step = before[i] - base_[i];  // -inf at the first keys
      shrink[i] = exp2(step, unit_);
      if (o_.entropy) moment_[i] = shrink[i] * fma(total_[i], max(step * unit_, fill(-200.0f)), moment_[i]);
      total_[i] *= shrink[i];
    }
    if (!risen) return;
    for (int64_t e = 0; e < p_.E; e++)
      for (int i = keys.from; i < keys.upto; i++) {
        float* at = sums_ + e * q.lanes() + i * kWidth;
        store(at, load(at) * shrink[i]);
      }
  }

  // From scores to weights, in their place, in pairs of keys where products are taken of these; and their sums. They are summed
  // up by blocks, and each of them by parts: the sum of sums rounds less than one long sum, above all where the weights are all
  // but equal.
  template <Way kWay>
  void weigh(const Queries& q, const Keys& keys, int i) {
    const int64_t lanes = q.lanes();
    const Vec base = base_[i], unit = unit_, bias = fill(kWay == Way::Sigmoid && p_.sink ? p_.sink[q.h] * kLog2e : 0.0f);
    float *at = weights_ + i * kWidth, *kept = views_ ? strip_ + kept_ * lanes + i * kWidth : nullptr;
    Vec total{}, moment{}, part{}, part_moment{};
    const auto weight = [&](int64_t n) __attribute__((always_inline)) {
      const Vec score = load(at + n * lanes);
      Vec x;
      if (kWay == Way::Rounded) {
        x = exp2_rounded((score - base) * unit), part += x;
      } else if (kWay == Way::Softmax) {
        const Vec below = score - base;
        x = exp2(below, unit), part += x;
        if (o_.entropy) part_moment = fma(x, max(below * unit, fill(-200.0f)), part_moment);
      } else {
        x = sigmoid(fma(score, unit, bias));
        if (o_.entropy) part_moment = fma(x, log2(where(greater(x, Vec{}), x, fill(1.0f))), part_moment);
      }
      if (kept) store(kept + n * lanes, x);
      return p_.drops ? where(dropout_.kept(keys.first + n, i), x, Vec{}) : x;
    };
    for (int64_t n = 0; n < keys.count;) {
      const int64_t end = least(n + kSummed, keys.count);
      if (scores_.pairs()) {
        for (; n < end; n += 2) {
          const Vec even = weight(n), odd = n + 1 < end ? weight(n + 1) : Vec{};
          store(pairs(weights_) + n / 2 * lanes + i * kWidth, pair_up(even, odd));
        }
      } else {
        for (; n < end; n++) store(at + n * lanes, weight(n));
      }
      total += part, part = Vec{};
      moment += part_moment, part_moment = Vec{};
    }
    if (kWay != Way::Sigmoid) total_[i] += total;
    moment_[i] += moment;
  }

  // What a sigmoid makes of the scores does not tell their log-sum-exp.
  void follow(const Queries& q, const Keys& keys, Vec before, int i) {
    base_[i] = where(greater(best_[i], fill(-kInfinity)), best_[i], Vec{});
    Vec total{};
    for (int64_t n = 0; n < keys.count;) {
      Vec part{};
      for (const int64_t end = least(n + kSummed, keys.count); n < end; n++) part += exp2(load(weights_ + n * q.lanes() + i * kWidth) - base_[i], unit_);
      total += part;
    }
    total_[i] = fma(total_[i], exp2(before - base_[i], unit_), total);
  }

  // Looks at the weights of the tile, from the peaks of its rows and what their sums leave of a weight.
  void look(const Queries& q, const float* peak, const float* inverse) {
    const float* weights = strip_;
    for (int64_t n = 0; n < run_count_; n++) {
      const Run& run = runs_[n];
      Vec factor[kMostVectors];
      for (int i = run.keys.from; i < run.keys.upto; i++)
        factor[i] = p_.normalizer == Normalizer::Softmax ? exp2_far(run.base[i] - load(peak + i * kWidth), unit_) * load(inverse + i * kWidth) : fill(1.0f);
      views_.add(q, run.keys, weights, factor);
      weights += run.keys.count * q.lanes();
    }
    views_.finish(q);
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
    if (views_) look(q, peak, inverse);
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

  const Problem& p_;
  const Outputs& o_;
  Scores scores_;
  float* turned_;   // q, turned
  float* weights_;  // (keys, lanes)
  float* values_;   // values as floats, where they are of another type, or in pairs of keys
  int32_t* packed_;  // of which head the values of each tile of keys are there in pairs, counted from 1
  float* sums_;     // (E, lanes)
  Vec unit_;
  const bool rounded_;  // weights are good for no more than to be rounded to bfloat16
  Top top_;
  Views views_;
  float* strip_;  // (keys, lanes): the weights of a tile, in runs of keys
  Run* runs_;
  int64_t run_count_ = 0, kept_ = 0;
  Dropout dropout_;
  // Of each query: the largest score; the same, but never -inf, as what is subtracted; the sum of 2^x, where x = unit *
  // (score - base), and the sum of x 2^x.
  Vec best_[kMostVectors], base_[kMostVectors], total_[kMostVectors], moment_[kMostVectors];
};

}  // namespace regard::REGARD_SET
