// Entmax, and sparsemax, which is entmax of order 2: p = gap^power with gap = max(0, (alpha - 1) s - tau) and power = 1
// / (alpha - 1), where tau is such that the weights of a row sum to 1 (Peters et al., 2019).
//
// tau is represented by two floats: the score at which the gap is 0, and a correction for the rounding of that score.
// The rounding error is common to all weights of a row, so the error of a sum of a thousand weights would be a thousand
// times as large. Subtracting the first from scores near it is exact, so small weights are as precise as large ones.
#pragma once

#include "score.h"

namespace regard::REGARD_SET {

class Entmax {
 public:
  // `scale`: a factor that is not yet applied to the scores.
  Entmax(const Problem& p, float scale)
      : power_(static_cast<float>(1.0 / (p.alpha - 1.0))),
        tau_power_(broadcast(static_cast<float>(2.0 - p.alpha))),
        unit_(broadcast(static_cast<float>((p.alpha - 1.0) * scale))) {}

  float power() const { return power_; }

  // Propagates NaN.
  Vec gap(Vec s, Vec tau, Vec correction) const { return max(Vec{}, fma(s - tau, unit_, -correction)); }

  // A weight, and its derivative by the score up to a factor: p^(2 - alpha) on the support.
  struct WeightDerivative {
    Vec weight, derivative;
  };

  template <int kPower>
  REGARD_INLINE WeightDerivative to_weight(Vec gap) const {
    const LaneMask inside = greater(gap, Vec{});
    if (kPower == 1) return {gap, where(inside, broadcast(1.0f), Vec{})};
    if (kPower == 2) return {gap * gap, gap};
    const Vec derivative = where(inside, exp2(log2(gap), broadcast(power_ - 1.0f)), Vec{});
    return {derivative * gap, derivative};
  }

  Vec weight(Vec gap) const {
    Vec x{};
    by_power([&](auto power) { x = to_weight<decltype(power)::kValue>(gap).weight; });
    return x;
  }

  // Calls the specialization for this power; powers 1 and 2 need no exp2.
  template <class Function>
  void by_power(Function function) const {
    power_ == 1.0f ? function(Constant<1>{}) : power_ == 2.0f ? function(Constant<2>{}) : function(Constant<0>{});
  }

  // Solves for tau of each lane, from the scores s[n * row] of `count` keys and their maximum. `active` has room for
  // `count` vectors.
  //
  // Newton's method on |p|^(alpha - 1) - 1, which is convex and decreasing: starting from the left, no step passes the
  // root, so a score that has fallen below the threshold stays below. Vectors with a score above the threshold are
  // collected in `active`.
  void solve_tau(const float* s, int64_t row, int64_t count, Vec best, float* active, Vec& tau, Vec& correction) const {
    const LaneMask some = greater(best, broadcast(-kInfinity));
    const Vec base = where(some, best, Vec{});
    // The offset at which the largest score alone has weight 1.
    Vec offset = broadcast(-1.0f);
    Sums sums{};
    for (int left = kMaxSteps; left; left--) {
      by_power([&](auto power) { sums = sweep<decltype(power)::kValue>(s, row, count, base, offset, active); });
      s = active, row = kWidth;
      const Vec step = (sums.weight - exp2(log2(sums.weight), tau_power_)) / sums.derivative, moved = offset + step;
      const LaneMask moves = greater(moved, offset);
      if (!moves) break;
      offset = where(moves, moved, offset);
    }
    tau = base + offset / unit_;
    // Recover the rounding error of tau, which is large for large scores, as the initial correction.
    correction = fma(base - tau, unit_, offset);
    by_power(
        [&](auto power) { sums = sweep<decltype(power)::kValue>(active, kWidth, count, tau, correction, active); });
    // The last step may have either sign.
    correction =
        where(some, correction + (sums.weight - broadcast(1.0f)) / (broadcast(power_) * sums.derivative), Vec{});
    tau = where(some, tau, broadcast(kInfinity));
  }

 private:
  static constexpr int kMaxSteps = 100;  // 5 to 8 are typical

  struct Sums {
    Vec weight{}, derivative{};
  };

  // Sums over `count` vectors. Vectors that are not all 0 are collected in `active`; `count` becomes their number.
  template <int kPower>
  Sums sweep(const float* s, int64_t row, int64_t& count, Vec tau, Vec correction, float* active) const {
    Sums sums{};
    int64_t num_active = 0;
    for (int64_t n = 0; n < count;) {
      // Per block: a sum of partial sums rounds less than one long sum.
      Sums part{};
      for (const int64_t end = min64(n + kTile, count); n < end; n++) {
        const Vec x = load(s + n * row), x_gap = gap(x, tau, correction);
        const WeightDerivative one = to_weight<kPower>(x_gap);
        part.weight += one.weight, part.derivative += one.derivative;
        store(active + num_active * kWidth, x);
        num_active += greater(x_gap, Vec{}) != 0;
      }
      sums.weight += part.weight, sums.derivative += part.derivative;
    }
    count = num_active;
    return sums;
  }

  float power_;
  Vec tau_power_, unit_;  // 2 - alpha; (alpha - 1) * scale
};

}  // namespace regard::REGARD_SET
