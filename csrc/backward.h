// Backward pass of softmax and sigmoid. The weights P are recomputed from the row maxima and row sums:
//
//   dV = P^T dO      dP = dO V^T      dS = P (dP - delta)      dQ = dS K      dK = dS^T Q      delta = rowsum(dO O)
//
//   for each task: a key/value head, and a split of the tiles of the queries that use it
//     for each super-tile of up to 8 tiles of 64 queries  (their q, dO and dQ stay in the L2 cache)
//       for each block of 128 keys                        (k, v, dK and dV are read once per super-tile)
//         for each tile: the five products
//
// dO is divided by the row sum beforehand, so that P is 2^(S - row_max) alone. With bf16 dot products this would round
// dO once more, so P is divided instead.
#pragma once

#include "bias_grad.h"
#include "dropout.h"
#include "grad_sums.h"
#include "score.h"
#include "scratch.h"

namespace regard::REGARD_SET {

constexpr int kMaxTiles = 8;
constexpr int64_t kSuperBytes = 640 << 10;

class Backward {
 public:
  Backward(const Problem& p, const Gradients& g, Scratch& scratch)
      : p_(p),
        g_(g),
        D_(padded(p.D)),
        E_(padded(p.E)),
        count_(tiles(p)),
        scores_(p, scratch.take(Scores::scratch(p, kBackwardKeys, true)), kBackwardKeys, true),
        bias_grad_(p, g),
        use_bf16_dot_(GradSums::can_use_bf16_dot(p, g)),
        softmax_(p.normalizer == Normalizer::Softmax),
        weights_(scratch.take(kBackwardKeys * kTile)),
        ds_(scratch.take((kBackwardKeys + 1) * kTile)),
        softcap_grad_(p.softcap > 0.0f ? scratch.take(kBackwardKeys * kTile) : nullptr),
        rows_(scratch.take(2 * kTile * p.E)),
        keys_(scratch.take(kBackwardKeys * D_)),
        values_(scratch.take(kBackwardKeys * E_)) {
    float* memory = scratch.take(count_ * tile_floats(p));
    for (int n = 0; n < count_; n++, memory += tile_floats(p)) tiles_[n].set_buffers(p, memory);
  }

  static int64_t scratch(const Problem& p) {
    return Scores::scratch(p, kBackwardKeys, true) + ((p.softcap > 0.0f ? 3 : 2) * kBackwardKeys + 1) * kTile +
           2 * kTile * p.E + kBackwardKeys * (padded(p.D) + padded(p.E)) + tiles(p) * tile_floats(p);
  }

  // Computes the gradients of key/value head g that come from tiles split, split + num_splits, ... of queries. `sums`
  // and `doubles` belong to this task alone; `dbias` may be shared.
  void run(int64_t b, int64_t g, int64_t split, int64_t num_splits, float* sums, double* doubles, float* dbias) {
    dk_ = sums, dv_ = sums + p_.S * D_;
    bias_grad_.set(dv_ + p_.S * E_, g_.drelative ? doubles : nullptr, dbias);
    dweight_ = doubles + (g_.drelative ? p_.repeats() * relative_size(p_) : 0);
    zero_floats(sums, GradSums::floats(p_));
    paired_block_ = -1;
    const int64_t step = num_splits * kTile;
    for (int64_t h = g * p_.repeats(); h < (g + 1) * p_.repeats(); h++) {
      for (int64_t first = split * kTile; first < p_.L;) {
        int count = 0;
        for (; count < count_ && first < p_.L; first += step) start(tiles_[count++], b, h, first);
        for (int64_t j = 0; j < p_.S; j += kBackwardKeys)
          for (int n = 0; n < count; n++)
            visit_keys(scores_.mask(), tiles_[n].q, j, min64(j + kBackwardKeys, p_.S), kBackwardKeys,
                       [&](const KeyBlock& keys) { add(tiles_[n], keys); });
        for (int n = 0; n < count; n++) finish(tiles_[n]);
      }
    }
  }

