// The gradients, by recomputing the weights P from the largest score and the sum of each row:
//
//   dV = P^T dO      dP = dO V^T      dS = P (dP - delta)      dQ = dS K      dK = dS^T Q      delta = rowsum(dO O)
//
//   for each task: a key/value head, and a share of the tiles of the queries that use it
//     for each super-tile of up to 8 tiles of 64 queries  (their q, dO and dQ stay in the second cache)
//       for each block of 128 keys                        (k, v, dK and dV come by once a super-tile, not once a tile)
//         for each tile: the five products
//
// The sum of a row goes into dO beforehand, so that P is 2^(S - peak) alone; but not where products are taken of pairs of
// bfloat16, where dO would be rounded once more: there P is divided by it.
#pragma once

#include "added.h"
#include "dropout.h"
#include "score.h"
#include "scratch.h"

namespace regard::REGARD_SET {

constexpr int64_t kKeys = 128;
constexpr int kMostTiles = 8;
constexpr int64_t kSuperBytes = 640 << 10;

class Backward {
 public:
  Backward(const Problem& p, const Gradients& g, Scratch& scratch)
      : p_(p),
        g_(g),
        D_(padded(p.D)),
        E_(padded(p.E)),
        count_(tiles(p)),
        scores_(p, scratch.take(Scores::scratch(p, kKeys, true)), kKeys, true),
        added_(p, g),
        pairs_(takes_pairs(p, g)),
        softmax_(p.normalizer == Normalizer::Softmax),
        weights_(scratch.take(kKeys * kTile)),
        slopes_(scratch.take((kKeys + 1) * kTile)),
        caps_(p.softcap > 0.0f ? scratch.take(kKeys * kTile) : nullptr),
        rows_(scratch.take(2 * kTile * p.E)),
        keys_(scratch.take(kKeys * D_)),
        values_(scratch.take(kKeys * E_)) {
    float* memory = scratch.take(count_ * tile_numbers(p));
    for (int n = 0; n < count_; n++, memory += tile_numbers(p)) tiles_[n].lay(p, memory);
  }

  static int64_t scratch(const Problem& p) {
    return Scores::scratch(p, kKeys, true) + ((p.softcap > 0.0f ? 3 : 2) * kKeys + 1) * kTile + 2 * kTile * p.E + kKeys * (padded(p.D) + padded(p.E)) + tiles(p) * tile_numbers(p);
  }

  // The sums of dK and dV of a task, S rows of whole vectors each, and those of the bias of the keys.
  static int64_t sums(const Problem& p) { return p.S * (padded(p.D) + padded(p.E)) + (p.key_bias ? padded(p.S) : 0); }

  // The same of what is summed up in double: by distance, and for the weights of an additive score, a row a head.
  static int64_t doubles(const Problem& p, const Gradients& g) {
    return p.repeats() * ((g.drelative ? relative_numbers(p) : 0) + (p.weight ? p.D : 0));
  }

  // The gradients of key/value head g that come from every `shares`-th tile of queries. `sums` and `doubles` belong to this
  // task alone; `dbias` does not, unless the caller sees to it.
  void run(int64_t b, int64_t g, int64_t share, int64_t shares, float* sums, double* doubles, float* dbias) {
    dk_ = sums, dv_ = sums + p_.S * D_;
    added_.set(dv_ + p_.S * E_, g_.drelative ? doubles : nullptr, dbias);
    dweight_ = doubles + (g_.drelative ? p_.repeats() * relative_numbers(p_) : 0);
    zero(sums, Backward::sums(p_));
    paired_ = -1;
    const int64_t step = shares * kTile;
    for (int64_t h = g * p_.repeats(); h < (g + 1) * p_.repeats(); h++) {
      for (int64_t first = share * kTile; first < p_.L;) {
        int count = 0;
        for (; count < count_ && first < p_.L; first += step) start(tiles_[count++], b, h, first);
        for (int64_t j = 0; j < p_.S; j += kKeys)
          for (int n = 0; n < count; n++)
            visit_keys(scores_.mask(), tiles_[n].q, j, least(j + kKeys, p_.S), kKeys, [&](const Keys& keys) { add(tiles_[n], keys); });
        for (int n = 0; n < count; n++) finish(tiles_[n]);
      }
    }
  }

