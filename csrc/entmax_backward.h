// Backward pass of entmax, from tau and its correction per row:
//
//   dV = P^T dO     dP = dO V^T     dS = P' (dP - mean of dP weighted by P')     dQ = dS K     dK = dS^T Q
//
// where P' = P^(2 - alpha) on the support. The mean needs a whole row before the first dS. A score panel holds the row;
// after it is compacted to the keys that have a nonzero weight for some query of the tile, all five products run over
// these keys only.
#pragma once

#include "bias_grad.h"
#include "dropout.h"
#include "grad_sums.h"
#include "score_panel.h"

namespace regard::REGARD_SET {

class EntmaxBackward {
 public:
  EntmaxBackward(const Problem& p, const Gradients& g, Scratch& scratch)
      : p_(p),
        g_(g),
        D_(padded(p.D)),
        E_(padded(p.E)),
        scores_(p, scratch.take(Scores::scratch(p, kBackwardKeys, true)), kBackwardKeys, true),
        entmax_(p, scores_.scale()),
        panel_(p, scratch, has_softcap(p)),
        bias_grad_(p, g),
        ds_(scratch.take(p.S * kTile)),
        block_(scratch.take(kBackwardKeys * kTile)),
        block_softcap_grad_(scratch.take(has_softcap(p) ? kBackwardKeys * kTile : 0)),
        rows_(scratch.take(kBackwardKeys * max64(D_, E_))),
        q_transposed_(scratch.take(kTile * Scores::query_width(p))),
        dq_(scratch.take(kTile * Scores::query_width(p))),
        q_(scratch.take(kTile * D_)),
        dout_(scratch.take(kTile * E_)),
        dout_transposed_(scratch.take(kTile * p.E)) {}

  static int64_t scratch(const Problem& p) {
    const int64_t D = padded(p.D), E = padded(p.E), softcap_grad = has_softcap(p) ? 1 : 0;
    return Scores::scratch(p, kBackwardKeys, true) + ScorePanel::scratch(p, softcap_grad) + p.S * kTile +
           kBackwardKeys * ((1 + softcap_grad) * kTile + max64(D, E)) +
           kTile * (2 * Scores::query_width(p) + D + E + p.E);
  }

  // See Backward::run.
  void run(int64_t b, int64_t g, int64_t split, int64_t num_splits, float* sums, double* doubles, float* dbias) {
    dk_ = sums, dv_ = sums + p_.S * D_;
    bias_grad_.set(dv_ + p_.S * E_, g_.drelative ? doubles : nullptr, dbias);
    dweight_ = doubles + (g_.drelative ? p_.repeats() * relative_size(p_) : 0);
    zero_floats(sums, GradSums::floats(p_));
    for (int64_t h = g * p_.repeats(); h < (g + 1) * p_.repeats(); h++)
      for (int64_t first = split * kTile; first < p_.L; first += num_splits * kTile) tile(QueryTile(p_, b, h, first));
  }

 private:
  static bool has_softcap(const Problem& p) { return p.softcap > 0.0f; }

  void tile(const QueryTile& q) {
    start(q);
    const int64_t count = panel_.count();
    for (int64_t n = 0; n < count; n += kBackwardKeys) compute_dp(q, n, min64(kBackwardKeys, count - n));
    for (int i = 0; i < q.vectors; i++)
      mean_dp_[i] = where(greater(derivative_sum_[i], Vec{}), dp_sum_[i] / derivative_sum_[i], Vec{});
    for (int64_t n = 0; n < count; n += kBackwardKeys) compute_ds(q, n, min64(kBackwardKeys, count - n));
    if (p_.weight || bias_grad_.is_wanted()) scatter(q);
    if (!p_.weight)
      for (int64_t n = 0; n < count; n += kBackwardKeys) accumulate_dk_dq(q, n, min64(kBackwardKeys, count - n));
    finish(q);
  }