 private:
  static int64_t tile_floats(const Problem& p) {
    return kTile * (2 * Scores::query_width(p) + p.E + padded(p.D) + padded(p.E) + 6);
  }
  static int tiles(const Problem& p) {
    return static_cast<int>(max64(1, min64(kMaxTiles, kSuperBytes / (tile_floats(p) * 4))));
  }

  // A tile of queries with its inputs and accumulators.
  struct Tile {
    QueryTile q;
    float *q_transposed, *dout_transposed, *dq_transposed, *rows, *dout;
    float *row_max, *inverse_sum, *weight_scale, *delta, *row_sum, *bias_sum;  // (lanes)
    Dropout dropout;

    void set_buffers(const Problem& p, float* at) {
      auto take = [&](int64_t count) { return (at += count) - count; };
      q_transposed = take(kTile * Scores::query_width(p)), dq_transposed = take(kTile * Scores::query_width(p)),
      dout_transposed = take(kTile * p.E);
      rows = take(kTile * padded(p.D)), dout = take(kTile * padded(p.E));
      row_max = take(kTile), inverse_sum = take(kTile), weight_scale = take(kTile), delta = take(kTile),
      row_sum = take(kTile), bias_sum = take(kTile);
    }
  };

  void start(Tile& t, int64_t b, int64_t h, int64_t first) {
    t.q = QueryTile(p_, b, h, first);
    const QueryTile& q = t.q;
    const int64_t row = (b * p_.H + h) * p_.L + first, lanes = q.lanes();
    scores_.load_queries(q, t.q_transposed);
    alignas(64) float scale[kTile], scale_out[kTile];
    for (int i = 0; i < q.count; i++) {
      const float inverse_sum = g_.inverse_sum ? g_.inverse_sum[row + i] : 1.0f;
      scale[i] = p_.scale;
      scale_out[i] = inverse_sum * p_.keep_scale;
      t.row_max[i] = g_.row_max ? g_.row_max[row + i] : 0.0f;
      t.inverse_sum[i] = inverse_sum, t.weight_scale[i] = use_bf16_dot() ? inverse_sum : 1.0f;
    }
    // Lanes without a query have zero weights.
    for (int64_t i = q.count; i < lanes; i++) t.row_max[i] = kInfinity, t.inverse_sum[i] = t.weight_scale[i] = 0.0f;
    if (use_bf16_dot()) {
      interleave_rows(p_.q, b, h, first, q.count, p_.D, t.rows, lanes, D_);
      interleave_rows(g_.dout, b, h, first, q.count, p_.E, t.dout, lanes, E_);
      transpose_pairs(g_.dout, b, h, first, q.count, p_.E, t.dout_transposed, lanes);
    } else {
      if (!p_.weight) copy_rows(p_.q, b, h, first, q.count, p_.D, scale, t.rows, D_);
      copy_rows(g_.dout, b, h, first, q.count, p_.E, scale_out, t.dout, E_);
      transpose_rows({reinterpret_cast<char*>(t.dout), 0, 0, E_, Type::Float}, 0, 0, 0, q.count, p_.E,
                     t.dout_transposed, lanes);
    }
    if (softmax_) compute_delta(t);
    zero_floats(t.dq_transposed, p_.D * lanes);
    zero_floats(t.row_sum, lanes), zero_floats(t.bias_sum, lanes);
    if (p_.has_dropout) t.dropout.set(p_, b, h, first, q.count);
  }

