// Additive scores, s = sum over d of w_d tanh(q_d + k_d), and their gradients, without a tanh for each of L x S x D places.
//
//   w tanh(x) = w - 2 w / (1 + e^2x)        e^2x = e^2q e^2k: (L + S) D exponentials do for L S D of them
//
// With the sign of w given to x, what is left is a sum of fractions 1 / t, t = c + e^2q (c e^2k), c = 1 / |w|. Four of them
// share one division; and each pair is centred: its mean, where tanh is 0, is taken from the numerator before the division.
// That is 3.3 operations a place, 17.7 G places a second on a core whose peak is 117 GFLOP/s. Beside the usual way in
// float32, the errors of scores are 1.6 times as large (rms, D from 8 to 64); without centring, 7 times.
//
// The exponentials of q or k beyond +-30 leave the range of floats: a block with such numbers, or with NaN, takes the long
// way, by tanh itself. So do sums of fewer than eight: errors of the fractions, 3 to 6 times those of tanh, are not yet
// those of the sum.
#pragma once

#include "product.h"
#include "tile.h"

namespace regard::REGARD_SET {

class Additive {
 public:
  // Numbers of scratch; `pulls` where gradients are wanted.
  static int64_t scratch(const Problem& p, bool pulls) {
    if (!p.weight) return 0;
    const int64_t D = padded(p.D), keys = fours(p.S);
    return (keys + kTile + 4) * D + tiles(p.S) + (pulls ? (keys + kTile + kWidth) * D + kTogether * kWidth * kWidth : 0) + kSlack;
  }

  // Widths are filled up to whole fours.
  static int64_t padded(int64_t D) { return fours(D); }

  Additive(const Problem& p, float* scratch, bool pulls) : p_(p), D_(padded(p.D)) {
    if (!p.weight) return;
    const auto take = [&](int64_t numbers) { return (scratch += (numbers + 15) / 16 * 16) - (numbers + 15) / 16 * 16; };
    inverse_ = take(D_), mean_ = take(D_ / 2), unit_ = take(D_);
    merged_ = take(fours(p.S) * D_), angles_ = take(kTile * D_);
    ready_ = reinterpret_cast<int32_t*>(take(tiles(p.S)));
    for (int64_t t = 0; t < tiles(p.S); t++) ready_[t] = 0;
    if (!pulls) return;
    powers_ = take(fours(p.S) * D_), dq_ = take(kTile * D_);
    dweight_ = take(D_ * kWidth), columns_ = take(kTogether * kWidth * kWidth);
  }

  // (D, lanes): e^2q, with the signs of the weights; 0 for a number that is out of range.
  void turn_queries(const Queries& q, float* turned) {
    weigh(q.h);
    turn(p_.q, q.b, q.h, q.first, q.count, p_.D, turned, q.lanes());
    for (int64_t d = 0; d < D_; d++)
      for (int i = 0; i < q.vectors; i++) {
        float* at = turned + d * q.lanes() + i * kWidth;
        store(at, d < p_.D ? power(load(at), regard::REGARD_SET::fill(unit_[d])) : regard::REGARD_SET::fill(1.0f));
      }
  }

  // The scores (keys, lanes), which are given to `finish(key, i, x)`, as by a product, before they are stored.
  template <class Finish>
  void fill(const Queries& q, const float* turned, const Keys& keys, float* s, Finish finish) {
    weigh(q.h);
    if (!prepare(q, keys) || !in_range(q, turned)) return fill_by_tanh(q, keys, s, finish);
    by_fours(keys, [&](auto count, int64_t n) { merge<decltype(count)::kValue>(q, turned, keys, n, s, finish); });
  }

  // Adds what the slopes dS (keys, lanes) of the same queries and keys give to dq (D, lanes), to dk (keys, `dk_row` numbers
  // each), and to dw (D).
  void pull(const Queries& q, const float* turned, const Keys& keys, const float* slopes, float* dq, float* dk, int64_t dk_row, double* dw) {
    weigh(q.h);
    const bool fast = prepare(q, keys) && in_range(q, turned);
    if (!fast) turn_angles(q);
    // Gathered by blocks: the sum of sums rounds less than one long sum.
    for (int64_t at = 0; at < p_.D * q.lanes(); at += kWidth) store(dq_ + at, Vec{});
    for (int64_t at = 0; at < p_.D * kWidth; at += kWidth) store(dweight_ + at, Vec{});
    by_fours(keys, [&](auto count, int64_t n) {
      constexpr int kKeys = decltype(count)::kValue;
      fast ? pull_some<kKeys, true>(q, turned, keys, n, slopes, dk, dk_row) : pull_some<kKeys, false>(q, turned, keys, n, slopes, dk, dk_row);
    });
    for (int64_t d = 0; d < p_.D; d++) {
      const Vec factor = regard::REGARD_SET::fill(weight_[d] * 4.0f);
      for (int64_t at = d * q.lanes(); at < (d + 1) * q.lanes(); at += kWidth) store(dq + at, fma(load(dq_ + at), factor, load(dq + at)));
      dw[d] += (weight_[d] < 0.0f ? -2.0 : 2.0) * sum(load(dweight_ + d * kWidth));
    }
  }