  void start(const QueryTile& q) {
    alignas(64) float tau[kTile], correction[kTile], scale[kTile], keep_scale[kTile];
    const int64_t row = (q.b * p_.H + q.h) * p_.L + q.first;
    // Lanes without a query have zero weights.
    for (int i = 0; i < kTile; i++)
      tau[i] = kInfinity, correction[i] = 0.0f, scale[i] = p_.scale, keep_scale[i] = p_.keep_scale;
    for (int i = 0; i < q.count; i++) tau[i] = g_.row_max[row + i], correction[i] = g_.inverse_sum[row + i];
    for (int i = 0; i < q.vectors; i++) derivative_sum_[i] = Vec{}, dp_sum_[i] = Vec{};
    if (p_.has_dropout) dropout_.set(p_, q.b, q.h, q.first, q.count);
    scores_.load_queries(q, q_transposed_);
    if (!p_.weight) copy_rows(p_.q, q.b, q.h, q.first, q.count, p_.D, scale, q_, D_);
    copy_rows(g_.dout, q.b, q.h, q.first, q.count, p_.E, keep_scale, dout_, E_);
    transpose_rows({reinterpret_cast<char*>(dout_), 0, 0, E_, Type::Float}, 0, 0, 0, q.count, p_.E, dout_transposed_,
                   q.lanes());
    zero_floats(dq_, p_.D * q.lanes());
    zero_floats(row_sum_, q.lanes());
    Vec unused[kMaxVectors];
    panel_.fill(scores_, q, q_transposed_, kBackwardKeys, unused, [](const KeyBlock&, const float*) {});
    panel_.compact(entmax_, q, tau, correction, [](int64_t) {});
  }

  // Computes dP, and accumulates its weighted mean.
  void compute_dp(const QueryTile& q, int64_t first, int64_t count) {
    const FloatRows v = panel_.gather(p_.v, q, first, count, p_.E, rows_);
    gemm<false>(count, q.vectors, p_.E, Strided<float>{v.data, v.row, 1}, dout_transposed_, q.lanes(),
                ds_ + first * q.lanes(), q.lanes());
    entmax_.by_power([&](auto power) {
      for (int i = 0; i < q.vectors; i++) {
        // Per block: a sum of partial sums rounds less than one long sum.
        Vec derivative_sum{}, dp_sum{};
        for (int64_t n = first; n < first + count; n++) {
          float* at = ds_ + n * q.lanes() + i * kWidth;
          const Vec one = entmax_.to_weight<decltype(power)::kValue>(load(panel_.row(n) + i * kWidth)).derivative;
          Vec dp = load(at);
          if (p_.has_dropout) store(at, dp = where(dropout_.kept_lanes(panel_.key(n), i), dp, Vec{}));
          derivative_sum += one, dp_sum = fma(one, dp, dp_sum);
        }
        derivative_sum_[i] += derivative_sum, dp_sum_[i] += dp_sum;
      }
    });
  }

  // Replaces gaps by P and dP by dS; accumulates dV.
  void compute_ds(const QueryTile& q, int64_t first, int64_t count) {
    entmax_.by_power([&](auto power) {
      for (int i = 0; i < q.vectors; i++)
        for (int64_t n = first; n < first + count; n++) {
          float *weight = panel_.row(n) + i * kWidth, *at = ds_ + n * q.lanes() + i * kWidth;
          const Entmax::WeightDerivative one = entmax_.to_weight<decltype(power)::kValue>(load(weight));
          store(weight, p_.has_dropout ? where(dropout_.kept_lanes(panel_.key(n), i), one.weight, Vec{}) : one.weight);
          store(at, one.derivative * (load(at) - mean_dp_[i]));
        }
    });
    add_rows(q, first, count, panel_.row(first), dout_, E_, dv_);
  }

