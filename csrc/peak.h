// Peak throughput of the machine: loops of nothing but FMAs on registers, or nothing but reads. Benchmarks report
// kernels relative to these peaks.
#pragma once

#include "problem.h"
#include "simd.h"

namespace regard::REGARD_SET {

// Independent sums: enough to keep two units with a latency of five cycles busy; more would leave sets with 16
// registers none for the operands.
constexpr int kChains = 12;
constexpr int kSums = 8;  // of the memory-bound loop

REGARD_INLINE Vec step(Vec total, Vec a, Vec b) { return fma(total, a, b); }
REGARD_INLINE Vec step(Vec total, UInt a, UInt b) { return fma(a, b, total); }

// Each loop returns the sum of all its results, so that the compiler cannot remove it. Operands are floats or pairs of
// bfloat16.
template <class Operands>
inline float multiply(int64_t rounds, Operands a, Operands b) {
  Vec sums[kChains];
  for (int i = 0; i < kChains; i++) sums[i] = broadcast(static_cast<float>(i));
  for (int64_t n = 0; n < rounds; n++)
#pragma GCC unroll 12
    for (int i = 0; i < kChains; i++) sums[i] = step(sums[i], a, b);
  Vec total{};
  for (int i = 0; i < kChains; i++) total += sums[i];
  return sum(total);
}

inline float read_all(const float* from, int64_t count) {
  Vec sums[kSums] = {};
  for (int64_t n = 0; n + kSums * kWidth <= count; n += kSums * kWidth)
#pragma GCC unroll 8
    for (int i = 0; i < kSums; i++) sums[i] += load(from + n + i * kWidth);
  Vec total{};
  for (int i = 0; i < kSums; i++) total += sums[i];
  return sum(total);
}

// Runs `rounds` rounds on every thread of the pool; for reads, each thread reads its part of the buffer. Returns
// the number of operations (an FMA counts as two) or bytes; 0 if the machine lacks the instruction.
inline double peak(PeakKind kind, int64_t rounds, const float* buffer, int64_t count, const Pool& pool) {
  struct Work {
    PeakKind kind;
    int64_t rounds;
    const float* buffer;
    int64_t count;
  } work{kind, rounds, buffer, count / pool.threads / (kSums * kWidth) * (kSums * kWidth)};
  double per_thread = 2.0 * kChains * kWidth * static_cast<double>(rounds);
  if (kind == PeakKind::BF16Dot) per_thread *= kHasBF16Dot ? 2.0 : 0.0;
  if (kind == PeakKind::Read) per_thread = 4.0 * static_cast<double>(work.count) * static_cast<double>(rounds);
  const auto task = [](void* context, int64_t worker) {
    const Work& w = *static_cast<const Work*>(context);
    // Volatile: the compiler can neither predict the operand nor drop the result.
    volatile float value = 0.5f;
    if (w.kind == PeakKind::FMA) value = multiply(w.rounds, broadcast(value), broadcast(1.0f));
    if (w.kind == PeakKind::BF16Dot && kHasBF16Dot)
      value = multiply(w.rounds, broadcast_uint(0x3f803f80u), broadcast_uint(0x3a803a80u));
    for (int64_t n = 0; n < w.rounds && w.kind == PeakKind::Read; n++)
      value = read_all(w.buffer + worker * w.count, w.count);
  };
  pool.run(pool.threads, task, &work);
  return per_thread * static_cast<double>(pool.threads);
}

}  // namespace regard::REGARD_SET