 private:
  static constexpr int kMerged = 4;     // fractions a division
  static constexpr int kTogether = 4;   // keys at a time
  static constexpr int kFewest = 8;     // numbers a sum
  static constexpr int kSlack = 16 * 9;
  static constexpr float kReach = 30.0f;
  static constexpr float kMost = 1e9f;  // beyond, 1 / t is nothing, and four of them are no float any more
  static constexpr float kTwice = 2.0f * kLog2e;
  static constexpr float kTwiceLost = static_cast<float>((2.8853900817779268 / kTwice - 1.0) * 0.6931471805599453);

  static int64_t fours(int64_t count) { return (count + 3) / 4 * 4; }
  static int64_t tiles(int64_t S) { return (S + kTile - 1) / kTile; }

  // Four keys at a time, as they lie together; before and after, one.
  template <class Work>
  static REGARD_INLINE void by_fours(const Keys& keys, Work work) {
    int64_t n = 0;
    for (; n < keys.count && (keys.first + n) % kTogether; n++) work(Constant<1>{}, n);
    for (; n + kTogether <= keys.count; n += kTogether) work(Constant<kTogether>{}, n);
    for (; n < keys.count; n++) work(Constant<1>{}, n);
  }

  // The numbers that stand for the weights of a head.
  void weigh(int64_t h) {
    const float* weight = p_.weight + h * p_.weight_head;
    if (weight == weight_) return;
    weight_ = weight, generation_++;
    float largest = 0.0f;
    bool some = true;
    for (int64_t d = 0; d < p_.D; d++) {
      const float size = __builtin_fabsf(weight[d]);
      some &= size < kInfinity;
      if (size > largest) largest = size;
    }
    usable_ = some && p_.D >= kFewest && largest > 1e-30f && largest < 1e30f;
    // In units of the largest weight, and none below 2^-26 of it: less is lost than a float can hold of the sum.
    factor_ = -2.0f * largest;
    for (int64_t d = 0; d < D_; d++) {
      const float size = d < p_.D ? __builtin_fabsf(weight[d]) : largest;
      inverse_[d] = size * 0x1p26f > largest ? largest / size : 0x1p26f;
      unit_[d] = d < p_.D && weight[d] < 0.0f ? -kTwice : kTwice;
    }
    for (int64_t d = 0; d < D_; d += 2) mean_[d / 2] = -mean(d) - mean(d + 1);
  }

  // Half of 1 / c; but past the width, where t is c, the whole of it.
  float mean(int64_t d) const { return (d < p_.D ? 0.5f : 1.0f) / inverse_[d]; }

  // e^2x, with a sign; 0 where x is out of range, or NaN. An error here is in all scores that the number has a part in, so
  // what 2 log2 e was rounded by is made good.
  static REGARD_INLINE Vec power(Vec x, Vec unit) {
    const Vec reach = regard::REGARD_SET::fill(kReach), rounded = exp2(x, unit);
    const Vec exact = fma(rounded, x * unit * regard::REGARD_SET::fill(kTwiceLost), rounded);
    return where(greater(reach, x) & greater(x, -reach), exact, Vec{});
  }

  bool in_range(const Queries& q, const float* turned) const {
    Bits all = kAll;
    for (int64_t at = 0; at < p_.D * q.lanes(); at += kWidth) all &= greater(load(turned + at), Vec{});
    return all == kAll;
  }

  // c e^2k of some keys, and e^2k for the gradients; false where a number is out of range. They are made once for all queries
  // of a head, a tile of keys at a time.
  bool prepare(const Queries& q, const Keys& keys) {
    if (!usable_) return false;
    if (q.b != ready_b_ || q.g != ready_g_) ready_b_ = q.b, ready_g_ = q.g, generation_++;
    bool all = true;
    for (int64_t t = keys.first / kTile; t * kTile < keys.first + keys.count; t++) {
      if (ready_[t] != generation_ && ready_[t] != -generation_) ready_[t] = take_keys(q, t * kTile) ? generation_ : -generation_;
      all &= ready_[t] > 0;
    }
    return all;
  }

