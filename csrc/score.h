// Stage 1: the scores of a tile of queries and some keys, laid out keys by queries.
//
// Queries are in the lanes. Only they are transposed, once per tile; keys and values are read element by element in
// their own layout. All later stages reduce along the keys, without sums across lanes.
#pragma once

#include "additive.h"
#include "bf16_dot.h"
#include "gemm.h"

namespace regard::REGARD_SET {

// Updates the maximum score of each lane; used as `finish` of the scores.
template <class Rows>
REGARD_INLINE void update_max(Vec& best, Rows& x) {
  Vec high = best;
  each_row(0, x, [&](int64_t, Vec& score) __attribute__((always_inline)) { high = max(high, score); });
  best = high;
}

class Scores {
 public:
  // Floats of scratch for blocks of `max_keys` keys; `for_backward` if gradients are computed.
  static int64_t scratch(const Problem& p, int64_t max_keys, bool for_backward = false) {
    return floats_for_rows(p, max_keys) + Additive::scratch(p, for_backward);
  }

  // Floats per lane of the transposed queries.
  static int64_t query_width(const Problem& p) { return p.weight ? Additive::padded(p.D) : p.D; }

  Scores(const Problem& p, float* scratch, int64_t max_keys, bool for_backward = false)
      : p_(p),
        mask_(p.mask, p.mask_nodes),
        additive_(p, scratch + floats_for_rows(p, max_keys), for_backward),
        use_bf16_dot_(can_use_bf16_dot(p)),
        rows_(scratch) {}

  const Mask& mask() const { return mask_; }

  // Whether to use bf16 dot products; false at compile time in sets without the instruction.
  bool use_bf16_dot() const { return kHasBF16Dot && use_bf16_dot_; }
  static bool can_use_bf16_dot(const Problem& p) {
    return kHasBF16Dot && p.allow_bf16_dot && !p.weight && can_pair_columns(p.q, p.D) && can_pair_columns(p.k, p.D) &&
           can_pair_columns(p.v, p.E);
  }
  Additive& additive() { return additive_; }

  // With a negative scale, the largest product would have the smallest score.
  bool is_plain() const {
    return p_.scale > 0.0f && !p_.key_bias && !p_.query_bias && !p_.bias.data && !p_.relative && p_.softcap <= 0.0f;
  }

  // Softmax sums 2^(unit * score). If the scores are the scaled products of q and k and nothing else, they are kept
  // unscaled, and the scale is part of the unit: this saves a rounding.
  float unit() const { return scale() * kLog2e; }

  // The factor that is not yet applied to the scores.
  float scale() const { return is_plain() ? p_.scale : 1.0f; }

  // The sink of a head, as a score.
  float sink(int64_t h) const { return is_plain() ? p_.sink[h] / p_.scale : p_.sink[h]; }

  // q_transposed: (query_width, lanes)
  void load_queries(const QueryTile& q, float* q_transposed) {
    if (p_.weight) return additive_.load_queries(q, q_transposed);
    const auto transpose_q = use_bf16_dot() ? transpose_pairs : transpose_rows;
    transpose_q(p_.q, q.b, q.h, q.first, q.count, p_.D, q_transposed, q.lanes());
  }

  // s[n * lanes + i]: the score of key n and query i, -inf where masked, for the vectors [keys.from, keys.until). As in
  // gemm(), `finish(n, i, x)` may modify them before they are stored. `softcap_grad`, if given, receives the derivative
  // of the softcap.
  template <class Finish>
  void compute(const QueryTile& q, const float* q_transposed, const KeyBlock& keys, float* s, Finish finish,
               float* softcap_grad = nullptr) {
    const auto mask_and_finish = [&](int64_t first, int i, auto& x) __attribute__((always_inline)) {
      each_row(first, x, [&](int64_t n, Vec& score) __attribute__((always_inline)) {
        score = where(static_cast<LaneMask>(keys.bits[n] >> (i * kWidth)) & kAllLanes, score, broadcast(-kInfinity));
      });
      finish(first, i, x);
    };
    if (is_plain())
      return keys.partial ? base_scores(q, q_transposed, keys, s, mask_and_finish)
                          : base_scores(q, q_transposed, keys, s, finish);
    scale_and_add(q, q_transposed, keys, s);
    if (p_.softcap > 0.0f) cap(q, keys, s, softcap_grad);
    if (p_.relative) add_relative(q, keys, s);
    if (p_.bias.data) add_table(q, keys, s);
    for (int64_t n = 0; n < keys.count; n++)
      for (int i = keys.from; i < keys.until; i++) {
        float* at = s + n * q.lanes() + i * kWidth;
        Vec x[1] = {load(at)};
        keys.partial ? mask_and_finish(n, i, x) : finish(n, i, x);
        store(at, x[0]);
      }
  }

