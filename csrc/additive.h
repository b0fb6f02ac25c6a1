// Additive scores, s = sum over d of w_d tanh(q_d + k_d), and their gradients, without evaluating L x S x D tanh.
//
//   w tanh(x) = w - 2 w / (1 + e^2x)        e^2x = e^2q e^2k: (L + S) D exponentials instead of L S D
//
// After the sign of w moves into x, what remains is a sum of fractions 1 / t with t = c + e^2q (c e^2k) and c = 1 /
// |w|. Four fractions share one division. Each pair is centered: its mean, the value where tanh is 0, is subtracted
// from the numerator before the division. The cost is 3.3 operations per element, 17.7e9 elements per second on a core
// with a peak of 117 GFLOP/s. The rms error of the scores is 1.6 times that of the direct float32 formula (D from 8 to
// 64); without centering it is 7 times.
//
// If an element of q or k exceeds 30 in absolute value, its exponential leaves the float range. A block with such
// elements, or with NaN, evaluates tanh directly. So do sums of fewer than eight terms, where the errors of the
// fractions (3 to 6 times those of tanh) still dominate the error of the sum.
#pragma once

#include "gemm.h"
#include "tile.h"

namespace regard::REGARD_SET {

class Additive {
 public:
  // Floats of scratch; `for_backward` if gradients are computed.
  static int64_t scratch(const Problem& p, bool for_backward) {
    if (!p.weight) return 0;
    const int64_t D = padded(p.D), keys = fours(p.S);
    return (keys + kTile + 4) * D + tiles(p.S) +
           (for_backward ? (keys + kTile + kWidth) * D + kKeysTogether * kWidth * kWidth : 0) + kSlack;
  }

  // Widths are padded to multiples of four.
  static int64_t padded(int64_t D) { return fours(D); }

  Additive(const Problem& p, float* scratch, bool for_backward) : p_(p), D_(padded(p.D)) {
    if (!p.weight) return;
    const auto take = [&](int64_t count) { return (scratch += (count + 15) / 16 * 16) - (count + 15) / 16 * 16; };
    inverse_ = take(D_), mean_ = take(D_ / 2), unit_ = take(D_);
    merged_ = take(fours(p.S) * D_), angles_ = take(kTile * D_);
    ready_ = reinterpret_cast<int32_t*>(take(tiles(p.S)));
    for (int64_t t = 0; t < tiles(p.S); t++) ready_[t] = 0;
    if (!for_backward) return;
    powers_ = take(fours(p.S) * D_), dq_ = take(kTile * D_);
    dweight_ = take(D_ * kWidth), columns_ = take(kKeysTogether * kWidth * kWidth);
  }

  // q_transposed (D, lanes): e^2q, with the signs of the weights; 0 for an element out of range.
  void load_queries(const QueryTile& q, float* q_transposed) {
    prepare_weights(q.h);
    transpose_rows(p_.q, q.b, q.h, q.first, q.count, p_.D, q_transposed, q.lanes());
    for (int64_t d = 0; d < D_; d++)
      for (int i = 0; i < q.vectors; i++) {
        float* at = q_transposed + d * q.lanes() + i * kWidth;
        store(at, d < p_.D ? power(load(at), broadcast(unit_[d])) : broadcast(1.0f));
      }
  }

  // The scores (keys, lanes). As in gemm(), `finish(key, i, x)` may modify them before they are stored.
  template <class Finish>
  void compute(const QueryTile& q, const float* q_transposed, const KeyBlock& keys, float* s, Finish finish) {
    prepare_weights(q.h);
    if (!prepare(q, keys) || !in_range(q, q_transposed)) return compute_by_tanh(q, keys, s, finish);
    by_fours(keys, [&](auto count, int64_t n) { merge<decltype(count)::kValue>(q, q_transposed, keys, n, s, finish); });
  }