  bool take_keys(const Queries& q, int64_t first) {
    Bits all = kAll;
    for (int64_t n = first; n < least(first + kTile, p_.S); n += kTogether)
      for (int64_t d = 0; d < D_; d += kWidth) {
        const int width = static_cast<int>(least(kWidth, p_.D - d)), room = static_cast<int>(least(kWidth, D_ - d));
        Vec x[kTogether];
        for (int r = 0; r < kTogether; r++) {
          x[r] = power(load_some(row(q, least(n + r, p_.S - 1)) + d, width), load_some(unit_ + d, room));
          all &= greater(x[r], Vec{}) | ~below(width);
        }
        if (powers_) store_fours(powers_ + n * D_ + d * kTogether, x, room);
        for (Vec& number : x) number = where(below(width), number * load_some(inverse_ + d, room), Vec{});
        store_fours(merged_ + n * D_ + d * kTogether, x, room);
      }
    return all == kAll;
  }

  // to[c * 4 + r] = x[r][c], so that four keys are read side by side.
  static REGARD_INLINE void store_fours(float* to, const Vec (&x)[kTogether], int count) {
    static_assert(kTogether == 4);
    const Vec even[2] = {zip<0>(x[0], x[2]), zip<1>(x[0], x[2])}, odd[2] = {zip<0>(x[1], x[3]), zip<1>(x[1], x[3])};
    for (int half = 0; half < 2; half++) {
      store_some(to + 2 * half * kWidth, zip<0>(even[half], odd[half]), 4 * count - 2 * half * kWidth);
      store_some(to + (2 * half + 1) * kWidth, zip<1>(even[half], odd[half]), 4 * count - (2 * half + 1) * kWidth);
    }
  }

  // Where the number of a key is, for the first column.
  int64_t place(const Keys& keys, int64_t n) const { return (keys.first + n) / kTogether * kTogether * D_ + (keys.first + n) % kTogether; }

  const float* row(const Queries& q, int64_t j) const { return reinterpret_cast<const float*>(p_.k.at(q.b, q.g, j)); }

  template <int kKeys, class Finish>
  REGARD_INLINE void merge(const Queries& q, const float* turned, const Keys& keys, int64_t n, float* s, Finish finish) {
    const int64_t lanes = q.lanes();
    const Vec most = regard::REGARD_SET::fill(kMost);
    for (int i = keys.from; i < keys.upto; i++) {
      Vec sums[kKeys] = {};
      const float *at = turned + i * kWidth, *key = merged_ + place(keys, n);
      for (int64_t d = 0; d < D_; d += kMerged, at += kMerged * lanes, key += kMerged * kTogether) {
        const Vec a = load(at), b = load(at + lanes), c = load(at + 2 * lanes), e = load(at + 3 * lanes);
        const auto term = [&](int r, int m, Vec x) __attribute__((always_inline)) {
          return min(fma(regard::REGARD_SET::fill(key[m * kTogether + r]), x, regard::REGARD_SET::fill(inverse_[d + m])), most);
        };
        const Vec left = regard::REGARD_SET::fill(mean_[d / 2]), right = regard::REGARD_SET::fill(mean_[d / 2 + 1]);
#pragma GCC unroll 4
        for (int r = 0; r < kKeys; r++) {
          const Vec t = term(r, 0, a), u = term(r, 1, b), v = term(r, 2, c), w = term(r, 3, e);
          const Vec tu = t * u, vw = v * w;
          const Vec first = fma(left, tu, t + u), second = fma(right, vw, v + w);
          sums[r] += fma(first, vw, second * tu) / (tu * vw);
        }
      }
#pragma GCC unroll 4
      for (int r = 0; r < kKeys; r++) sums[r] *= regard::REGARD_SET::fill(factor_);
      finish(n, i, sums);
#pragma GCC unroll 4
      for (int r = 0; r < kKeys; r++) store(s + (n + r) * lanes + i * kWidth, sums[r]);
    }
  }

  void turn_angles(const Queries& q) const { turn(p_.q, q.b, q.h, q.first, q.count, p_.D, angles_, q.lanes()); }