 private:
  static int64_t floats_for_rows(const Problem& p, int64_t max_keys) {
    return max_keys * max64(whole_vectors(p.D) * kWidth, p.bias.data ? kTile : 0);
  }

  // The score functions themselves; see `compute` for `finish`.
  template <class Finish>
  void base_scores(const QueryTile& q, const float* q_transposed, const KeyBlock& keys, float* s, Finish finish) {
    if (p_.weight) return additive_.compute(q, q_transposed, keys, s, finish);
    const int64_t from = keys.from * kWidth;
    const auto finish_from = [&](int64_t n, int i, auto& x)
                                 __attribute__((always_inline)) { finish(n, keys.from + i, x); };
    if (use_bf16_dot()) {
      const Strided<BF16Pair> k{pair_row(p_.k, q.b, q.g, keys.first), p_.k.row / 2, 1};
      return gemm<false>(keys.count, keys.vectors(), p_.D / 2, k, as_pairs(q_transposed) + from, q.lanes(), s + from,
                         q.lanes(), finish_from);
    }
    const FloatRows k = as_floats(p_.k, q.b, q.g, keys.first, keys.count, p_.D, rows_);
    gemm<false>(keys.count, keys.vectors(), p_.D, Strided<float>{k.data, k.row, 1}, q_transposed + from, q.lanes(),
                s + from, q.lanes(), finish_from);
  }

  void scale_and_add(const QueryTile& q, const float* q_transposed, const KeyBlock& keys, float* s) {
    const Vec scale = broadcast(p_.scale);
    Vec per_query[kMaxVectors] = {};
    if (p_.query_bias)
      for (int i = keys.from; i < keys.until; i++)
        per_query[i] =
            load_partial(p_.query_bias + (q.b * p_.H + q.h) * p_.L + q.first + i * kWidth, q.count - i * kWidth);
    const float* per_key = p_.key_bias ? p_.key_bias + (q.b * p_.G + q.g) * p_.S + keys.first : nullptr;
    base_scores(q, q_transposed, keys, s, [&](int64_t first, int i, auto& x) __attribute__((always_inline)) {
      // Add the key bias first: the sum of both biases may be larger than the score, and round more.
      each_row(first, x, [&](int64_t n, Vec& score) __attribute__((always_inline)) {
        score = fma(score, scale, per_key ? broadcast(per_key[n]) : Vec{}) + per_query[i];
      });
    });
  }

  void cap(const QueryTile& q, const KeyBlock& keys, float* s, float* softcap_grad) const {
    const Vec cap = broadcast(p_.softcap), angle = broadcast(2.0f * kLog2e / p_.softcap);
    for (int64_t n = 0; n < keys.count; n++)
      for (int64_t at = n * q.lanes() + keys.from * kWidth; at < n * q.lanes() + keys.until * kWidth; at += kWidth) {
        const Tanh t = tanh(load(s + at) * angle);
        if (softcap_grad) store(softcap_grad + at, t.derivative);
        store(s + at, t.value * cap);
      }
  }

  void add_relative(const QueryTile& q, const KeyBlock& keys, float* s) const {
    // Neighboring queries are neighbors in the table.
    const float* table = p_.relative + q.h * p_.relative_head + q.first + p_.S - 1;
    for (int64_t n = 0; n < keys.count; n++)
      for (int i = keys.from; i < keys.until; i++)
        add_to(s + n * q.lanes() + i * kWidth, load(table - (keys.first + n) + i * kWidth));
  }

  static void add_to(float* at, Vec x) { store(at, load(at) + x); }

  void add_table(const QueryTile& q, const KeyBlock& keys, float* s) {
    const Table& t = p_.bias;
    const char* at = t.data + (q.b * t.batch + q.h * t.head + q.first * t.query + keys.first * t.key) * size_of(t.type);
    if (t.key == 1) {
      // Queries by keys: transpose it as q.
      Rows rows{const_cast<char*>(at), 0, 0, t.query, t.type};
      transpose_rows(rows, 0, 0, 0, q.count, keys.count, rows_, q.lanes());
      for (int64_t n = 0; n < keys.count; n++)
        for (int64_t x = n * q.lanes() + keys.from * kWidth; x < n * q.lanes() + keys.until * kWidth; x += kWidth)
          add_to(s + x, load(rows_ + x));
      return;
    }
    for (int64_t n = 0; n < keys.count; n++)
      for (int64_t i = keys.from * kWidth; i < keys.from * kWidth + keys.queries(q); i++) {
        const char* element = at + (i * t.query + n * t.key) * size_of(t.type);
        s[n * q.lanes() + i] += read(element, t.type, 1)[0];
      }
  }

  const Problem& p_;
  Mask mask_;
  Additive additive_;
  const bool use_bf16_dot_;
  float* rows_;  // keys as floats if they have another dtype; a tile of the bias
};

}  // namespace regard::REGARD_SET