  // What a task summed up in double for key/value head g, added to the gradients.
  static void add_doubles(const Problem& p, const Gradients& g, int64_t head, const double* doubles) {
    const int64_t relative = g.drelative ? p.repeats() * relative_numbers(p) : 0, weights = p.weight ? p.repeats() * p.D : 0;
    for (int64_t n = 0; n < relative; n++) g.drelative[head * relative + n] += doubles[n];
    for (int64_t n = 0; n < weights; n++) g.dweight[head * weights + n] += doubles[relative + n];
  }

  // dK, dV and the gradient of the bias of the keys of a head, from the sums of its shares, which lie `apart` numbers from
  // one another.
  static void give(const Problem& p, const Gradients& g, int64_t b, int64_t head, const float* sums, int64_t shares, int64_t apart) {
    const int64_t D = padded(p.D), E = padded(p.E);
    const float dk_scale = takes_pairs(p, g) ? p.scale : 1.0f;  // otherwise a part of the q that dK is made of
    for (int64_t j = 0; j < p.S; j++) {
      if (g.dk.data) give_row(g.dk, b, head, j, p.D, sums + j * D, shares, apart, dk_scale);
      if (g.dv.data) give_row(g.dv, b, head, j, p.E, sums + p.S * D + j * E, shares, apart, 1.0f);
    }
    if (!g.dkey_bias) return;
    const Rows bias{reinterpret_cast<char*>(g.dkey_bias), p.G * p.S, p.S, p.S, Type::Float};
    give_row(bias, b, head, 0, p.S, sums + p.S * (D + E), shares, apart, 1.0f);
  }

 private:
  // The gradients of parameters are sums of what may cancel: slopes that were rounded to bfloat16 would not do for them.
  static bool takes_pairs(const Problem& p, const Gradients& g) {
    const bool added = g.dbias || g.drelative || g.dkey_bias || g.dquery_bias || (g.head_sums && p.normalizer == Normalizer::Sigmoid);
    return Scores::takes_pairs(p) && in_pairs(g.dout, p.E) && p.normalizer != Normalizer::Entmax && !added;
  }
  static int64_t tile_numbers(const Problem& p) { return kTile * (2 * Scores::turned(p) + p.E + padded(p.D) + padded(p.E) + 6); }
  static int tiles(const Problem& p) { return static_cast<int>(most(1, least(kMostTiles, kSuperBytes / (tile_numbers(p) * 4)))); }

  static void zero(float* at, int64_t numbers) {
    for (int64_t n = 0; n < numbers; n += kWidth) store(at + n, Vec{});
  }

  // Some queries, what is needed of them, and what is gathered for them. Turned: (width, lanes); rows: (queries, width).
  struct Tile {
    Queries q;
    float *turned, *dout_turned, *dq_turned, *rows, *dout;
    float *peak, *total, *share, *delta, *row_sum, *bias_sum;  // (lanes)
    Dropout dropout;

    void lay(const Problem& p, float* at) {
      auto take = [&](int64_t numbers) { return (at += numbers) - numbers; };
      turned = take(kTile * Scores::turned(p)), dq_turned = take(kTile * Scores::turned(p)), dout_turned = take(kTile * p.E);
      rows = take(kTile * padded(p.D)), dout = take(kTile * padded(p.E));
      peak = take(kTile), total = take(kTile), share = take(kTile), delta = take(kTile), row_sum = take(kTile), bias_sum = take(kTile);
    }
  };

