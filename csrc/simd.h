// Vectors of as many floats as a register of the instruction set holds, and the few things that are done with them.
//
// Arithmetic is that of the vector extensions of GCC and Clang. What these do not offer, or not in one instruction, is
// written for each set here, and nowhere else. This file is compiled once per set, in a namespace of its own, so that the
// linker never takes the code of one set for that of another: nothing in it may come from the standard library.
#pragma once

#include <stdint.h>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#define REGARD_INLINE inline __attribute__((always_inline))

namespace regard::REGARD_SET {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

using Vec = float __attribute__((vector_size(4 * kWidth)));
using Int = int32_t __attribute__((vector_size(4 * kWidth)));
using Word = uint32_t __attribute__((vector_size(4 * kWidth)));
// The same without a demand for alignment, and free to lie over other types.
using AnyVec = float __attribute__((vector_size(4 * kWidth), aligned(4), may_alias));
using AnyWord = uint32_t __attribute__((vector_size(4 * kWidth), aligned(4), may_alias));

REGARD_INLINE Vec load(const float* p) { return *reinterpret_cast<const AnyVec*>(p); }
REGARD_INLINE void store(float* p, Vec x) { *reinterpret_cast<AnyVec*>(p) = x; }
REGARD_INLINE Vec fill(float x) { return x - Vec{}; }
REGARD_INLINE Word fill_word(uint32_t x) { return x - Word{}; }

// Contracted to one instruction where the set has it.
REGARD_INLINE Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }

// Two numbers of bfloat16 as they lie in memory, to be multiplied with two others at once, and the products summed up.
struct __attribute__((packed, aligned(2), may_alias)) Pair {
  uint32_t bits;
};

#if defined(__AVX512BF16__)
constexpr bool kHasPairs = true;
#else
constexpr bool kHasPairs = false;
#endif

REGARD_INLINE Word load(const Pair* p) { return *reinterpret_cast<const AnyWord*>(p); }
REGARD_INLINE void store(Pair* p, Word x) { *reinterpret_cast<AnyWord*>(p) = x; }
REGARD_INLINE Word fill(Pair x) { return fill_word(x.bits); }

// c + the two products of each lane.
REGARD_INLINE Vec fma(Word a, Word b, Vec c) {
#if defined(__AVX512BF16__)
  return reinterpret_cast<Vec>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(c), reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b)));
#else
  const Word high = fill_word(0xffff0000u);
  return fma(reinterpret_cast<Vec>(a << 16), reinterpret_cast<Vec>(b << 16), fma(reinterpret_cast<Vec>(a & high), reinterpret_cast<Vec>(b & high), c));
#endif
}

// Of two numbers of which one is NaN, max and min are the second.
REGARD_INLINE Vec max(Vec a, Vec b) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec>(_mm512_max_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
#elif defined(__AVX2__)
  return reinterpret_cast<Vec>(_mm256_max_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
#else
  return a > b ? a : b;
#endif
}

REGARD_INLINE Vec min(Vec a, Vec b) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec>(_mm512_min_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
#elif defined(__AVX2__)
  return reinterpret_cast<Vec>(_mm256_min_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
#else
  return a < b ? a : b;
#endif
}

// 1 / x, to 1.5 units in the last place.
REGARD_INLINE Vec reciprocal(Vec x) {
#if defined(__AVX512F__)
  const Vec guess = reinterpret_cast<Vec>(_mm512_rcp14_ps(reinterpret_cast<__m512>(x)));
  return guess * fma(-x, guess, fill(2.0f));
#else
  return fill(1.0f) / x;
#endif
}

REGARD_INLINE float sum(Vec x) {
  float total = 0.0f;
  for (int i = 0; i < kWidth; i++) total += x[i];
  return total;
}

// Bits: one per lane, the lowest for lane 0.
using Bits = uint32_t;
constexpr Bits kAll = (1u << kWidth) - 1;

REGARD_INLINE Int lanes() {
  Int x;
  for (int i = 0; i < kWidth; i++) x[i] = i;
  return x;
}

// x where the bit of the lane is set, y elsewhere.
REGARD_INLINE Vec where(Bits bits, Vec x, Vec y) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec>(_mm512_mask_mov_ps(reinterpret_cast<__m512>(y), static_cast<__mmask16>(bits), reinterpret_cast<__m512>(x)));
#else
  const Word bit = fill_word(1u) << reinterpret_cast<Word>(lanes());
  return (fill_word(bits) & bit) != 0 ? x : y;
#endif
}

REGARD_INLINE Bits bits_of(Int mask) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask(reinterpret_cast<__m512i>(mask));
#elif defined(__AVX2__)
  return static_cast<Bits>(_mm256_movemask_ps(reinterpret_cast<__m256>(mask)));
#else
  Bits bits = 0;
  for (int i = 0; i < kWidth; i++) bits |= mask[i] ? 1u << i : 0u;
  return bits;
#endif
}