  // Scatters dS into dense key blocks, with 0 for keys without a weight, and computes the gradients of the biases, and
  // all gradients of an additive score.
  void scatter(const QueryTile& q) {
    const int64_t lanes = q.lanes();
    for (int64_t n = 0; n < panel_.count();) {
      const int64_t first = panel_.key(n) / kBackwardKeys * kBackwardKeys;
      const KeyBlock keys{first, min64(kBackwardKeys, p_.S - first), false, 0, q.vectors, nullptr};
      zero_floats(block_, keys.count * lanes);
      if (has_softcap(p_)) zero_floats(block_softcap_grad_, keys.count * lanes);
      for (; n < panel_.count() && panel_.key(n) < keys.first + keys.count; n++) {
        const int64_t to = (panel_.key(n) - keys.first) * lanes;
        for (int64_t i = 0; i < lanes; i += kWidth) {
          store(block_ + to + i, load(ds_ + n * lanes + i));
          if (has_softcap(p_)) store(block_softcap_grad_ + to + i, load(panel_.softcap_grad(n) + i));
        }
      }
      bias_grad_.add(q, keys, block_, has_softcap(p_) ? block_softcap_grad_ : nullptr, row_sum_);
      if (p_.weight)
        scores_.additive().backward(q, q_transposed_, keys, block_, dq_, dk_ + keys.first * D_, D_,
                                    dweight_ + q.h % p_.repeats() * p_.D);
    }
  }

  // Accumulates dK and dQ.
  void accumulate_dk_dq(const QueryTile& q, int64_t first, int64_t count) {
    float* ds = ds_ + first * q.lanes();
    if (has_softcap(p_))
      for (int64_t at = 0; at < count * q.lanes(); at += kWidth)
        store(ds + at, load(ds + at) * load(panel_.softcap_grad(first) + at));
    add_rows(q, first, count, ds, q_, D_, dk_);
    const FloatRows k = panel_.gather(p_.k, q, first, count, p_.D, rows_);
    gemm<true>(p_.D, q.vectors, count, Strided<float>{k.data, 1, k.row}, ds, q.lanes(), dq_, q.lanes());
  }

  // to (S, width) += matrix (keys, lanes) rows (lanes, width), for some keys of the panel.
  void add_rows(const QueryTile& q, int64_t first, int64_t count, const float* matrix, const float* rows, int64_t width,
                float* to) {
    const int vectors = static_cast<int>(width / kWidth);
    if (panel_.is_run(first, count))
      return gemm<true>(count, vectors, q.count, Strided<float>{matrix, q.lanes(), 1}, rows, width,
                        to + panel_.key(first) * width, width);
    gemm<false>(count, vectors, q.count, Strided<float>{matrix, q.lanes(), 1}, rows, width, rows_, width);
    for (int64_t n = 0; n < count; n++)
      for (int64_t c = 0; c < width; c += kWidth) {
        float* at = to + panel_.key(first + n) * width + c;
        store(at, load(at) + load(rows_ + n * width + c));
      }
  }

  void finish(const QueryTile& q) {
    const int64_t row = (q.b * p_.H + q.h) * p_.L + q.first;
    if (g_.dq.data) {
      alignas(64) float scale[kTile];
      for (float& x : scale) x = p_.scale;
      transpose_back(dq_, q.lanes(), scale, p_.D, g_.dq, q.b, q.h, q.first, q.count);
    }
    if (g_.dquery_bias)
      for (int i = 0; i < q.count; i++) g_.dquery_bias[row + i] = row_sum_[i];
  }

  const Problem& p_;
  const Gradients& g_;
  const int64_t D_, E_;  // padded widths
  Scores scores_;
  Entmax entmax_;
  ScorePanel panel_;
  BiasGrad bias_grad_;
  float* ds_;                           // (keys, lanes), parallel to the panel
  float *block_, *block_softcap_grad_;  // (keys, lanes), dense blocks of keys
  float* rows_;                         // (keys, width): keys, values, or an addend of their gradients
  float *q_transposed_, *dq_;           // (width, lanes)
  float *q_, *dout_;                    // (queries, width)
  float* dout_transposed_;              // (E, lanes)
  Dropout dropout_;
  alignas(64) float row_sum_[kTile];
  // Per query: the sum of P', the sum of P' dP, and their quotient.
  Vec derivative_sum_[kMaxVectors], dp_sum_[kMaxVectors], mean_dp_[kMaxVectors];
  float *dk_ = nullptr, *dv_ = nullptr;
  double* dweight_ = nullptr;
};

}  // namespace regard::REGARD_SET
