// The gradients of all biases, from dS of some queries and some keys.
#pragma once

#include "tile.h"

namespace regard::REGARD_SET {

class BiasGrad {
 public:
  BiasGrad(const Problem& p, const Gradients& g) : p_(p), g_(g) {}

  // Whether any bias needs a gradient.
  bool is_wanted() const { return drelative_ || dbias_ || g_.dquery_bias || g_.dkey_bias; }

  // Sets the destinations: for one key/value head, the sums by key and, for its query heads, by distance; and the
  // gradient of a bias tensor. Null if not requested.
  void set(float* dkey_bias, double* drelative, float* dbias) {
    dkey_bias_ = dkey_bias, drelative_ = drelative, dbias_ = dbias;
  }

  // ds: (keys, lanes). Biases after the softcap use it as it is; then it is multiplied by `softcap_grad` for those
  // before. The gradient of the query bias accumulates in `row_sum` (lanes).
  void add(const QueryTile& q, const KeyBlock& keys, float* ds, const float* softcap_grad, float* row_sum) const {
    const int64_t lanes = q.lanes();
    if (drelative_) add_relative(q, keys, ds);
    if (dbias_) add_table(q, keys, ds);
    if (softcap_grad)
      for (int64_t n = 0; n < keys.count; n++)
        for (int64_t at = n * lanes + keys.from * kWidth; at < n * lanes + keys.until * kWidth; at += kWidth)
          store(ds + at, load(ds + at) * load(softcap_grad + at));
    if (g_.dquery_bias) add_over_keys(row_sum, q, keys, ds);
    if (g_.dkey_bias) {
      float* to = dkey_bias_ + keys.first;
      for (int64_t n = 0; n < keys.count; n++) {
        Vec total{};
        for (int i = keys.from; i < keys.until; i++) total += load(ds + n * lanes + i * kWidth);
        to[n] += sum(total);
      }
    }
  }

  static void add_over_keys(float* to, const QueryTile& q, const KeyBlock& keys, const float* ds) {
    for (int i = keys.from; i < keys.until; i++) {
      Vec total{};
      for (int64_t n = 0; n < keys.count; n++) total += load(ds + n * q.lanes() + i * kWidth);
      store(to + i * kWidth, load(to + i * kWidth) + total);
    }
  }

 private:
  // In double: the gradient of an ALiBi slope sums these values weighted by distance, with much cancellation.
  void add_relative(const QueryTile& q, const KeyBlock& keys, const float* ds) const {
    using Double = double __attribute__((vector_size(8 * kWidth)));
    using AnyDouble = double __attribute__((vector_size(8 * kWidth), aligned(8), may_alias));
    double* table = drelative_ + (q.h % p_.repeats()) * relative_size(p_) + q.first + p_.S - 1;
    for (int64_t n = 0; n < keys.count; n++)
      for (int i = keys.from; i < keys.until; i++) {
        auto* at = reinterpret_cast<AnyDouble*>(table - (keys.first + n) + i * kWidth);
        *at += __builtin_convertvector(load(ds + n * q.lanes() + i * kWidth), Double);
      }
  }

  void add_table(const QueryTile& q, const KeyBlock& keys, const float* ds) const {
    float* at =
        dbias_ + q.b * g_.dbias_batch + q.h * g_.dbias_head + q.first * g_.dbias_query + keys.first * g_.dbias_key;
    const int64_t from = keys.from * kWidth, queries = keys.queries(q);
    if (g_.dbias_query && g_.dbias_key)
      return add_transposed(ds + from, q.lanes(), keys.count, queries, at + from * g_.dbias_query, g_.dbias_query);
    // Sum up what goes to one element first: one long sum would round more.
    Vec sums[kMaxVectors] = {};
    for (int64_t n = 0; n < keys.count; n++) {
      for (int i = keys.from; i < keys.until; i++) sums[i] += load(ds + n * q.lanes() + i * kWidth);
      if (!g_.dbias_key && n + 1 < keys.count) continue;
      if (g_.dbias_query) {
        for (int64_t i = from; i < from + queries; i++) at[i * g_.dbias_query] += sums[i / kWidth][i % kWidth];
      } else {
        Vec total{};
        for (int i = keys.from; i < keys.until; i++) total += sums[i];
        at[n * g_.dbias_key] += sum(total);
      }
      for (Vec& x : sums) x = Vec{};
    }
  }

  // to[i * row + n] += from[n * lanes + i]
  static void add_transposed(const float* from, int64_t lanes, int64_t keys, int64_t queries, float* to, int64_t row) {
    for (int64_t n = 0; n < keys; n += kWidth)
      for (int64_t i = 0; i < queries; i += kWidth) {
        const int columns = static_cast<int>(min64(kWidth, keys - n));
        Vec square[kWidth];
#pragma GCC unroll 16
        for (int r = 0; r < kWidth; r++) square[r] = r < columns ? load(from + (n + r) * lanes + i) : Vec{};
        transpose(square);
        for (int r = 0; r < kWidth && i + r < queries; r++) {
          float* at = to + (i + r) * row + n;
          store_partial(at, load_partial(at, columns) + square[r], columns);
        }
      }
  }

  const Problem& p_;
  const Gradients& g_;
  double* drelative_ = nullptr;
  float *dkey_bias_ = nullptr, *dbias_ = nullptr;
};

}  // namespace regard::REGARD_SET