  template <class Finish>
  void fill_by_tanh(const Queries& q, const Keys& keys, float* s, Finish finish) {
    turn_angles(q);
    for (int64_t n = 0; n < keys.count; n++) {
      const float* k = row(q, keys.first + n);
      for (int i = keys.from; i < keys.upto; i++) {
        Vec total{};
        for (int64_t d = 0; d < p_.D; d += kWidth) {
          Vec part{};
          for (int64_t c = d; c < least(d + kWidth, p_.D); c++) part = fma(regard::REGARD_SET::fill(weight_[c]), tanh_of(load(angles_ + c * q.lanes() + i * kWidth), k[c]).value, part);
          total += part;
        }
        Vec x[1] = {total};
        finish(n, i, x);
        store(s + n * q.lanes() + i * kWidth, x[0]);
      }
    }
  }

  static REGARD_INLINE Tanh tanh_of(Vec q, float k) { return tanh((q + regard::REGARD_SET::fill(k)) * regard::REGARD_SET::fill(kTwice)); }

  // Of some keys, for a vector of columns at a time: dS times a quarter of the derivative of tanh, gathered in dq_ and summed
  // up over the lanes for dk; and dS times half of tanh, with the sign of the weight, gathered for dw.
  template <int kKeys, bool kFast>
  void pull_some(const Queries& q, const float* turned, const Keys& keys, int64_t n, const float* slopes, float* dk, int64_t dk_row) {
    const int64_t lanes = q.lanes();
    const Vec one = regard::REGARD_SET::fill(1.0f), half = regard::REGARD_SET::fill(0.5f), most = regard::REGARD_SET::fill(1e30f);
    for (int64_t from = 0; from < p_.D; from += kWidth) {
      const int width = static_cast<int>(least(kWidth, p_.D - from));
      for (int c = 0; c < width; c++) {
        const int64_t d = from + c;
        const Vec sign = regard::REGARD_SET::fill(weight_[d] < 0.0f ? -0.5f : 0.5f);
        Vec total{}, column[kKeys] = {}, key[kKeys];
#pragma GCC unroll 4
        for (int r = 0; r < kKeys; r++) key[r] = regard::REGARD_SET::fill(kFast ? powers_[place(keys, n) + d * kTogether + r] : row(q, keys.first + n + r)[d]);
        for (int i = keys.from; i < keys.upto; i++) {
          const int64_t at = d * lanes + i * kWidth;
          Vec x = load((kFast ? turned : angles_) + at), dq = load(dq_ + at);
#pragma GCC unroll 4
          for (int r = 0; r < kKeys; r++) {
            const Vec slope = load(slopes + (n + r) * lanes + i * kWidth);
            Vec value, rise;
            if (kFast) {
              const Vec fraction = reciprocal(min(fma(key[r], x, one), most));
              value = half - fraction, rise = fma(-fraction, fraction, fraction);
            } else {
              const Tanh t = tanh((x + key[r]) * regard::REGARD_SET::fill(kTwice));
              value = t.value * sign, rise = t.slope * regard::REGARD_SET::fill(0.25f);
            }
            const Vec h = slope * rise;
            dq += h, column[r] += h;
            total = fma(slope, value, total);
          }
          store(dq_ + at, dq);
        }
        store(dweight_ + d * kWidth, load(dweight_ + d * kWidth) + total);
#pragma GCC unroll 4
        for (int r = 0; r < kKeys; r++) store(columns_ + (r * kWidth + c) * kWidth, column[r]);
      }
      const Vec factor = load_some(weight_ + from, width) * regard::REGARD_SET::fill(4.0f);
      for (int r = 0; r < kKeys; r++) {
        Vec column[kWidth];
#pragma GCC unroll 16
        for (int c = 0; c < kWidth; c++) column[c] = c < width ? load(columns_ + (r * kWidth + c) * kWidth) : Vec{};
        float* to = dk + (n + r) * dk_row + from;
        store(to, fma(sum_each(column), factor, load(to)));
      }
    }
  }

  const Problem& p_;
  const int64_t D_;  // the width, filled up
  const float* weight_ = nullptr;  // of the head at hand
  bool usable_ = false;
  float factor_ = 0.0f;
  float *inverse_ = nullptr, *mean_ = nullptr, *unit_ = nullptr;  // c; less what each pair of 1 / t is where tanh is 0; +-2 log2 e
  float *merged_ = nullptr, *powers_ = nullptr;                   // c e^2k and e^2k (keys / 4, D, 4)
  float *angles_ = nullptr;                                       // q itself (D, lanes), for the long way
  float *dq_ = nullptr, *dweight_ = nullptr, *columns_ = nullptr;
  // Of which keys, batch rows and weights the numbers of a tile of keys are, counted from 1; negative where they are no use.
  int32_t* ready_ = nullptr;
  int32_t generation_ = 0;
  int64_t ready_b_ = -1, ready_g_ = -1;
};

}  // namespace regard::REGARD_SET
