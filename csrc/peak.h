// The most that the machine can do: loops of nothing but multiply-adds on registers, and of nothing but reads. The kernels
// are measured against them.
#pragma once

#include "problem.h"
#include "simd.h"

namespace regard::REGARD_SET {

// So many sums that do not wait for one another keep two units busy whose results take five cycles; more of them, and the
// sets with 16 registers have none left for the numbers.
constexpr int kChains = 12;
constexpr int kSums = 8;  // of a loop that waits for memory anyhow

REGARD_INLINE Vec step(Vec total, Vec a, Vec b) { return fma(total, a, b); }
REGARD_INLINE Vec step(Vec total, Word a, Word b) { return fma(a, b, total); }

// Each gives the sum of all that it computed, so that the compiler must compute it. Numbers are floats, or pairs of bfloat16.
template <class Numbers>
inline float multiply(int64_t rounds, Numbers a, Numbers b) {
  Vec sums[kChains];
  for (int i = 0; i < kChains; i++) sums[i] = fill(static_cast<float>(i));
  for (int64_t n = 0; n < rounds; n++)
#pragma GCC unroll 12
    for (int i = 0; i < kChains; i++) sums[i] = step(sums[i], a, b);
  Vec total{};
  for (int i = 0; i < kChains; i++) total += sums[i];
  return sum(total);
}

inline float read_all(const float* from, int64_t numbers) {
  Vec sums[kSums] = {};
  for (int64_t n = 0; n + kSums * kWidth <= numbers; n += kSums * kWidth)
#pragma GCC unroll 8
    for (int i = 0; i < kSums; i++) sums[i] += load(from + n + i * kWidth);
  Vec total{};
  for (int i = 0; i < kSums; i++) total += sums[i];
  return sum(total);
}

// Every thread of the pool works for so many rounds, or reads its part of the buffer so often. -> how many operations (a
// multiply-add is two) or bytes it was; 0 where the machine does not have the instruction.
inline double peak(Limit limit, int64_t rounds, const float* buffer, int64_t numbers, const Pool& pool) {
  struct Work {
    Limit limit;
    int64_t rounds;
    const float* buffer;
    int64_t numbers;
  } work{limit, rounds, buffer, numbers / pool.threads / (kSums * kWidth) * (kSums * kWidth)};
  double each = 2.0 * kChains * kWidth * static_cast<double>(rounds);
  if (limit == Limit::MultiplyPairs) each *= kHasPairs ? 2.0 : 0.0;
  if (limit == Limit::Read) each = 4.0 * static_cast<double>(work.numbers) * static_cast<double>(rounds);
  const auto task = [](void* context, int64_t worker) {
    const Work& w = *static_cast<const Work*>(context);
    // What the compiler cannot know before, and must not leave out.
    volatile float seen = 0.5f;
    if (w.limit == Limit::Multiply) seen = multiply(w.rounds, fill(seen), fill(1.0f));
    if (w.limit == Limit::MultiplyPairs && kHasPairs) seen = multiply(w.rounds, fill_word(0x3f803f80u), fill_word(0x3a803a80u));
    for (int64_t n = 0; n < w.rounds && w.limit == Limit::Read; n++) seen = read_all(w.buffer + worker * w.numbers, w.numbers);
  };
  pool.run(pool.threads, task, &work);
  return each * static_cast<double>(pool.threads);
}

}  // namespace regard::REGARD_SET
