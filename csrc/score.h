// Stage 1: the scores of a tile of queries with some keys, laid out keys by queries.
//
// Queries lie in the lanes: only they are turned, once a tile, while keys and values are read as they are, number by
// number. What follows works down the lanes, with no sum across them.
#pragma once

#include "mask.h"
#include "product.h"
#include "rows.h"

namespace regard::REGARD_SET {

constexpr int kMostVectors = kTile / kWidth;
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kInfinity = __builtin_inff();

// Queries [first, first + count) of head h in batch row b, in `vectors` vectors.
struct Queries {
  int64_t b, h, g, first;
  int count, vectors;

  Queries() = default;
  Queries(const Problem& p, int64_t b, int64_t h, int64_t first)
      : b(b), h(h), g(h / p.repeats()), first(first), count(static_cast<int>(least(kTile, p.L - first))), vectors(whole_vectors(count)) {}
  int64_t lanes() const { return vectors * kWidth; }
};

// Keys [first, first + count); `partial` where the mask forbids some of the pairs.
struct Keys {
  int64_t first, count;
  bool partial;
};

// Calls `visit(keys)` for the keys in [first, last) that a tile of queries may attend to, in runs of at most `longest`.
template <class Visit>
inline void visit_keys(const Mask& mask, const Queries& q, int64_t first, int64_t last, int64_t longest, Visit visit) {
  Keys run{first, 0, false};
  const int64_t step = mask ? kTile : longest;
  for (int64_t j = first; j < last; j += step) {
    const int64_t count = least(step, last - j);
    const Cover cover = mask.cover({q.b, q.h, q.first, q.count, j, count});
    const bool joins = cover != Cover::None && run.count && run.partial == (cover == Cover::Some) && run.count + count <= longest;
    if (joins) {
      run.count += count;
      continue;
    }
    if (run.count) visit(run);
    run = {j, cover == Cover::None ? 0 : count, cover == Cover::Some};
  }
  if (run.count) visit(run);
}

class Scores {
 public:
  // Numbers of scratch for blocks of `longest` keys.
  static int64_t scratch(const Problem& p, int64_t longest) {
    return longest * most(whole_vectors(p.D) * kWidth, p.bias.data ? kTile : 0);
  }

  Scores(const Problem& p, float* scratch)
      : p_(p), mask_(p.mask, p.mask_nodes), rows_(scratch) {}

  const Mask& mask() const { return mask_; }

  // 2^(unit * score) is what softmax sums up. Where nothing is added to the products of q and k, these are the scores, and
  // their scale is a part of the unit: no number is rounded for it.
  float unit() const { return is_plain() ? p_.scale * kLog2e : kLog2e; }

  // The sink of a head, as a score.
  float sink(int64_t h) const { return is_plain() ? p_.sink[h] / p_.scale : p_.sink[h]; }

  // (D, lanes)
  void turn_queries(const Queries& q, float* turned) const { turn(p_.q, q.b, q.h, q.first, q.count, p_.D, turned, q.lanes()); }

  // s[n * lanes + i]: the score of key n and query i, -inf where it may not attend. `best` is raised to the largest of
  // each lane; `slopes`, if given, gets the derivative of the softcap.
  void fill(const Queries& q, const float* turned, const Keys& keys, float* s, Vec* best, float* slopes = nullptr) {
    const FloatRows k = as_floats(p_.k, q.b, q.g, keys.first, keys.count, p_.D, rows_);
    const Strided a{k.data, k.row, 1};
    if (is_plain() && !keys.partial) {
      product<false>(keys.count, q.vectors, p_.D, a, turned, q.lanes(), s, q.lanes(), [&](int64_t, int n, Vec& x) __attribute__((always_inline)) { best[n] = max(best[n], x); });
      return;
    }
    product<false>(keys.count, q.vectors, p_.D, a, turned, q.lanes(), s, q.lanes());
    adjust(q, keys, s, best, slopes);
  }

