// The gradients where the weights come by a threshold, from the same two numbers of each row that tell it:
//
//   dV = P^T dO     dP = dO V^T     dS = P' (dP - the mean of dP by P')     dQ = dS K     dK = dS^T Q
//
// where P' = P^(2 - alpha) on the support. That mean needs a whole row before the first dS. A strip holds it, and once it is
// narrowed to the keys that some query of the tile gives a weight, all five products are done for these keys alone.
#pragma once

#include "added.h"
#include "backward.h"
#include "strip.h"

namespace regard::REGARD_SET {

class SparseBackward {
 public:
  SparseBackward(const Problem& p, const Gradients& g, Scratch& scratch)
      : p_(p),
        g_(g),
        D_(padded(p.D)),
        E_(padded(p.E)),
        scores_(p, scratch.take(Scores::scratch(p, kKeys, true)), kKeys, true),
        threshold_(p, scores_.scale()),
        strip_(p, scratch, has_caps(p)),
        added_(p, g),
        slopes_(scratch.take(p.S * kTile)),
        block_(scratch.take(kKeys * kTile)),
        block_caps_(scratch.take(has_caps(p) ? kKeys * kTile : 0)),
        rows_(scratch.take(kKeys * most(D_, E_))),
        turned_(scratch.take(kTile * Scores::turned(p))),
        dq_(scratch.take(kTile * Scores::turned(p))),
        q_(scratch.take(kTile * D_)),
        dout_(scratch.take(kTile * E_)),
        dout_turned_(scratch.take(kTile * p.E)) {}

  static int64_t scratch(const Problem& p) {
    const int64_t D = padded(p.D), E = padded(p.E), caps = has_caps(p) ? 1 : 0;
    return Scores::scratch(p, kKeys, true) + Strip::scratch(p, caps) + p.S * kTile + kKeys * ((1 + caps) * kTile + most(D, E)) + kTile * (2 * Scores::turned(p) + D + E + p.E);
  }

  // As Backward::run.
  void run(int64_t b, int64_t g, int64_t share, int64_t shares, float* sums, double* doubles, float* dbias) {
    dk_ = sums, dv_ = sums + p_.S * D_;
    added_.set(dv_ + p_.S * E_, g_.drelative ? doubles : nullptr, dbias);
    dweight_ = doubles + (g_.drelative ? p_.repeats() * relative_numbers(p_) : 0);
    zero(sums, Backward::sums(p_));
    for (int64_t h = g * p_.repeats(); h < (g + 1) * p_.repeats(); h++)
      for (int64_t first = share * kTile; first < p_.L; first += shares * kTile) tile(Queries(p_, b, h, first));
  }

 private:
  static bool has_caps(const Problem& p) { return p.softcap > 0.0f; }

  static void zero(float* at, int64_t numbers) {
    for (int64_t n = 0; n < numbers; n += kWidth) store(at + n, Vec{});
  }

  void tile(const Queries& q) {
    start(q);
    const int64_t count = strip_.count();
    for (int64_t n = 0; n < count; n += kKeys) pull(q, n, least(kKeys, count - n));
    for (int i = 0; i < q.vectors; i++) mean_[i] = where(greater(slope_[i], Vec{}), moment_[i] / slope_[i], Vec{});
    for (int64_t n = 0; n < count; n += kKeys) weigh(q, n, least(kKeys, count - n));
    if (p_.weight || added_.is_wanted()) spread(q);
    if (!p_.weight)
      for (int64_t n = 0; n < count; n += kKeys) push(q, n, least(kKeys, count - n));
    finish(q);
  }

  void start(const Queries& q) {
    alignas(64) float at[kTile], rest[kTile], scale[kTile], kept[kTile];
    const int64_t row = (q.b * p_.H + q.h) * p_.L + q.first;
    // Lanes without a query have no weights.
    for (int i = 0; i < kTile; i++) at[i] = kInfinity, rest[i] = 0.0f, scale[i] = p_.scale, kept[i] = p_.kept;
    for (int i = 0; i < q.count; i++) at[i] = g_.peak[row + i], rest[i] = g_.total[row + i];
    for (int i = 0; i < q.vectors; i++) slope_[i] = Vec{}, moment_[i] = Vec{};
    if (p_.drops) dropout_.set(p_, q.b, q.h, q.first, q.count);
    scores_.turn_queries(q, turned_);
    if (!p_.weight) copy_rows(p_.q, q.b, q.h, q.first, q.count, p_.D, scale, q_, D_);
    copy_rows(g_.dout, q.b, q.h, q.first, q.count, p_.E, kept, dout_, E_);
    turn({reinterpret_cast<char*>(dout_), 0, 0, E_, Type::Float}, 0, 0, 0, q.count, p_.E, dout_turned_, q.lanes());
    zero(dq_, p_.D * q.lanes());
    zero(row_sum_, q.lanes());
    Vec unused[kMostVectors];
    strip_.fill(scores_, q, turned_, kKeys, unused, [](const Keys&, const float*) {});
    strip_.narrow(threshold_, q, at, rest, [](int64_t) {});
  }

