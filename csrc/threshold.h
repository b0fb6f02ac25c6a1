// Entmax, and sparsemax, which is the entmax of order 2: p = gap^power with gap = max(0, (alpha - 1) s - tau) and power = 1 /
// (alpha - 1), where tau is such that the weights of a row sum to 1.
//
// tau is told by two numbers: the score at which the gap is 0, as a float, and the rest that makes up for its rounding, which
// all weights of a row have in common: a thousand of them would be off by a thousand times that. The scores beside the
// threshold lose nothing when the first is subtracted, so that small weights are as precise as large ones.
#pragma once

#include "score.h"

namespace regard::REGARD_SET {

class Threshold {
 public:
  // `scale` is what the scores are still to be multiplied by.
  Threshold(const Problem& p, float scale)
      : power_(static_cast<float>(1.0 / (p.alpha - 1.0))), root_(fill(static_cast<float>(2.0 - p.alpha))), unit_(fill(static_cast<float>((p.alpha - 1.0) * scale))) {}

  float power() const { return power_; }

  // NaN stays NaN.
  Vec gap(Vec s, Vec at, Vec rest) const { return max(Vec{}, fma(s - at, unit_, -rest)); }

  // A weight, and its derivative by the score, up to a factor: p^(2 - alpha), on the support.
  struct Worth {
    Vec weight, slope;
  };

  template <int kPower>
  REGARD_INLINE Worth worth(Vec gap) const {
    const Bits inside = greater(gap, Vec{});
    if (kPower == 1) return {gap, where(inside, fill(1.0f), Vec{})};
    if (kPower == 2) return {gap * gap, gap};
    const Vec slope = where(inside, exp2(log2(gap), fill(power_ - 1.0f)), Vec{});
    return {slope * gap, slope};
  }

  Vec weight(Vec gap) const {
    Vec x{};
    by_power([&](auto power) { x = worth<decltype(power)::kValue>(gap).weight; });
    return x;
  }

  // Runs what is compiled for this power: 1 and 2 need no powers at all.
  template <class Run>
  void by_power(Run run) const {
    power_ == 1.0f ? run(Constant<1>{}) : power_ == 2.0f ? run(Constant<2>{}) : run(Constant<0>{});
  }

  // The threshold of each lane, from the scores s[n * row] of `count` keys and the largest of them. `few` has room for as
  // many vectors.
  //
  // Newton's method on |p|^(alpha - 1) - 1, which is convex and falling: from the left no step passes the root, so that what
  // has once fallen below the threshold does not count any more. The vectors in which some lane still counts are gathered.
  void solve(const float* s, int64_t row, int64_t count, Vec best, float* few, Vec& at, Vec& rest) const {
    const Bits some = greater(best, fill(-kInfinity));
    const Vec base = where(some, best, Vec{});
    // There the largest entry alone has the weight 1.
    Vec tau = fill(-1.0f);
    Sums sums{};
    for (int left = kMostSteps; left; left--) {
      by_power([&](auto power) { sums = sweep<decltype(power)::kValue>(s, row, count, base, tau, few); });
      s = few, row = kWidth;
      const Vec step = (sums.weight - exp2(log2(sums.weight), root_)) / sums.slope, moved = tau + step;
      const Bits moves = greater(moved, tau);
      if (!moves) break;
      tau = where(moves, moved, tau);
    }
    at = base + tau / unit_;
    // What the rounding took, which is much where the scores are large: the last step is for what is small.
    rest = fma(base - at, unit_, tau);
    by_power([&](auto power) { sums = sweep<decltype(power)::kValue>(few, kWidth, count, at, rest, few); });
    // The last step, of either sign.
    rest = where(some, rest + (sums.weight - fill(1.0f)) / (fill(power_) * sums.slope), Vec{});
    at = where(some, at, fill(kInfinity));
  }

 private:
  static constexpr int kMostSteps = 100;  // 5 to 8 are taken

  struct Sums {
    Vec weight{}, slope{};
  };

  // The sums over `count` vectors; those that are not 0 are gathered in `few`, and counted.
  template <int kPower>
  Sums sweep(const float* s, int64_t row, int64_t& count, Vec at, Vec rest, float* few) const {
    Sums sums{};
    int64_t kept = 0;
    for (int64_t n = 0; n < count;) {
      // By blocks: the sum of sums rounds less than one long sum.
      Sums part{};
      for (const int64_t end = least(n + kTile, count); n < end; n++) {
        const Vec x = load(s + n * row), open = gap(x, at, rest);
        const Worth one = worth<kPower>(open);
        part.weight += one.weight, part.slope += one.slope;
        store(few + kept * kWidth, x);
        kept += greater(open, Vec{}) != 0;
      }
      sums.weight += part.weight, sums.slope += part.slope;
    }
    count = kept;
    return sums;
  }

  float power_;
  Vec root_, unit_;  // 2 - alpha; (alpha - 1) times the scale
};

}  // namespace regard::REGARD_SET