 private:
  // A scale below 0 would turn the largest score into the smallest.
  bool is_plain() const { return p_.scale > 0.0f && !p_.key_bias && !p_.query_bias && !p_.bias.data && !p_.relative && p_.softcap <= 0.0f; }

  void adjust(const Queries& q, const Keys& keys, float* s, Vec* best, float* slopes) {
    const int64_t lanes = q.lanes();
    if (!is_plain()) scale_and_add(q, keys, s);
    if (p_.softcap > 0.0f) {
      const Vec cap = regard::REGARD_SET::fill(p_.softcap), angle = regard::REGARD_SET::fill(2.0f * kLog2e / p_.softcap);
      for (int64_t at = 0; at < keys.count * lanes; at += kWidth) {
        const Tanh t = tanh(load(s + at) * angle);
        if (slopes) store(slopes + at, t.slope);
        store(s + at, t.value * cap);
      }
    }
    if (p_.relative) {
      // Neighbouring queries are neighbours in the table.
      const float* table = p_.relative + q.h * p_.relative_head + q.first + p_.S - 1;
      for (int64_t n = 0; n < keys.count; n++)
        for (int i = 0; i < q.vectors; i++) add(s + n * lanes + i * kWidth, load(table - (keys.first + n) + i * kWidth));
    }
    if (p_.bias.data) add_table(q, keys, s);
    uint64_t bits[kTile];
    for (int64_t from = 0; from < keys.count; from += kTile) {
      const int64_t count = least(kTile, keys.count - from);
      if (keys.partial) mask_.bits({q.b, q.h, q.first, q.count, keys.first + from, count}, bits);
      for (int64_t n = 0; n < count; n++)
        for (int i = 0; i < q.vectors; i++) {
          float* at = s + (from + n) * lanes + i * kWidth;
          Vec x = load(at);
          if (keys.partial) {
            x = where(static_cast<Bits>(bits[n] >> (i * kWidth)) & kAll, x, regard::REGARD_SET::fill(-kInfinity));
            store(at, x);
          }
          best[i] = max(best[i], x);
        }
    }
  }

  static void add(float* at, Vec x) { store(at, load(at) + x); }

  void scale_and_add(const Queries& q, const Keys& keys, float* s) const {
    const Vec scale = regard::REGARD_SET::fill(p_.scale);
    for (int i = 0; i < q.vectors; i++) {
      const Vec term = p_.query_bias ? load_some(p_.query_bias + (q.b * p_.H + q.h) * p_.L + q.first + i * kWidth, q.count - i * kWidth) : Vec{};
      const float* per_key = p_.key_bias ? p_.key_bias + (q.b * p_.G + q.g) * p_.S + keys.first : nullptr;
      for (int64_t n = 0; n < keys.count; n++) {
        float* at = s + n * q.lanes() + i * kWidth;
        // The key's term first: the sum of both would be larger than the score, and round more.
        store(at, fma(load(at), scale, per_key ? regard::REGARD_SET::fill(per_key[n]) : Vec{}) + term);
      }
    }
  }

  void add_table(const Queries& q, const Keys& keys, float* s) {
    const Table& t = p_.bias;
    const char* at = t.data + (q.b * t.batch + q.h * t.head + q.first * t.query + keys.first * t.key) * size_of(t.type);
    if (t.key == 1) {
      // Queries by keys: turned as q is.
      Rows rows{const_cast<char*>(at), 0, 0, t.query, t.type};
      turn(rows, 0, 0, 0, q.count, keys.count, rows_, q.lanes());
      for (int64_t x = 0; x < keys.count * q.lanes(); x += kWidth) add(s + x, load(rows_ + x));
      return;
    }
    for (int64_t n = 0; n < keys.count; n++)
      for (int i = 0; i < q.count; i++) {
        const char* number = at + (i * t.query + n * t.key) * size_of(t.type);
        s[n * q.lanes() + i] += read(number, t.type, 1)[0];
      }
  }

  const Problem& p_;
  Mask mask_;
  float* rows_;  // keys as floats, where they are of another type; a part of the bias
};

}  // namespace regard::REGARD_SET
