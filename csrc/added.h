// The gradients of all that is added to the scores, from the slopes dS of some queries and some keys.
#pragma once

#include "tile.h"

namespace regard::REGARD_SET {

class Added {
 public:
  Added(const Problem& p, const Gradients& g) : p_(p), g_(g) {}

  // Is there anything to be done?
  bool is_wanted() const { return drelative_ || dbias_ || g_.dquery_bias || g_.dkey_bias; }

  // Where to: of one key/value head, the sums by key, and by distance for its heads; and the gradient of a bias. Null where
  // not asked for.
  void set(float* dkey_bias, double* drelative, float* dbias) { dkey_bias_ = dkey_bias, drelative_ = drelative, dbias_ = dbias; }

  // slopes (keys, lanes). Those of the softcap, `caps`, are put to them: some of the terms stand before it, others after.
  // The terms before it that belong to queries are summed up in `row_sum` (lanes).
  void add(const Queries& q, const Keys& keys, float* slopes, const float* caps, float* row_sum) const {
    const int64_t lanes = q.lanes();
    if (drelative_) add_relative(q, keys, slopes);
    if (dbias_) add_table(q, keys, slopes);
    if (caps)
      for (int64_t at = 0; at < keys.count * lanes; at += kWidth) store(slopes + at, load(slopes + at) * load(caps + at));
    if (g_.dquery_bias) add_up(row_sum, q, keys.count, slopes);
    if (g_.dkey_bias) {
      float* to = dkey_bias_ + keys.first;
      for (int64_t n = 0; n < keys.count; n++) {
        Vec total{};
        for (int i = 0; i < q.vectors; i++) total += load(slopes + n * lanes + i * kWidth);
        to[n] += sum(total);
      }
    }
  }

  static void add_up(float* to, const Queries& q, int64_t count, const float* slopes) {
    for (int i = 0; i < q.vectors; i++) {
      Vec total{};
      for (int64_t n = 0; n < count; n++) total += load(slopes + n * q.lanes() + i * kWidth);
      store(to + i * kWidth, load(to + i * kWidth) + total);
    }
  }

 private:
  // In double: the slope of ALiBi sums these numbers up once more, each times its distance, and what is left is small.
  void add_relative(const Queries& q, const Keys& keys, const float* slopes) const {
    using Double = double __attribute__((vector_size(8 * kWidth)));
    using AnyDouble = double __attribute__((vector_size(8 * kWidth), aligned(8), may_alias));
    double* table = drelative_ + (q.h % p_.repeats()) * relative_numbers(p_) + q.first + p_.S - 1;
    for (int64_t n = 0; n < keys.count; n++)
      for (int i = 0; i < q.vectors; i++) {
        auto* at = reinterpret_cast<AnyDouble*>(table - (keys.first + n) + i * kWidth);
        *at += __builtin_convertvector(load(slopes + n * q.lanes() + i * kWidth), Double);
      }
  }

  void add_table(const Queries& q, const Keys& keys, const float* slopes) const {
    float* at = dbias_ + q.b * g_.dbias_batch + q.h * g_.dbias_head + q.first * g_.dbias_query + keys.first * g_.dbias_key;
    if (g_.dbias_query && g_.dbias_key) {
      for (int64_t n = 0; n < keys.count; n++)
        for (int i = 0; i < q.count; i++) at[i * g_.dbias_query + n * g_.dbias_key] += slopes[n * q.lanes() + i];
      return;
    }
    // What goes to one number is summed up here first: one long sum would round more.
    Vec sums[kMostVectors] = {};
    for (int64_t n = 0; n < keys.count; n++) {
      for (int i = 0; i < q.vectors; i++) sums[i] += load(slopes + n * q.lanes() + i * kWidth);
      if (!g_.dbias_key && n + 1 < keys.count) continue;
      if (g_.dbias_query) {
        for (int i = 0; i < q.count; i++) at[i * g_.dbias_query] += sums[i / kWidth][i % kWidth];
      } else {
        for (int i = 1; i < q.vectors; i++) sums[0] += sums[i];
        at[n * g_.dbias_key] += sum(sums[0]);
      }
      for (int i = 0; i < q.vectors; i++) sums[i] = Vec{};
    }
  }

  const Problem& p_;
  const Gradients& g_;
  double* drelative_ = nullptr;
  float *dkey_bias_ = nullptr, *dbias_ = nullptr;
};

}  // namespace regard::REGARD_SET