  // Adds the contribution of dS (keys, lanes) to dq (D, lanes), to dk (keys, `dk_row` floats each) and to dw (D).
  void backward(const QueryTile& q, const float* q_transposed, const KeyBlock& keys, const float* ds, float* dq,
                float* dk, int64_t dk_row, double* dw) {
    prepare_weights(q.h);
    const bool fast = prepare(q, keys) && in_range(q, q_transposed);
    if (!fast) load_angles(q);
    // Accumulate per block: a sum of partial sums rounds less than one long sum.
    for (int64_t at = 0; at < p_.D * q.lanes(); at += kWidth) store(dq_ + at, Vec{});
    for (int64_t at = 0; at < p_.D * kWidth; at += kWidth) store(dweight_ + at, Vec{});
    by_fours(keys, [&](auto count, int64_t n) {
      constexpr int kKeys = decltype(count)::kValue;
      fast ? backward_some<kKeys, true>(q, q_transposed, keys, n, ds, dk, dk_row)
           : backward_some<kKeys, false>(q, q_transposed, keys, n, ds, dk, dk_row);
    });
    for (int64_t d = 0; d < p_.D; d++) {
      const Vec factor = broadcast(weight_[d] * 4.0f);
      for (int64_t at = d * q.lanes(); at < (d + 1) * q.lanes(); at += kWidth)
        store(dq + at, fma(load(dq_ + at), factor, load(dq + at)));
      dw[d] += (weight_[d] < 0.0f ? -2.0 : 2.0) * sum(load(dweight_ + d * kWidth));
    }
  }

 private:
  static constexpr int kFractionsPerDivision = 4;  // per division
  static constexpr int kKeysTogether = 4;          // keys processed together
  static constexpr int kMinWidth = 8;              // terms per sum
  static constexpr int kSlack = 16 * 9;
  static constexpr float kMaxExponent = 30.0f;
  static constexpr float kMaxTerm = 1e9f;  // above it 1 / t is negligible, and the product of four terms would overflow
  static constexpr float kTwice = 2.0f * kLog2e;
  static constexpr float kTwiceError = static_cast<float>((2.8853900817779268 / kTwice - 1.0) * 0.6931471805599453);

  static int64_t fours(int64_t count) { return (count + 3) / 4 * 4; }
  static int64_t tiles(int64_t S) { return (S + kTile - 1) / kTile; }

  // Four keys at a time where they are stored together; single keys before and after.
  template <class Work>
  static REGARD_INLINE void by_fours(const KeyBlock& keys, Work work) {
    int64_t n = 0;
    for (; n < keys.count && (keys.first + n) % kKeysTogether; n++) work(Constant<1>{}, n);
    for (; n + kKeysTogether <= keys.count; n += kKeysTogether) work(Constant<kKeysTogether>{}, n);
    for (; n < keys.count; n++) work(Constant<1>{}, n);
  }

  // Constants derived from the weights of a head.
  void prepare_weights(int64_t h) {
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
    is_usable_ = some && p_.D >= kMinWidth && largest > 1e-30f && largest < 1e30f;
    // In units of the largest weight, clamped below at 2^-26 of it: the loss is below the float precision of the sum.
    factor_ = -2.0f * largest;
    for (int64_t d = 0; d < D_; d++) {
      const float size = d < p_.D ? __builtin_fabsf(weight[d]) : largest;
      inverse_[d] = size * 0x1p26f > largest ? largest / size : 0x1p26f;
      unit_[d] = d < p_.D && weight[d] < 0.0f ? -kTwice : kTwice;
    }
    for (int64_t d = 0; d < D_; d += 2) mean_[d / 2] = -mean(d) - mean(d + 1);
  }

  // 1 / (2 c); past the width, where t is c, 1 / c.
  float mean(int64_t d) const { return (d < p_.D ? 0.5f : 1.0f) / inverse_[d]; }

  // e^2x, with a sign; 0 if x is out of range or NaN. An error here affects every score that uses the element, so the
  // rounding error of the constant 2 log2 e is corrected.
  static REGARD_INLINE Vec power(Vec x, Vec unit) {
    const Vec limit = broadcast(kMaxExponent), rounded = exp2(x, unit);
    const Vec exact = fma(rounded, x * unit * broadcast(kTwiceError), rounded);
    return where(greater(limit, x) & greater(x, -limit), exact, Vec{});
  }

  bool in_range(const QueryTile& q, const float* q_transposed) const {
    LaneMask all = kAllLanes;
    for (int64_t at = 0; at < p_.D * q.lanes(); at += kWidth) all &= greater(load(q_transposed + at), Vec{});
    return all == kAllLanes;
  }

  // Computes c e^2k of some keys, and e^2k for the gradients, once for all queries of a head, one tile of keys at a
  // time. Returns false if an element is out of range.
  bool prepare(const QueryTile& q, const KeyBlock& keys) {
    if (!is_usable_) return false;
    if (q.b != ready_b_ || q.g != ready_g_) ready_b_ = q.b, ready_g_ = q.g, generation_++;
    bool all = true;
    for (int64_t t = keys.first / kTile; t * kTile < keys.first + keys.count; t++) {
      if (ready_[t] != generation_ && ready_[t] != -generation_)
        ready_[t] = exponentiate_keys(q, t * kTile) ? generation_ : -generation_;
      all &= ready_[t] > 0;
    }
    return all;
  }