  // delta = rowsum(dO O), accumulated in the order of dP: for a row with a single key the two are equal to the last
  // bit, and dS is 0.
  void compute_delta(Tile& t) {
    const QueryTile& q = t.q;
    const int64_t row = (q.b * p_.H + q.h) * p_.L + q.first, lanes = q.lanes();
    float *out = rows_, *dout = use_bf16_dot() ? rows_ + kTile * p_.E : t.dout_transposed;
    transpose_rows(g_.out, q.b, q.h, q.first, q.count, p_.E, out, lanes);
    if (use_bf16_dot()) transpose_rows(g_.dout, q.b, q.h, q.first, q.count, p_.E, dout, lanes);
    for (int i = 0; i < q.vectors; i++) {
      Vec delta{};
      for (int64_t at = i * kWidth; at < p_.E * lanes; at += lanes) delta = fma(load(out + at), load(dout + at), delta);
      // The output includes the dropout scale, and so does dO where it was divided by the row sum.
      if (p_.has_dropout && !use_bf16_dot()) delta = p_.keep_scale > 0.0f ? delta / broadcast(p_.keep_scale) : Vec{};
      store(t.delta + i * kWidth, delta);
    }
    for (int i = 0; i < q.count; i++) {
      const float factor = use_bf16_dot() ? 1.0f : t.inverse_sum[i];
      if (g_.dlse) t.delta[i] -= factor * g_.dlse[row + i];
      // A sink is a key whose value is 0.
      if (g_.head_sums)
        g_.head_sums[row + i] = -t.delta[i] * (use_bf16_dot() ? t.inverse_sum[i] : 1.0f) *
                                exp2(broadcast(scores_.sink(q.h) - t.row_max[i]), broadcast(scores_.unit()))[0];
    }
  }

  void add(Tile& t, const KeyBlock& keys) {
    compute_weights(t, keys);
    if (use_bf16_dot()) return add_bf16_dot(t, keys);
    const QueryTile& q = t.q;
    const int64_t lanes = q.lanes(), from = keys.from * kWidth, queries = keys.queries(q);
    const FloatRows v = as_floats(p_.v, q.b, q.g, keys.first, keys.count, p_.E, values_);
    gemm<false>(keys.count, keys.vectors(), p_.E, Strided<float>{v.data, v.row, 1}, t.dout_transposed + from, lanes,
                ds_ + from, lanes, [&](int64_t first, int i, auto& x) __attribute__((always_inline)) {
                  each_row(first, x, [&](int64_t n, Vec& dp) __attribute__((always_inline)) {
                    const WeightGrad one = compute_ds(t, keys, n, keys.from + i, dp);
                    if (p_.has_dropout) store(weights_ + n * lanes + from + i * kWidth, one.weight);
                    dp = one.ds;
                  });
                });
    if (g_.head_sums && !softmax_) BiasGrad::add_over_keys(t.bias_sum, q, keys, ds_);
    bias_grad_.add(q, keys, ds_, softcap_grad_, t.row_sum);
    gemm<true>(keys.count, static_cast<int>(E_ / kWidth), queries, Strided<float>{weights_ + from, lanes, 1},
               t.dout + from * E_, E_, dv_ + keys.first * E_, E_);
    if (p_.weight)
      return scores_.additive().backward(q, t.q_transposed, keys, ds_, t.dq_transposed, dk_ + keys.first * D_, D_,
                                         dweight_ + q.h % p_.repeats() * p_.D);
    gemm<true>(keys.count, static_cast<int>(D_ / kWidth), queries, Strided<float>{ds_ + from, lanes, 1},
               t.rows + from * D_, D_, dk_ + keys.first * D_, D_);
    const FloatRows k = as_floats(p_.k, q.b, q.g, keys.first, keys.count, p_.D, keys_);
    gemm<true>(p_.D, keys.vectors(), keys.count, Strided<float>{k.data, 1, k.row}, ds_ + from, lanes,
               t.dq_transposed + from, lanes);
  }