  void start(Tile& t, int64_t b, int64_t h, int64_t first) {
    t.q = Queries(p_, b, h, first);
    const Queries& q = t.q;
    const int64_t row = (b * p_.H + h) * p_.L + first, lanes = q.lanes();
    scores_.turn_queries(q, t.turned);
    alignas(64) float scale[kTile], scale_out[kTile];
    for (int i = 0; i < q.count; i++) {
      const float total = g_.total ? g_.total[row + i] : 1.0f;
      scale[i] = p_.scale;
      scale_out[i] = total * p_.kept;
      t.peak[i] = g_.peak ? g_.peak[row + i] : 0.0f;
      t.total[i] = total, t.share[i] = by_pairs() ? total : 1.0f;
    }
    // Lanes without a query have no weights.
    for (int64_t i = q.count; i < lanes; i++) t.peak[i] = kInfinity, t.total[i] = t.share[i] = 0.0f;
    if (by_pairs()) {
      pair_rows(p_.q, b, h, first, q.count, p_.D, t.rows, lanes, D_);
      pair_rows(g_.dout, b, h, first, q.count, p_.E, t.dout, lanes, E_);
      turn_pairs(g_.dout, b, h, first, q.count, p_.E, t.dout_turned, lanes);
    } else {
      if (!p_.weight) copy_rows(p_.q, b, h, first, q.count, p_.D, scale, t.rows, D_);
      copy_rows(g_.dout, b, h, first, q.count, p_.E, scale_out, t.dout, E_);
      turn({reinterpret_cast<char*>(t.dout), 0, 0, E_, Type::Float}, 0, 0, 0, q.count, p_.E, t.dout_turned, lanes);
    }
    if (softmax_) take_delta(t);
    zero(t.dq_turned, p_.D * lanes);
    zero(t.row_sum, lanes), zero(t.bias_sum, lanes);
    if (p_.drops) t.dropout.set(p_, b, h, first, q.count);
  }

  // delta = rowsum(dO O), as dP is summed up: where a row has one key the two are equal to the last bit, and nothing is left.
  void take_delta(Tile& t) {
    const Queries& q = t.q;
    const int64_t row = (q.b * p_.H + q.h) * p_.L + q.first, lanes = q.lanes();
    float *out = rows_, *dout = by_pairs() ? rows_ + kTile * p_.E : t.dout_turned;
    turn(g_.out, q.b, q.h, q.first, q.count, p_.E, out, lanes);
    if (by_pairs()) turn(g_.dout, q.b, q.h, q.first, q.count, p_.E, dout, lanes);
    for (int i = 0; i < q.vectors; i++) {
      Vec delta{};
      for (int64_t at = i * kWidth; at < p_.E * lanes; at += lanes) delta = fma(load(out + at), load(dout + at), delta);
      // The output holds what dropout multiplies by, and dO, where it holds the sum of the row, once more.
      if (p_.drops && !by_pairs()) delta = p_.kept > 0.0f ? delta / fill(p_.kept) : Vec{};
      store(t.delta + i * kWidth, delta);
    }
    for (int i = 0; i < q.count; i++) {
      const float share = by_pairs() ? 1.0f : t.total[i];
      if (g_.dlse) t.delta[i] -= share * g_.dlse[row + i];
      // The gradient of a sink: it is a key whose value is 0.
      if (g_.head_sums) g_.head_sums[row + i] = -t.delta[i] * (by_pairs() ? t.total[i] : 1.0f) * exp2(fill(scores_.sink(q.h) - t.peak[i]), fill(scores_.unit()))[0];
    }
  }

  void add(Tile& t, const Keys& keys) {
    weigh(t, keys);
    if (by_pairs()) return add_pairs(t, keys);
    const Queries& q = t.q;
    const int64_t lanes = q.lanes(), from = keys.from * kWidth, queries = keys.queries(q);
    const FloatRows v = as_floats(p_.v, q.b, q.g, keys.first, keys.count, p_.E, values_);
    product<false>(keys.count, keys.vectors(), p_.E, Strided<float>{v.data, v.row, 1}, t.dout_turned + from, lanes, slopes_ + from, lanes, [&](int64_t first, int i, auto& x) __attribute__((always_inline)) {
      each_row(first, x, [&](int64_t n, Vec& dp) __attribute__((always_inline)) {
        const Pull one = pull(t, keys, n, keys.from + i, dp);
        if (p_.drops) store(weights_ + n * lanes + from + i * kWidth, one.weight);
        dp = one.slope;
      });
    });
    if (g_.head_sums && !softmax_) Added::add_up(t.bias_sum, q, keys, slopes_);
    added_.add(q, keys, slopes_, caps_, t.row_sum);
    product<true>(keys.count, static_cast<int>(E_ / kWidth), queries, Strided<float>{weights_ + from, lanes, 1}, t.dout + from * E_, E_, dv_ + keys.first * E_, E_);
    if (p_.weight) return scores_.additive().pull(q, t.turned, keys, slopes_, t.dq_turned, dk_ + keys.first * D_, D_, dweight_ + q.h % p_.repeats() * p_.D);
    product<true>(keys.count, static_cast<int>(D_ / kWidth), queries, Strided<float>{slopes_ + from, lanes, 1}, t.rows + from * D_, D_, dk_ + keys.first * D_, D_);
    const FloatRows k = as_floats(p_.k, q.b, q.g, keys.first, keys.count, p_.D, keys_);
    product<true>(p_.D, keys.vectors(), keys.count, Strided<float>{k.data, 1, k.row}, slopes_ + from, lanes, t.dq_turned + from, lanes);
  }