  bool exponentiate_keys(const QueryTile& q, int64_t first) {
    LaneMask all = kAllLanes;
    for (int64_t n = first; n < min64(first + kTile, p_.S); n += kKeysTogether)
      for (int64_t d = 0; d < D_; d += kWidth) {
        const int width = static_cast<int>(min64(kWidth, p_.D - d)), room = static_cast<int>(min64(kWidth, D_ - d));
        Vec x[kKeysTogether];
        for (int r = 0; r < kKeysTogether; r++) {
          x[r] = power(load_partial(row(q, min64(n + r, p_.S - 1)) + d, width), load_partial(unit_ + d, room));
          all &= greater(x[r], Vec{}) | ~first_lanes(width);
        }
        if (powers_) store_fours(powers_ + n * D_ + d * kKeysTogether, x, room);
        for (Vec& element : x) element = where(first_lanes(width), element * load_partial(inverse_ + d, room), Vec{});
        store_fours(merged_ + n * D_ + d * kKeysTogether, x, room);
      }
    return all == kAllLanes;
  }

  // to[c * 4 + r] = x[r][c]: four keys are stored side by side.
  static REGARD_INLINE void store_fours(float* to, const Vec (&x)[kKeysTogether], int count) {
    static_assert(kKeysTogether == 4);
    const Vec even[2] = {interleave<0>(x[0], x[2]), interleave<1>(x[0], x[2])},
              odd[2] = {interleave<0>(x[1], x[3]), interleave<1>(x[1], x[3])};
    for (int half = 0; half < 2; half++) {
      store_partial(to + 2 * half * kWidth, interleave<0>(even[half], odd[half]), 4 * count - 2 * half * kWidth);
      store_partial(to + (2 * half + 1) * kWidth, interleave<1>(even[half], odd[half]),
                    4 * count - (2 * half + 1) * kWidth);
    }
  }

  // Offset of key n in column 0.
  int64_t offset(const KeyBlock& keys, int64_t n) const {
    return (keys.first + n) / kKeysTogether * kKeysTogether * D_ + (keys.first + n) % kKeysTogether;
  }

  const float* row(const QueryTile& q, int64_t j) const { return reinterpret_cast<const float*>(p_.k.at(q.b, q.g, j)); }

  template <int kKeys, class Finish>
  REGARD_INLINE void merge(const QueryTile& q, const float* q_transposed, const KeyBlock& keys, int64_t n, float* s,
                           Finish finish) {
    const int64_t lanes = q.lanes();
    const Vec max_term = broadcast(kMaxTerm);
    for (int i = keys.from; i < keys.until; i++) {
      Vec sums[kKeys] = {};
      const float *at = q_transposed + i * kWidth, *key = merged_ + offset(keys, n);
      for (int64_t d = 0; d < D_; d += kFractionsPerDivision, at += kFractionsPerDivision * lanes,
                   key += kFractionsPerDivision * kKeysTogether) {
        const Vec a = load(at), b = load(at + lanes), c = load(at + 2 * lanes), e = load(at + 3 * lanes);
        const auto term = [&](int r, int m, Vec x) __attribute__((always_inline)) {
          return min(fma(broadcast(key[m * kKeysTogether + r]), x, broadcast(inverse_[d + m])), max_term);
        };
        const Vec left = broadcast(mean_[d / 2]), right = broadcast(mean_[d / 2 + 1]);
#pragma GCC unroll 4
        for (int r = 0; r < kKeys; r++) {
          const Vec t = term(r, 0, a), u = term(r, 1, b), v = term(r, 2, c), w = term(r, 3, e);
          const Vec tu = t * u, vw = v * w;
          const Vec first = fma(left, tu, t + u), second = fma(right, vw, v + w);
          sums[r] += fma(first, vw, second * tu) / (tu * vw);
        }
      }
#pragma GCC unroll 4
      for (int r = 0; r < kKeys; r++) sums[r] *= broadcast(factor_);
      finish(n, i, sums);
#pragma GCC unroll 4
      for (int r = 0; r < kKeys; r++) store(s + (n + r) * lanes + i * kWidth, sums[r]);
    }
  }

  void load_angles(const QueryTile& q) const {
    transpose_rows(p_.q, q.b, q.h, q.first, q.count, p_.D, angles_, q.lanes());
  }

