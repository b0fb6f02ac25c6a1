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
      for (int64_t n = 0; n < keys.count; n++)
        for (int64_t at = n * lanes + keys.from * kWidth; at < n * lanes + keys.upto * kWidth; at += kWidth) store(slopes + at, load(slopes + at) * load(caps + at));
    if (g_.dquery_bias) add_up(row_sum, q, keys, slopes);
    if (g_.dkey_bias) {
      float* to = dkey_bias_ + keys.first;
      for (int64_t n = 0; n < keys.count; n++) {
        Vec total{};
        for (int i = keys.from; i < keys.upto; i++) total += load(slopes + n * lanes + i * kWidth);
        to[n] += sum(total);
      }
    }
  }

  static void add_up(float* to, const Queries& q, const Keys& keys, const float* slopes) {
    for (int i = keys.from; i < keys.upto; i++) {
      Vec total{};
      for (int64_t n = 0; n < keys.count; n++) total += load(slopes + n * q.lanes() + i * kWidth);
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
      for (int i = keys.from; i < keys.upto; i++) {
        auto* at = reinterpret_cast<AnyDouble*>(table - (keys.first + n) + i * kWidth);
        *at += __builtin_convertvector(load(slopes + n * q.lanes() + i * kWidth), Double);
      }
  }

  void add_table(const Queries& q, const Keys& keys, const float* slopes) const {
    float* at = dbias_ + q.b * g_.dbias_batch + q.h * g_.dbias_head + q.first * g_.dbias_query + keys.first * g_.dbias_key;
    const int64_t from = keys.from * kWidth, queries = keys.queries(q);
    if (g_.dbias_query && g_.dbias_key) return add_turned(slopes + from, q.lanes(), keys.count, queries, at + from * g_.dbias_query, g_.dbias_query);
    // What goes to one number is summed up here first: one long sum would round more.
    Vec sums[kMostVectors] = {};
    for (int64_t n = 0; n < keys.count; n++) {
      for (int i = keys.from; i < keys.upto; i++) sums[i] += load(slopes + n * q.lanes() + i * kWidth);
      if (!g_.dbias_key && n + 1 < keys.count) continue;
      if (g_.dbias_query) {
        for (int64_t i = from; i < from + queries; i++) at[i * g_.dbias_query] += sums[i / kWidth][i % kWidth];
      } else {
        Vec total{};
        for (int i = keys.from; i < keys.upto; i++) total += sums[i];
        at[n * g_.dbias_key] += sum(total);
      }
      for (Vec& x : sums) x = Vec{};
    }
  }

  // to[i * row + n] += from[n * lanes + i]
  static void add_turned(const float* from, int64_t lanes, int64_t keys, int64_t queries, float* to, int64_t row) {
    for (int64_t n = 0; n < keys; n += kWidth)
      for (int64_t i = 0; i < queries; i += kWidth) {
        const int columns = static_cast<int>(least(kWidth, keys - n));
        Vec square[kWidth];
#pragma GCC unroll 16
        for (int r = 0; r < kWidth; r++) square[r] = r < columns ? load(from + (n + r) * lanes + i) : Vec{};
        transpose(square);
        for (int r = 0; r < kWidth && i + r < queries; r++) {
          float* at = to + (i + r) * row + n;
          store_some(at, load_some(at, columns) + square[r], columns);
        }
      }
  }

  const Problem& p_;
  const Gradients& g_;
  double* drelative_ = nullptr;
  float *dkey_bias_ = nullptr, *dbias_ = nullptr;
};

}  // namespace regard::REGARD_SET