  // The same by products of pairs: of columns for dP, of queries for dV and dK, of keys for dQ. Weights and slopes are rounded
  // as soon as they are there: the weights in their place, and the slopes twice, in both orders.
  void add_pairs(Tile& t, const Keys& keys) {
    const Queries& q = t.q;
    const int64_t lanes = q.lanes(), from = keys.from * kWidth, depth = keys.vectors() * kWidth / 2;
    float* slope_pairs = slopes_ + kKeys * kTile / 2;
    const Strided<Pair> v{pairs_at(p_.v, q.b, q.g, keys.first), p_.v.row / 2, 1};
    multiply(keys.count, keys.vectors(), p_.E / 2, v, pairs(t.dout_turned) + from, lanes, [&](int64_t row, int vector, auto& sums) __attribute__((always_inline)) {
      constexpr int kVectors = kCountOf<decltype(sums[0])>, kRows = kCountOf<decltype(sums)> / kVectors;
#pragma GCC unroll 8
      for (int r = 0; r < kRows; r += 2) {
        const int64_t n = row + r;
        // All of two rows before the first is stored: it lies where the weights of others are read.
        Pull even[kVectors], odd[kVectors];
#pragma GCC unroll 4
        for (int i = 0; i < kVectors; i++) {
          even[i] = pull(t, keys, n, keys.from + vector + i, sums[r][i]);
          if (r + 1 < kRows) odd[i] = pull(t, keys, n + 1, keys.from + vector + i, sums[r + 1 < kRows ? r + 1 : r][i]);
        }
#pragma GCC unroll 4
        for (int i = 0; i < kVectors; i++) {
          const int64_t at = n * lanes + (keys.from + vector + i) * kWidth;
          store_rounded(weights_, at, even[i].weight), store_rounded(slopes_, at, even[i].slope);
          if (r + 1 < kRows) store_rounded(weights_, at + lanes, odd[i].weight), store_rounded(slopes_, at + lanes, odd[i].slope);
          store(pairs(slope_pairs) + n / 2 * lanes + (keys.from + vector + i) * kWidth, pair_up(even[i].slope, odd[i].slope));
        }
      }
    });
    product<true>(keys.count, static_cast<int>(E_ / kWidth), depth, Strided<Pair>{pairs(weights_) + from / 2, lanes / 2, 1}, pairs(t.dout) + from / 2 * E_, E_, dv_ + keys.first * E_, E_);
    product<true>(keys.count, static_cast<int>(D_ / kWidth), depth, Strided<Pair>{pairs(slopes_) + from / 2, lanes / 2, 1}, pairs(t.rows) + from / 2 * D_, D_, dk_ + keys.first * D_, D_);
    // The keys of a block are paired once for all tiles of a super-tile.
    const int64_t block = keys.first / kKeys * kKeys, count = least(kKeys, p_.S - block);
    if (block != paired_) pair_rows(p_.k, q.b, q.g, block, count, p_.D, keys_, count + count % 2, D_);
    paired_ = block;
    product<true>(p_.D, keys.vectors(), (keys.count + 1) / 2, Strided<Pair>{pairs(keys_) + (keys.first - block) / 2 * D_, 1, D_}, pairs(slope_pairs) + from, lanes, t.dq_turned + from, lanes);
  }

  bool by_pairs() const { return kHasPairs && pairs_; }

  static REGARD_INLINE void store_rounded(float* to, int64_t place, Vec x) { reinterpret_cast<AnyShort*>(reinterpret_cast<uint16_t*>(to) + place)[0] = to_bfloat16(x); }