REGARD_INLINE Bits greater(Vec a, Vec b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), _CMP_GT_OQ);
#else
  return bits_of(a > b);
#endif
}

REGARD_INLINE Bits below(int count) { return count >= kWidth ? kAll : count <= 0 ? 0u : (1u << count) - 1; }

// The first `count` floats, and 0 for the rest.
REGARD_INLINE Vec load_some(const float* p, int count) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec>(_mm512_maskz_loadu_ps(static_cast<__mmask16>(below(count)), p));
#else
  if (count >= kWidth) return load(p);
  Vec x{};
  for (int i = 0; i < count; i++) x[i] = p[i];
  return x;
#endif
}

REGARD_INLINE void store_some(float* p, Vec x, int count) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>(below(count)), reinterpret_cast<__m512>(x));
#else
  if (count >= kWidth) return store(p, x);
  for (int i = 0; i < count; i++) p[i] = x[i];
#endif
}

// Powers of two ----------------------------------------------------------------------------------------------------

// 2^f - 1 for |f| <= 1/2, as f * P(f): minimax of the relative error of 2^f, 2.0e-9, fitted by iterated least squares. One
// degree less, 9.1e-8, saves 1 % of a forward pass; but where a row's scores are all but equal, its weights are all off by
// the same, beside that of the largest, and the sum with them.
REGARD_INLINE Vec exp2_fraction(Vec f) {
  Vec p = fill(1.5353361959569156e-4f);
  p = fma(p, f, fill(1.3398875016719103e-3f));
  p = fma(p, f, fill(9.61843691766262e-3f));
  p = fma(p, f, fill(5.5503323674201965e-2f));
  p = fma(p, f, fill(2.4022647738456726e-1f));
  p = fma(p, f, fill(6.931471824645996e-1f));
  return p * f;
}

