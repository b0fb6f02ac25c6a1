// Stage 1: the scores of a tile of queries with some keys, laid out keys by queries.
//
// Queries lie in the lanes: only they are turned, once a tile, while keys and values are read as they are, number by
// number. What follows works down the lanes, with no sum across them.
#pragma once

#include "additive.h"
#include "pairs.h"
#include "product.h"

namespace regard::REGARD_SET {

// The largest score of each lane, as `finish` of the scores.
template <class Rows>
REGARD_INLINE void raise(Vec& best, Rows& x) {
  Vec high = best;
  each_row(0, x, [&](int64_t, Vec& score) __attribute__((always_inline)) { high = max(high, score); });
  best = high;
}

class Scores {
 public:
  // Numbers of scratch for blocks of `longest` keys; `pulls` where gradients are wanted.
  static int64_t scratch(const Problem& p, int64_t longest, bool pulls = false) {
    return rows(p, longest) + Additive::scratch(p, pulls);
  }

  // Numbers a lane of turned queries.
  static int64_t turned(const Problem& p) { return p.weight ? Additive::padded(p.D) : p.D; }

  Scores(const Problem& p, float* scratch, int64_t longest, bool pulls = false)
      : p_(p),
        mask_(p.mask, p.mask_nodes),
        additive_(p, scratch + rows(p, longest), pulls),
        pairs_(takes_pairs(p)),
        rows_(scratch) {}

  const Mask& mask() const { return mask_; }

  // Are products taken of pairs of bfloat16?
  bool pairs() const { return kHasPairs && pairs_; }  // where no machine has them, nothing is compiled for them
  static bool takes_pairs(const Problem& p) { return kHasPairs && p.pairs && !p.weight && in_pairs(p.q, p.D) && in_pairs(p.k, p.D) && in_pairs(p.v, p.E); }
  Additive& additive() { return additive_; }

  // A scale below 0 would turn the largest score into the smallest.
  bool is_plain() const { return p_.scale > 0.0f && !p_.key_bias && !p_.query_bias && !p_.bias.data && !p_.relative && p_.softcap <= 0.0f; }

  // 2^(unit * score) is what softmax sums up. Where nothing is added to the products of q and k, these are the scores, and
  // their scale is a part of the unit: no number is rounded for it.
  float unit() const { return scale() * kLog2e; }

  // What they are still to be multiplied by.
  float scale() const { return is_plain() ? p_.scale : 1.0f; }

  // The sink of a head, as a score.
  float sink(int64_t h) const { return is_plain() ? p_.sink[h] / p_.scale : p_.sink[h]; }

  // (turned, lanes)
  void turn_queries(const Queries& q, float* turned) {
    if (p_.weight) return additive_.turn_queries(q, turned);
    const auto turn_rows = pairs() ? turn_pairs : turn;
    turn_rows(p_.q, q.b, q.h, q.first, q.count, p_.D, turned, q.lanes());
  }

  // s[n * lanes + i]: the score of key n and query i, -inf where it may not attend; for the vectors that the keys are told
  // for. They are given to `finish(n, i, x)`, as by a product, before they are stored. `slopes`, if given, gets the derivative
  // of the softcap.
  template <class Finish>
  void fill(const Queries& q, const float* turned, const Keys& keys, float* s, Finish finish, float* slopes = nullptr) {
    const auto forbid_and_finish = [&](int64_t first, int i, auto& x) __attribute__((always_inline)) {
      each_row(first, x, [&](int64_t n, Vec& score) __attribute__((always_inline)) {
        score = where(static_cast<Bits>(keys.bits[n] >> (i * kWidth)) & kAll, score, regard::REGARD_SET::fill(-kInfinity));
      });
      finish(first, i, x);
    };
    if (is_plain()) return keys.partial ? match(q, turned, keys, s, forbid_and_finish) : match(q, turned, keys, s, finish);
    scale_and_add(q, turned, keys, s);
    if (p_.softcap > 0.0f) cap(q, keys, s, slopes);
    if (p_.relative) add_relative(q, keys, s);
    if (p_.bias.data) add_table(q, keys, s);
    for (int64_t n = 0; n < keys.count; n++)
      for (int i = keys.from; i < keys.upto; i++) {
        float* at = s + n * q.lanes() + i * kWidth;
        Vec x[1] = {load(at)};
        keys.partial ? forbid_and_finish(n, i, x) : finish(n, i, x);
        store(at, x[0]);
      }
  }

 private:
  static int64_t rows(const Problem& p, int64_t longest) { return longest * most(whole_vectors(p.D) * kWidth, p.bias.data ? kTile : 0); }

