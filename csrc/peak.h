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

// Each gives the sum of all that it computed, so that the compiler must compute it.
inline float multiply(int64_t rounds, float a, float b) {
  Vec sums[kChains];
  for (int i = 0; i < kChains; i++) sums[i] = fill(a * static_cast<float>(i));
  const Vec factor = fill(a), term = fill(b);
  for (int64_t n = 0; n < rounds; n++)
#pragma GCC unroll 12
    for (int i = 0; i < kChains; i++) sums[i] = fma(sums[i], factor, term);
  Vec total{};
  for (int i = 0; i < kChains; i++) total += sums[i];
  return sum(total);
}

#if defined(__AVX512F__)
#define REGARD_PAIRS 1
// The set itself does without the instruction, which not all machines with AVX-512 have.
__attribute__((target("avx512bf16"))) inline float multiply_pairs(int64_t rounds, uint32_t a, uint32_t b) {
  __m512 sums[kChains];
  for (int i = 0; i < kChains; i++) sums[i] = _mm512_set1_ps(static_cast<float>(i));
  const __m512bh left = reinterpret_cast<__m512bh>(fill_word(a)), right = reinterpret_cast<__m512bh>(fill_word(b));
  for (int64_t n = 0; n < rounds; n++)
#pragma GCC unroll 12
    for (int i = 0; i < kChains; i++) sums[i] = _mm512_dpbf16_ps(sums[i], left, right);
  __m512 total = _mm512_setzero_ps();
  for (int i = 0; i < kChains; i++) total += sums[i];
  return sum(reinterpret_cast<Vec>(total));
}
#endif

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
  if (limit == Limit::MultiplyPairs) {
#ifdef REGARD_PAIRS
    if (!__builtin_cpu_supports("avx512bf16")) return 0.0;
    each *= 2.0;
#else
    return 0.0;
#endif
  }
  if (limit == Limit::Read) each = 4.0 * static_cast<double>(work.numbers) * static_cast<double>(rounds);
  const auto task = [](void* context, int64_t worker) {
    const Work& w = *static_cast<const Work*>(context);
    // What the compiler cannot know before, and must not leave out.
    volatile float seen = 0.5f;
    if (w.limit == Limit::Multiply) seen = multiply(w.rounds, seen, 1.0f);
#ifdef REGARD_PAIRS
    if (w.limit == Limit::MultiplyPairs) seen = multiply_pairs(w.rounds, 0x3f803f80u, 0x3a803a80u);
#endif
    for (int64_t n = 0; n < w.rounds && w.limit == Limit::Read; n++) seen = read_all(w.buffer + worker * w.numbers, w.numbers);
  };
  pool.run(pool.threads, task, &work);
  return each * static_cast<double>(pool.threads);
}

}  // namespace regard::REGARD_SET