  // The weights of a block; divided by the sum of the row for pairs alone.
  void weigh(Tile& t, const Keys& keys) {
    const Vec bias = fill(!softmax_ && p_.sink ? p_.sink[t.q.h] * kLog2e : 0.0f), unit = fill(scores_.unit());
    const float *peak = t.peak, *share = t.share;
    if (softmax_ && by_pairs() && !g_.dlse) {
      scores_.fill(t.q, t.turned, keys, weights_, [&](int64_t, int i, auto& x) __attribute__((always_inline)) {
        const Vec high = load(peak + i * kWidth), times = load(share + i * kWidth);
        each_row(0, x, [&](int64_t, Vec& score) __attribute__((always_inline)) { score = exp2_rounded((score - high) * unit) * times; });
      }, caps_);
    } else if (softmax_) {
      scores_.fill(t.q, t.turned, keys, weights_, [&](int64_t, int i, auto& x) __attribute__((always_inline)) {
        const Vec high = load(peak + i * kWidth), times = load(share + i * kWidth);
        each_row(0, x, [&](int64_t, Vec& score) __attribute__((always_inline)) { score = exp2(score - high, unit) * times; });
      }, caps_);
    } else {
      scores_.fill(t.q, t.turned, keys, weights_, [&](int64_t, int i, auto& x) __attribute__((always_inline)) {
        const Vec shift = bias - load(peak + i * kWidth);
        each_row(0, x, [&](int64_t, Vec& score) __attribute__((always_inline)) { score = sigmoid(fma(score, unit, shift)); });
      }, caps_);
    }
  }

  // dS from dP; and the weight, of which dropout may leave nothing.
  struct Pull {
    Vec weight{}, slope{};
  };

  REGARD_INLINE Pull pull(const Tile& t, const Keys& keys, int64_t n, int i, Vec dp) const {
    const int64_t at = n * t.q.lanes() + i * kWidth;
    const Vec p = load(weights_ + at);
    Vec weight = p;
    if (p_.drops) {
      const Vec times = fill(by_pairs() ? p_.kept : 1.0f);  // otherwise a part of dO
      const Bits kept = t.dropout.kept(keys.first + n, i);
      dp = where(kept, dp * times, Vec{}), weight = where(kept, p * times, Vec{});
    }
    const Vec slope = softmax_ ? p * (dp - load(t.delta + i * kWidth)) : p * (fill(1.0f) - p) * dp;
    return {weight, by_pairs() && caps_ ? slope * load(caps_ + at) : slope};
  }

  void finish(Tile& t) {
    const Queries& q = t.q;
    const int64_t row = (q.b * p_.H + q.h) * p_.L + q.first;
    if (g_.dq.data) {
      alignas(64) float scale[kTile];
      for (int64_t i = 0; i < q.lanes(); i++) scale[i] = p_.scale;
      turn_back(t.dq_turned, q.lanes(), scale, p_.D, g_.dq, q.b, q.h, q.first, q.count);
    }
    for (int i = 0; i < q.count; i++) {
      if (g_.dquery_bias) g_.dquery_bias[row + i] = t.row_sum[i];
      if (g_.head_sums && !softmax_) g_.head_sums[row + i] = t.bias_sum[i];
    }
  }

  static void give_row(const Rows& to, int64_t b, int64_t h, int64_t j, int64_t width, const float* sums, int64_t shares, int64_t apart, float scale) {
    for (int64_t c = 0; c < width; c += kWidth) {
      Vec total = load(sums + c);
      for (int64_t n = 1; n < shares; n++) total += load(sums + n * apart + c);
      write(to.at(b, h, j) + c * size_of(to.type), to.type, total * fill(scale), static_cast<int>(least(kWidth, width - c)));
    }
  }

  const Problem& p_;
  const Gradients& g_;
  const int64_t D_, E_;  // widths in whole vectors
  const int count_;
  Scores scores_;
  Added added_;
  const bool pairs_, softmax_;
  int64_t paired_ = -1;  // the first of the keys that keys_ holds in pairs
  float *weights_, *slopes_, *caps_;  // (keys, lanes)
  float* rows_;                       // O and dO, turned
  float *keys_, *values_;             // as floats, where they are of another type; keys in pairs
  float *dk_ = nullptr, *dv_ = nullptr;
  double* dweight_ = nullptr;
  Tile tiles_[kMostTiles];
};

}  // namespace regard::REGARD_SET