// The nearest whole number, for |x| < 2^22, and 2^n * x for whole n >= -126.
#if defined(__AVX512F__)
REGARD_INLINE Vec round(Vec x) {
  return reinterpret_cast<Vec>(_mm512_roundscale_ps(reinterpret_cast<__m512>(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
REGARD_INLINE Vec scale_by_power(Vec x, Vec n) {
  return reinterpret_cast<Vec>(_mm512_scalef_ps(reinterpret_cast<__m512>(x), reinterpret_cast<__m512>(n)));
}
#else
// Adding 1.5 * 2^23 leaves no bits for a fraction; the whole number stands in the lowest bits.
constexpr float kMagic = 12582912.0f;
REGARD_INLINE Vec round(Vec x) { return (x + fill(kMagic)) - fill(kMagic); }
REGARD_INLINE Vec scale_by_power(Vec x, Vec n) {
  const Int shift = reinterpret_cast<Int>(n + fill(kMagic)) << 23;
  return reinterpret_cast<Vec>(reinterpret_cast<Int>(x) + shift);
}
#endif

// 2^(x * unit), the exponent rounded once, to 1.5 units in the last place. Below 2^-103 it is 0: such a weight is nothing
// beside the largest of its row, and products of subnormal numbers run fifty times slower. 0 for x = -inf, NaN for NaN.
// x * unit must stay below 127.
REGARD_INLINE Vec exp2(Vec x, Vec unit = fill(1.0f)) {
  const Vec exponent = x * unit;
#if defined(__AVX512F__)
  const Vec n = round(exponent);
  const Vec p = fill(1.0f) + exp2_fraction(fma(x, unit, -n));
  const __mmask16 seen = _mm512_cmp_ps_mask(reinterpret_cast<__m512>(exponent), _mm512_set1_ps(-103.0f), _CMP_NLT_UQ);
  return reinterpret_cast<Vec>(_mm512_maskz_scalef_ps(seen, reinterpret_cast<__m512>(p), reinterpret_cast<__m512>(n)));
#else
  const Vec n = round(max(fill(-104.0f), exponent));
  const Vec p = scale_by_power(fill(1.0f) + exp2_fraction(fma(x, unit, -n)), n);
  return reinterpret_cast<Vec>((reinterpret_cast<Int>(p) & (exponent >= fill(-103.0f))) | (exponent != exponent));
#endif
}

// 2^x to 1.0e-4 of it, for what is rounded to bfloat16 next, by up to 3.9e-3: minimax, fitted in the same way, but exact for 0,
// so that a row with one key has the weight 1. It saves 5 % of a forward pass in pairs.
REGARD_INLINE Vec exp2_rounded(Vec x) {
#if defined(__AVX512F__)
  const Vec n = round(x), f = x - n;
  Vec p = fill(5.5008931126259986e-2f);
  p = fma(p, f, fill(2.422109592739788e-1f));
  p = fma(p, f, fill(6.932829270970096e-1f));
  p = fma(p, f, fill(1.0f));
  const __mmask16 seen = _mm512_cmp_ps_mask(reinterpret_cast<__m512>(x), _mm512_set1_ps(-103.0f), _CMP_NLT_UQ);
  return reinterpret_cast<Vec>(_mm512_maskz_scalef_ps(seen, reinterpret_cast<__m512>(p), reinterpret_cast<__m512>(n)));
#else
  return exp2(x);
#endif
}

// The logarithm to base 2 of normal numbers above 0, to 2 units in the last place; of others it is no more than a number.
REGARD_INLINE Vec log2(Vec x) {
  // x = 2^n m with m from sqrt(1/2) to sqrt(2), and log m = 2 atanh(s), whose series is left at 2e-9 of it.
  constexpr int32_t kHalf = 0x3f3504f3;
  const Int bits = reinterpret_cast<Int>(x) - kHalf;
  const Vec m = reinterpret_cast<Vec>((bits & 0x7fffff) + kHalf), s = (m - fill(1.0f)) / (m + fill(1.0f)), z = s * s;
  Vec p = fill(0.32059889797532520f);
  p = fma(p, z, fill(0.41219858311113240f));
  p = fma(p, z, fill(0.57707801635558537f));
  p = fma(p, z, fill(0.96179669392597562f));
  p = fma(p, z, fill(2.88539008177792680f));
  return fma(p, s, __builtin_convertvector(bits >> 23, Vec));
}

// The same down to the smallest numbers there are: for what may have nothing larger beside it.
REGARD_INLINE Vec exp2_far(Vec x, Vec unit) {
  const Vec exponent = x * unit;
  return where(greater(fill(-63.0f), exponent), exp2(fma(x, unit, fill(63.0f))) * fill(0x1p-63f), exp2(x, unit));
}

// tanh and its derivative 1 - tanh^2, of an angle given as x = 2 log2(e) times it, so that 2^x = e^(2 angle). By 2^x - 1,
// which is exact near 0; the derivative not by a difference, which would cancel where tanh is near 1.
struct Tanh {
  Vec value, slope;
};

REGARD_INLINE Tanh tanh(Vec x) {
  const Word sign = reinterpret_cast<Word>(x) & 0x80000000u;
  // Beyond, the value is 1 to the last bit and the derivative nothing.
  x = min(fill(120.0f), reinterpret_cast<Vec>(reinterpret_cast<Word>(x) ^ sign));
  const Vec n = round(x), fraction = exp2_fraction(x - n);
  const Vec power = scale_by_power(fill(1.0f), n);
  const Vec grown = fma(power, fraction, power - fill(1.0f));
  const Vec inverse = fill(1.0f) / (grown + fill(2.0f));
  // Near 1, what is missing from it is told better than the number itself: scores under a cap may all be of that size, and
  // then err alike.
  const Vec value = where(greater(grown, fill(1.0f)), fma(fill(-2.0f), inverse, fill(1.0f)), grown * inverse);
  return {reinterpret_cast<Vec>(reinterpret_cast<Word>(value) | sign), fill(4.0f) * fma(power, fraction, power) * (inverse * inverse)};
}

// 1 / (1 + 2^-x), down to the smallest numbers there are: a row may have no larger weights, unlike that of a softmax. -inf
// stays out of the arithmetic.
REGARD_INLINE Vec sigmoid(Vec x) {
  // Where 2^-x may be too large, numerator and denominator are both 2^63 times smaller.
  const Bits low = greater(fill(-63.0f), x);
  const Vec one = where(low, fill(0x1p-63f), fill(1.0f));
  const Vec weight = one / (one + exp2(-max(fill(-110.0f), where(low, x + fill(63.0f), x))));
  return where(greater(fill(-150.0f), x), Vec{}, weight);
}

// Transposing ------------------------------------------------------------------------------------------------------

template <int... kLane>
struct Lanes {};
template <int kCount, int... kLane>
struct Count : Count<kCount - 1, kCount - 1, kLane...> {};
template <int... kLane>
struct Count<0, kLane...> {
  using Type = Lanes<kLane...>;
};

template <int kStep, int... kLane>
REGARD_INLINE void swap_halves(Vec& a, Vec& b, Lanes<kLane...>) {
  const Vec low = __builtin_shufflevector(a, b, ((kLane & kStep) ? kWidth + kLane - kStep : kLane)...);
  b = __builtin_shufflevector(a, b, ((kLane & kStep) ? kWidth + kLane : kLane + kStep)...);
  a = low;
}

// The lower (0) or upper (1) halves of two vectors, number by number in turns.
template <int kHalf, int... kLane>
REGARD_INLINE Vec zip(Vec a, Vec b, Lanes<kLane...>) {
  return __builtin_shufflevector(a, b, (kHalf * kWidth / 2 + kLane / 2 + kLane % 2 * kWidth)...);
}
template <int kHalf>
REGARD_INLINE Vec zip(Vec a, Vec b) {
  return zip<kHalf>(a, b, typename Count<kWidth>::Type{});
}

template <int kStep>
REGARD_INLINE void transpose_step(Vec (&x)[kWidth]) {
#pragma GCC unroll 16
  for (int i = 0; i < kWidth; i++)
    if (!(i & kStep)) swap_halves<kStep>(x[i], x[i + kStep], typename Count<kWidth>::Type{});
}

// The sums of kWidth vectors, the first in lane 0: as transposing does, but each step leaves half of the vectors.
template <int kStep = 1>
REGARD_INLINE Vec sum_each(Vec (&x)[kWidth]) {
#pragma GCC unroll 16
  for (int i = 0; i < kWidth; i += 2 * kStep) {
    swap_halves<kStep>(x[i], x[i + kStep], typename Count<kWidth>::Type{});
    x[i] += x[i + kStep];
  }
  if constexpr (2 * kStep < kWidth) return sum_each<2 * kStep>(x);
  return x[0];
}

// kWidth vectors of kWidth floats, as a square matrix.
REGARD_INLINE void transpose(Vec (&x)[kWidth]) {
  transpose_step<1>(x);
  transpose_step<2>(x);
  if constexpr (kWidth > 4) transpose_step<4>(x);
  if constexpr (kWidth > 8) transpose_step<8>(x);
}

}  // namespace regard::REGARD_SET