  // The score functions themselves, which go through `finish(key, i, x)`.
  template <class Finish>
  void match(const Queries& q, const float* turned, const Keys& keys, float* s, Finish finish) {
    if (p_.weight) return additive_.fill(q, turned, keys, s, finish);
    const int64_t from = keys.from * kWidth;
    const auto finish_from = [&](int64_t n, int i, auto& x) __attribute__((always_inline)) { finish(n, keys.from + i, x); };
    if (pairs()) {
      const Strided<Pair> k{pairs_at(p_.k, q.b, q.g, keys.first), p_.k.row / 2, 1};
      return product<false>(keys.count, keys.vectors(), p_.D / 2, k, regard::REGARD_SET::pairs(turned) + from, q.lanes(), s + from, q.lanes(), finish_from);
    }
    const FloatRows k = as_floats(p_.k, q.b, q.g, keys.first, keys.count, p_.D, rows_);
    product<false>(keys.count, keys.vectors(), p_.D, Strided<float>{k.data, k.row, 1}, turned + from, q.lanes(), s + from, q.lanes(), finish_from);
  }

  void scale_and_add(const Queries& q, const float* turned, const Keys& keys, float* s) {
    const Vec scale = regard::REGARD_SET::fill(p_.scale);
    Vec per_query[kMostVectors] = {};
    if (p_.query_bias)
      for (int i = keys.from; i < keys.upto; i++) per_query[i] = load_some(p_.query_bias + (q.b * p_.H + q.h) * p_.L + q.first + i * kWidth, q.count - i * kWidth);
    const float* per_key = p_.key_bias ? p_.key_bias + (q.b * p_.G + q.g) * p_.S + keys.first : nullptr;
    match(q, turned, keys, s, [&](int64_t first, int i, auto& x) __attribute__((always_inline)) {
      // The key's term first: the sum of both would be larger than the score, and round more.
      each_row(first, x, [&](int64_t n, Vec& score) __attribute__((always_inline)) {
        score = fma(score, scale, per_key ? regard::REGARD_SET::fill(per_key[n]) : Vec{}) + per_query[i];
      });
    });
  }

  void cap(const Queries& q, const Keys& keys, float* s, float* slopes) const {
    const Vec cap = regard::REGARD_SET::fill(p_.softcap), angle = regard::REGARD_SET::fill(2.0f * kLog2e / p_.softcap);
    for (int64_t n = 0; n < keys.count; n++)
      for (int64_t at = n * q.lanes() + keys.from * kWidth; at < n * q.lanes() + keys.upto * kWidth; at += kWidth) {
        const Tanh t = tanh(load(s + at) * angle);
        if (slopes) store(slopes + at, t.slope);
        store(s + at, t.value * cap);
      }
  }

  void add_relative(const Queries& q, const Keys& keys, float* s) const {
    // Neighbouring queries are neighbours in the table.
    const float* table = p_.relative + q.h * p_.relative_head + q.first + p_.S - 1;
    for (int64_t n = 0; n < keys.count; n++)
      for (int i = keys.from; i < keys.upto; i++) add(s + n * q.lanes() + i * kWidth, load(table - (keys.first + n) + i * kWidth));
  }

  static void add(float* at, Vec x) { store(at, load(at) + x); }

  void add_table(const Queries& q, const Keys& keys, float* s) {
    const Table& t = p_.bias;
    const char* at = t.data + (q.b * t.batch + q.h * t.head + q.first * t.query + keys.first * t.key) * size_of(t.type);
    if (t.key == 1) {
      // Queries by keys: turned as q is.
      Rows rows{const_cast<char*>(at), 0, 0, t.query, t.type};
      turn(rows, 0, 0, 0, q.count, keys.count, rows_, q.lanes());
      for (int64_t n = 0; n < keys.count; n++)
        for (int64_t x = n * q.lanes() + keys.from * kWidth; x < n * q.lanes() + keys.upto * kWidth; x += kWidth) add(s + x, load(rows_ + x));
      return;
    }
    for (int64_t n = 0; n < keys.count; n++)
      for (int64_t i = keys.from * kWidth; i < keys.from * kWidth + keys.queries(q); i++) {
        const char* number = at + (i * t.query + n * t.key) * size_of(t.type);
        s[n * q.lanes() + i] += read(number, t.type, 1)[0];
      }
  }

  const Problem& p_;
  Mask mask_;
  Additive additive_;
  const bool pairs_;
  float* rows_;  // keys as floats, where they are of another type; a part of the bias
};

}  // namespace regard::REGARD_SET