  // The same with bf16 dot products: pairs of columns for dP, of queries for dV and dK, of keys for dQ. Weights and dS
  // are rounded as soon as they are computed: the weights in place, dS in both layouts.
  void add_bf16_dot(Tile& t, const KeyBlock& keys) {
    const QueryTile& q = t.q;
    const int64_t lanes = q.lanes(), from = keys.from * kWidth, depth = keys.vectors() * kWidth / 2;
    float* ds_pairs = ds_ + kBackwardKeys * kTile / 2;
    const Strided<BF16Pair> v{pair_row(p_.v, q.b, q.g, keys.first), p_.v.row / 2, 1};
    gemm_blocks(keys.count, keys.vectors(), p_.E / 2, v, as_pairs(t.dout_transposed) + from, lanes,
                [&](int64_t row, int vector, auto& sums) __attribute__((always_inline)) {
                  constexpr int kVectors = kCountOf<decltype(sums[0])>, kRows = kCountOf<decltype(sums)> / kVectors;
#pragma GCC unroll 8
                  for (int r = 0; r < kRows; r += 2) {
                    const int64_t n = row + r;
                    // Compute both rows before storing the first: it overwrites memory from which weights are still
                    // read.
                    WeightGrad even[kVectors], odd[kVectors];
#pragma GCC unroll 4
                    for (int i = 0; i < kVectors; i++) {
                      even[i] = compute_ds(t, keys, n, keys.from + vector + i, sums[r][i]);
                      if (r + 1 < kRows)
                        odd[i] = compute_ds(t, keys, n + 1, keys.from + vector + i, sums[r + 1 < kRows ? r + 1 : r][i]);
                    }
#pragma GCC unroll 4
                    for (int i = 0; i < kVectors; i++) {
                      const int64_t at = n * lanes + (keys.from + vector + i) * kWidth;
                      store_rounded(weights_, at, even[i].weight), store_rounded(ds_, at, even[i].ds);
                      if (r + 1 < kRows)
                        store_rounded(weights_, at + lanes, odd[i].weight), store_rounded(ds_, at + lanes, odd[i].ds);
                      store(as_pairs(ds_pairs) + n / 2 * lanes + (keys.from + vector + i) * kWidth,
                            interleave_bf16(even[i].ds, odd[i].ds));
                    }
                  }
                });
    gemm<true>(keys.count, static_cast<int>(E_ / kWidth), depth,
               Strided<BF16Pair>{as_pairs(weights_) + from / 2, lanes / 2, 1}, as_pairs(t.dout) + from / 2 * E_, E_,
               dv_ + keys.first * E_, E_);
    gemm<true>(keys.count, static_cast<int>(D_ / kWidth), depth,
               Strided<BF16Pair>{as_pairs(ds_) + from / 2, lanes / 2, 1}, as_pairs(t.rows) + from / 2 * D_, D_,
               dk_ + keys.first * D_, D_);
    // The keys of a block are interleaved once for all tiles of a super-tile.
    const int64_t block = keys.first / kBackwardKeys * kBackwardKeys, count = min64(kBackwardKeys, p_.S - block);
    if (block != paired_block_) interleave_rows(p_.k, q.b, q.g, block, count, p_.D, keys_, count + count % 2, D_);
    paired_block_ = block;
    gemm<true>(p_.D, keys.vectors(), (keys.count + 1) / 2,
               Strided<BF16Pair>{as_pairs(keys_) + (keys.first - block) / 2 * D_, 1, D_}, as_pairs(ds_pairs) + from,
               lanes, t.dq_transposed + from, lanes);
  }

  bool use_bf16_dot() const { return kHasBF16Dot && use_bf16_dot_; }

  static REGARD_INLINE void store_rounded(float* to, int64_t index, Vec x) {
    reinterpret_cast<UnalignedShort*>(reinterpret_cast<uint16_t*>(to) + index)[0] = to_bfloat16(x);
  }