  // dP, and what its mean is made of.
  void pull(const Queries& q, int64_t first, int64_t count) {
    const FloatRows v = strip_.gather(p_.v, q, first, count, p_.E, rows_);
    product<false>(count, q.vectors, p_.E, Strided<float>{v.data, v.row, 1}, dout_turned_, q.lanes(), slopes_ + first * q.lanes(), q.lanes());
    threshold_.by_power([&](auto power) {
      for (int i = 0; i < q.vectors; i++) {
        // By blocks: the sum of sums rounds less than one long sum.
        Vec slope{}, moment{};
        for (int64_t n = first; n < first + count; n++) {
          float* at = slopes_ + n * q.lanes() + i * kWidth;
          const Vec one = threshold_.worth<decltype(power)::kValue>(load(strip_.row(n) + i * kWidth)).slope;
          Vec dp = load(at);
          if (p_.drops) store(at, dp = where(dropout_.kept(strip_.key(n), i), dp, Vec{}));
          slope += one, moment = fma(one, dp, moment);
        }
        slope_[i] += slope, moment_[i] += moment;
      }
    });
  }

  // P in the place of the gaps, dS in that of dP; and dV.
  void weigh(const Queries& q, int64_t first, int64_t count) {
    threshold_.by_power([&](auto power) {
      for (int i = 0; i < q.vectors; i++)
        for (int64_t n = first; n < first + count; n++) {
          float *weight = strip_.row(n) + i * kWidth, *at = slopes_ + n * q.lanes() + i * kWidth;
          const Threshold::Worth one = threshold_.worth<decltype(power)::kValue>(load(weight));
          store(weight, p_.drops ? where(dropout_.kept(strip_.key(n), i), one.weight, Vec{}) : one.weight);
          store(at, one.slope * (load(at) - mean_[i]));
        }
    });
    add_rows(q, first, count, strip_.row(first), dout_, E_, dv_);
  }

  // Laid out again by runs of keys, with 0 for those without a weight: the gradients of all but q and k, and all of those
  // of an additive score.
  void spread(const Queries& q) {
    const int64_t lanes = q.lanes();
    for (int64_t n = 0; n < strip_.count();) {
      const Keys keys{strip_.key(n) / kKeys * kKeys, least(kKeys, p_.S - strip_.key(n) / kKeys * kKeys), false, 0, q.vectors, nullptr};
      zero(block_, keys.count * lanes);
      if (has_caps(p_)) zero(block_caps_, keys.count * lanes);
      for (; n < strip_.count() && strip_.key(n) < keys.first + keys.count; n++) {
        const int64_t to = (strip_.key(n) - keys.first) * lanes;
        for (int64_t i = 0; i < lanes; i += kWidth) {
          store(block_ + to + i, load(slopes_ + n * lanes + i));
          if (has_caps(p_)) store(block_caps_ + to + i, load(strip_.caps(n) + i));
        }
      }
      added_.add(q, keys, block_, has_caps(p_) ? block_caps_ : nullptr, row_sum_);
      if (p_.weight) scores_.additive().pull(q, turned_, keys, block_, dq_, dk_ + keys.first * D_, D_, dweight_ + q.h % p_.repeats() * p_.D);
    }
  }

  // dK and dQ.
  void push(const Queries& q, int64_t first, int64_t count) {
    float* slopes = slopes_ + first * q.lanes();
    if (has_caps(p_))
      for (int64_t at = 0; at < count * q.lanes(); at += kWidth) store(slopes + at, load(slopes + at) * load(strip_.caps(first) + at));
    add_rows(q, first, count, slopes, q_, D_, dk_);
    const FloatRows k = strip_.gather(p_.k, q, first, count, p_.D, rows_);
    product<true>(p_.D, q.vectors, count, Strided<float>{k.data, 1, k.row}, slopes, q.lanes(), dq_, q.lanes());
  }

  // to (S, width) += numbers (keys, lanes) rows (lanes, width), for some keys of the strip.
  void add_rows(const Queries& q, int64_t first, int64_t count, const float* numbers, const float* rows, int64_t width, float* to) {
    const int vectors = static_cast<int>(width / kWidth);
    if (strip_.is_run(first, count)) return product<true>(count, vectors, q.count, Strided<float>{numbers, q.lanes(), 1}, rows, width, to + strip_.key(first) * width, width);
    product<false>(count, vectors, q.count, Strided<float>{numbers, q.lanes(), 1}, rows, width, rows_, width);
    for (int64_t n = 0; n < count; n++)
      for (int64_t c = 0; c < width; c += kWidth) {
        float* at = to + strip_.key(first + n) * width + c;
        store(at, load(at) + load(rows_ + n * width + c));
      }
  }

  void finish(const Queries& q) {
    const int64_t row = (q.b * p_.H + q.h) * p_.L + q.first;
    if (g_.dq.data) {
      alignas(64) float scale[kTile];
      for (float& x : scale) x = p_.scale;
      turn_back(dq_, q.lanes(), scale, p_.D, g_.dq, q.b, q.h, q.first, q.count);
    }
    if (g_.dquery_bias)
      for (int i = 0; i < q.count; i++) g_.dquery_bias[row + i] = row_sum_[i];
  }

  const Problem& p_;
  const Gradients& g_;
  const int64_t D_, E_;  // widths in whole vectors
  Scores scores_;
  Threshold threshold_;
  Strip strip_;
  Added added_;
  float* slopes_;              // (keys, lanes), as the strip
  float *block_, *block_caps_;  // (keys, lanes), of a run of keys
  float* rows_;                // keys, values, or what is to be added to their gradients
  float *turned_, *dq_;        // (width, lanes)
  float *q_, *dout_;           // (queries, width)
  float* dout_turned_;         // (E, lanes)
  Dropout dropout_;
  alignas(64) float row_sum_[kTile];
  // Of each query: the sum of P', that of P' dP, and the mean.
  Vec slope_[kMostVectors], moment_[kMostVectors], mean_[kMostVectors];
  float *dk_ = nullptr, *dv_ = nullptr;
  double* dweight_ = nullptr;
};

}  // namespace regard::REGARD_SET