  template <class Finish>
  void compute_by_tanh(const QueryTile& q, const KeyBlock& keys, float* s, Finish finish) {
    load_angles(q);
    for (int64_t n = 0; n < keys.count; n++) {
      const float* k = row(q, keys.first + n);
      for (int i = keys.from; i < keys.until; i++) {
        Vec total{};
        for (int64_t d = 0; d < p_.D; d += kWidth) {
          Vec part{};
          for (int64_t c = d; c < min64(d + kWidth, p_.D); c++)
            part = fma(broadcast(weight_[c]), tanh_of(load(angles_ + c * q.lanes() + i * kWidth), k[c]).value, part);
          total += part;
        }
        Vec x[1] = {total};
        finish(n, i, x);
        store(s + n * q.lanes() + i * kWidth, x[0]);
      }
    }
  }

  static REGARD_INLINE Tanh tanh_of(Vec q, float k) { return tanh((q + broadcast(k)) * broadcast(kTwice)); }

  // For some keys, one vector of columns at a time: dS times a quarter of the derivative of tanh, accumulated in dq_
  // and, summed over the lanes, in dk; and dS times half of tanh with the sign of the weight, accumulated for dw.
  template <int kKeys, bool kFast>
  void backward_some(const QueryTile& q, const float* q_transposed, const KeyBlock& keys, int64_t n, const float* ds,
                     float* dk, int64_t dk_row) {
    const int64_t lanes = q.lanes();
    const Vec one = broadcast(1.0f), half = broadcast(0.5f), max_term = broadcast(1e30f);
    for (int64_t from = 0; from < p_.D; from += kWidth) {
      const int width = static_cast<int>(min64(kWidth, p_.D - from));
      for (int c = 0; c < width; c++) {
        const int64_t d = from + c;
        const Vec sign = broadcast(weight_[d] < 0.0f ? -0.5f : 0.5f);
        Vec total{}, column[kKeys] = {}, key[kKeys];
#pragma GCC unroll 4
        for (int r = 0; r < kKeys; r++)
          key[r] = broadcast(kFast ? powers_[offset(keys, n) + d * kKeysTogether + r] : row(q, keys.first + n + r)[d]);
        for (int i = keys.from; i < keys.until; i++) {
          const int64_t at = d * lanes + i * kWidth;
          Vec x = load((kFast ? q_transposed : angles_) + at), dq = load(dq_ + at);
#pragma GCC unroll 4
          for (int r = 0; r < kKeys; r++) {
            const Vec ds_i = load(ds + (n + r) * lanes + i * kWidth);
            Vec value, derivative;
            if (kFast) {
              const Vec fraction = reciprocal(min(fma(key[r], x, one), max_term));
              value = half - fraction, derivative = fma(-fraction, fraction, fraction);
            } else {
              const Tanh t = tanh((x + key[r]) * broadcast(kTwice));
              value = t.value * sign, derivative = t.derivative * broadcast(0.25f);
            }
            const Vec h = ds_i * derivative;
            dq += h, column[r] += h;
            total = fma(ds_i, value, total);
          }
          store(dq_ + at, dq);
        }
        store(dweight_ + d * kWidth, load(dweight_ + d * kWidth) + total);
#pragma GCC unroll 4
        for (int r = 0; r < kKeys; r++) store(columns_ + (r * kWidth + c) * kWidth, column[r]);
      }
      const Vec factor = load_partial(weight_ + from, width) * broadcast(4.0f);
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
  const int64_t D_;                // the padded width
  const float* weight_ = nullptr;  // of the current head
  bool is_usable_ = false;
  float factor_ = 0.0f;
  float* inverse_ = nullptr;                     // c
  float* mean_ = nullptr;                        // minus the sum of 1 / t of each pair where tanh is 0
  float* unit_ = nullptr;                        // +-2 log2 e
  float *merged_ = nullptr, *powers_ = nullptr;  // (keys / 4, D, 4): c e^2k and e^2k
  float* angles_ = nullptr;                      // (D, lanes): q itself, for the direct evaluation
  float *dq_ = nullptr, *dweight_ = nullptr, *columns_ = nullptr;
  // Per tile of keys: the generation (batch row, head, weights) for which its exponentials were computed, counted from
  // 1; negative if they are unusable.
  int32_t* ready_ = nullptr;
  int32_t generation_ = 0;
  int64_t ready_b_ = -1, ready_g_ = -1;
};

}  // namespace regard::REGARD_SET