  // The weights of a block; divided by the row sum only with bf16 dot products.
  void compute_weights(Tile& t, const KeyBlock& keys) {
    const Vec bias = broadcast(!softmax_ && p_.sink ? p_.sink[t.q.h] * kLog2e : 0.0f), unit = broadcast(scores_.unit());
    const float *row_max = t.row_max, *weight_scale = t.weight_scale;
    if (softmax_ && use_bf16_dot() && !g_.dlse) {
      scores_.compute(
          t.q, t.q_transposed, keys, weights_,
          [&](int64_t, int i, auto& x) __attribute__((always_inline)) {
            const Vec high = load(row_max + i * kWidth), times = load(weight_scale + i * kWidth);
            each_row(0, x, [&](int64_t, Vec& score) __attribute__((always_inline)) {
              score = exp2_bf16((score - high) * unit) * times;
            });
          },
          softcap_grad_);
    } else if (softmax_) {
      scores_.compute(
          t.q, t.q_transposed, keys, weights_,
          [&](int64_t, int i, auto& x) __attribute__((always_inline)) {
            const Vec high = load(row_max + i * kWidth), times = load(weight_scale + i * kWidth);
            each_row(0, x, [&](int64_t, Vec& score) __attribute__((always_inline)) {
              score = exp2(score - high, unit) * times;
            });
          },
          softcap_grad_);
    } else {
      scores_.compute(
          t.q, t.q_transposed, keys, weights_,
          [&](int64_t, int i, auto& x) __attribute__((always_inline)) {
            const Vec shift = bias - load(row_max + i * kWidth);
            each_row(0, x, [&](int64_t, Vec& score) __attribute__((always_inline)) {
              score = sigmoid(fma(score, unit, shift));
            });
          },
          softcap_grad_);
    }
  }

  // dS, and the weight after dropout.
  struct WeightGrad {
    Vec weight{}, ds{};
  };

  REGARD_INLINE WeightGrad compute_ds(const Tile& t, const KeyBlock& keys, int64_t n, int i, Vec dp) const {
    const int64_t at = n * t.q.lanes() + i * kWidth;
    const Vec p = load(weights_ + at);
    Vec weight = p;
    if (p_.has_dropout) {
      const Vec times = broadcast(use_bf16_dot() ? p_.keep_scale : 1.0f);  // otherwise included in dO
      const LaneMask kept = t.dropout.kept_lanes(keys.first + n, i);
      dp = where(kept, dp * times, Vec{}), weight = where(kept, p * times, Vec{});
    }
    const Vec ds = softmax_ ? p * (dp - load(t.delta + i * kWidth)) : p * (broadcast(1.0f) - p) * dp;
    return {weight, use_bf16_dot() && softcap_grad_ ? ds * load(softcap_grad_ + at) : ds};
  }

  void finish(Tile& t) {
    const QueryTile& q = t.q;
    const int64_t row = (q.b * p_.H + q.h) * p_.L + q.first;
    if (g_.dq.data) {
      alignas(64) float scale[kTile];
      for (int64_t i = 0; i < q.lanes(); i++) scale[i] = p_.scale;
      transpose_back(t.dq_transposed, q.lanes(), scale, p_.D, g_.dq, q.b, q.h, q.first, q.count);
    }
    for (int i = 0; i < q.count; i++) {
      if (g_.dquery_bias) g_.dquery_bias[row + i] = t.row_sum[i];
      if (g_.head_sums && !softmax_) g_.head_sums[row + i] = t.bias_sum[i];
    }
  }

  const Problem& p_;
  const Gradients& g_;
  const int64_t D_, E_;  // padded widths
  const int count_;
  Scores scores_;
  BiasGrad bias_grad_;
  const bool use_bf16_dot_, softmax_;
  int64_t paired_block_ = -1;             // the first key of the block that keys_ holds interleaved
  float *weights_, *ds_, *softcap_grad_;  // (keys, lanes)
  float* rows_;                           // (E, lanes) twice: O and dO, transposed
  float *keys_, *values_;                 // (keys, width): as floats if they have another dtype; keys interleaved
  float *dk_ = nullptr, *dv_ = nullptr;
  double* dweight_ = nullptr;
  Tile tiles_[kMaxTiles];
};

}  // namespace regard::REGARD_SET
