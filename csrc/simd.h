// Vectors of the width of a register of the instruction set, and their operations.
//
// Arithmetic uses the vector extensions of GCC and Clang. What these do not offer, or not as one instruction, is
// implemented here per instruction set, and nowhere else. This file is compiled once per set, in a namespace of its
// own, so that the linker never merges the code of one set with that of another: it must not use anything from the
// standard library.
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
using UInt = uint32_t __attribute__((vector_size(4 * kWidth)));
// The same without alignment requirements, and allowed to alias other types.
using UnalignedVec = float __attribute__((vector_size(4 * kWidth), aligned(4), may_alias));
using UnalignedUInt = uint32_t __attribute__((vector_size(4 * kWidth), aligned(4), may_alias));

REGARD_INLINE Vec load(const float* p) { return *reinterpret_cast<const UnalignedVec*>(p); }
REGARD_INLINE void store(float* p, Vec x) { *reinterpret_cast<UnalignedVec*>(p) = x; }
REGARD_INLINE Vec broadcast(float x) { return x - Vec{}; }
REGARD_INLINE UInt broadcast_uint(uint32_t x) { return x - UInt{}; }

// Contracted to one instruction where available.
REGARD_INLINE Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }

// Two adjacent bfloat16 elements, an operand of a dot product with two others.
struct __attribute__((packed, aligned(2), may_alias)) BF16Pair {
  uint32_t bits;
};

#if defined(__AVX512BF16__)
constexpr bool kHasBF16Dot = true;
#else
constexpr bool kHasBF16Dot = false;
#endif

REGARD_INLINE UInt load(const BF16Pair* p) { return *reinterpret_cast<const UnalignedUInt*>(p); }
REGARD_INLINE void store(BF16Pair* p, UInt x) { *reinterpret_cast<UnalignedUInt*>(p) = x; }
REGARD_INLINE UInt broadcast(BF16Pair x) { return broadcast_uint(x.bits); }

// c + the sum of the two products of each lane.
REGARD_INLINE Vec fma(UInt a, UInt b, Vec c) {
#if defined(__AVX512BF16__)
  return reinterpret_cast<Vec>(
      _mm512_dpbf16_ps(reinterpret_cast<__m512>(c), reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b)));
#else
  const UInt high = broadcast_uint(0xffff0000u);
  return fma(reinterpret_cast<Vec>(a << 16), reinterpret_cast<Vec>(b << 16),
             fma(reinterpret_cast<Vec>(a & high), reinterpret_cast<Vec>(b & high), c));
#endif
}

// If one operand is NaN, max and min return b.
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

// 1 / x, to 1.5 ulp.
REGARD_INLINE Vec reciprocal(Vec x) {
#if defined(__AVX512F__)
  const Vec guess = reinterpret_cast<Vec>(_mm512_rcp14_ps(reinterpret_cast<__m512>(x)));
  return guess * fma(-x, guess, broadcast(2.0f));
#else
  return broadcast(1.0f) / x;
#endif
}

REGARD_INLINE float sum(Vec x) {
  float total = 0.0f;
  for (int i = 0; i < kWidth; i++) total += x[i];
  return total;
}

// One bit per lane, the lowest for lane 0.
using LaneMask = uint32_t;
constexpr LaneMask kAllLanes = (1u << kWidth) - 1;

REGARD_INLINE Int lanes() {
  Int x;
  for (int i = 0; i < kWidth; i++) x[i] = i;
  return x;
}

// x where the bit of the lane is set, y elsewhere.
REGARD_INLINE Vec where(LaneMask bits, Vec x, Vec y) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec>(
      _mm512_mask_mov_ps(reinterpret_cast<__m512>(y), static_cast<__mmask16>(bits), reinterpret_cast<__m512>(x)));
#else
  const UInt bit = broadcast_uint(1u) << reinterpret_cast<UInt>(lanes());
  return (broadcast_uint(bits) & bit) != 0 ? x : y;
#endif
}

REGARD_INLINE LaneMask lane_mask(Int mask) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask(reinterpret_cast<__m512i>(mask));
#elif defined(__AVX2__)
  return static_cast<LaneMask>(_mm256_movemask_ps(reinterpret_cast<__m256>(mask)));
#else
  LaneMask bits = 0;
  for (int i = 0; i < kWidth; i++) bits |= mask[i] ? 1u << i : 0u;
  return bits;
#endif
}

REGARD_INLINE LaneMask greater(Vec a, Vec b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), _CMP_GT_OQ);
#else
  return lane_mask(a > b);
#endif
}

REGARD_INLINE LaneMask first_lanes(int count) {
  return count >= kWidth ? kAllLanes : count <= 0 ? 0u : (1u << count) - 1;
}

// The first `count` floats, padded with 0.
REGARD_INLINE Vec load_partial(const float* p, int count) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec>(_mm512_maskz_loadu_ps(static_cast<__mmask16>(first_lanes(count)), p));
#else
  if (count >= kWidth) return load(p);
  Vec x{};
  for (int i = 0; i < count; i++) x[i] = p[i];
  return x;
#endif
}

REGARD_INLINE void store_partial(float* p, Vec x, int count) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>(first_lanes(count)), reinterpret_cast<__m512>(x));
#else
  if (count >= kWidth) return store(p, x);
  for (int i = 0; i < count; i++) p[i] = x[i];
#endif
}

// ---- Powers of two

// 2^f - 1 for |f| <= 1/2, as f * P(f): minimax in the relative error of 2^f, 2.0e-9, fitted by iterated least squares.
// One degree less, 9.1e-8, saves 1 % of a forward pass, but in a row with nearly equal scores all weights but the
// largest, and their sum, would have the same relative error.
REGARD_INLINE Vec exp2_fraction(Vec f) {
  Vec p = broadcast(1.5353361959569156e-4f);
  p = fma(p, f, broadcast(1.3398875016719103e-3f));
  p = fma(p, f, broadcast(9.61843691766262e-3f));
  p = fma(p, f, broadcast(5.5503323674201965e-2f));
  p = fma(p, f, broadcast(2.4022647738456726e-1f));
  p = fma(p, f, broadcast(6.931471824645996e-1f));
  return p * f;
}

// The nearest integer, for |x| < 2^22; and 2^n * x for integers n >= -126.
#if defined(__AVX512F__)
REGARD_INLINE Vec round(Vec x) {
  return reinterpret_cast<Vec>(
      _mm512_roundscale_ps(reinterpret_cast<__m512>(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
REGARD_INLINE Vec scale_by_power(Vec x, Vec n) {
  return reinterpret_cast<Vec>(_mm512_scalef_ps(reinterpret_cast<__m512>(x), reinterpret_cast<__m512>(n)));
}
#else
// Adding 1.5 * 2^23 leaves no fraction bits; the integer is in the lowest bits.
constexpr float kMagic = 12582912.0f;
REGARD_INLINE Vec round(Vec x) { return (x + broadcast(kMagic)) - broadcast(kMagic); }
REGARD_INLINE Vec scale_by_power(Vec x, Vec n) {
  const Int shift = reinterpret_cast<Int>(n + broadcast(kMagic)) << 23;
  return reinterpret_cast<Vec>(reinterpret_cast<Int>(x) + shift);
}
#endif

// 2^(x * unit), the exponent rounded once, to 1.5 ulp. Flushed to 0 below 2^-103: such a weight is negligible relative
// to the largest of its row, and arithmetic on subnormals is fifty times slower. exp2(-inf) = 0, exp2(NaN) = NaN.
// Requires x * unit < 127.
REGARD_INLINE Vec exp2(Vec x, Vec unit = broadcast(1.0f)) {
  const Vec exponent = x * unit;
#if defined(__AVX512F__)
  const Vec n = round(exponent);
  const Vec p = broadcast(1.0f) + exp2_fraction(fma(x, unit, -n));
  const __mmask16 in_range =
      _mm512_cmp_ps_mask(reinterpret_cast<__m512>(exponent), _mm512_set1_ps(-103.0f), _CMP_NLT_UQ);
  return reinterpret_cast<Vec>(
      _mm512_maskz_scalef_ps(in_range, reinterpret_cast<__m512>(p), reinterpret_cast<__m512>(n)));
#else
  const Vec n = round(max(broadcast(-104.0f), exponent));
  const Vec p = scale_by_power(broadcast(1.0f) + exp2_fraction(fma(x, unit, -n)), n);
  return reinterpret_cast<Vec>((reinterpret_cast<Int>(p) & (exponent >= broadcast(-103.0f))) | (exponent != exponent));
#endif
}

// 2^x with relative error 1.0e-4, for results that are then rounded to bfloat16 (error 3.9e-3): minimax, fitted as
// above but exact at 0, so that a row with one key has weight 1. Saves 5 % of a forward pass with bf16 dot products.
REGARD_INLINE Vec exp2_bf16(Vec x) {
#if defined(__AVX512F__)
  const Vec n = round(x), f = x - n;
  Vec p = broadcast(5.5008931126259986e-2f);
  p = fma(p, f, broadcast(2.422109592739788e-1f));
  p = fma(p, f, broadcast(6.932829270970096e-1f));
  p = fma(p, f, broadcast(1.0f));
  const __mmask16 in_range = _mm512_cmp_ps_mask(reinterpret_cast<__m512>(x), _mm512_set1_ps(-103.0f), _CMP_NLT_UQ);
  return reinterpret_cast<Vec>(
      _mm512_maskz_scalef_ps(in_range, reinterpret_cast<__m512>(p), reinterpret_cast<__m512>(n)));
#else
  return exp2(x);
#endif
}

// log2 of normal numbers above 0, to 2 ulp; unspecified otherwise.
REGARD_INLINE Vec log2(Vec x) {
  // x = 2^n m with m in [sqrt(1/2), sqrt(2)), and log m = 2 atanh(s) with s = (m - 1) / (m + 1); the truncated series
  // has relative error 2e-9.
  constexpr int32_t kHalf = 0x3f3504f3;
  const Int bits = reinterpret_cast<Int>(x) - kHalf;
  const Vec m = reinterpret_cast<Vec>((bits & 0x7fffff) + kHalf), s = (m - broadcast(1.0f)) / (m + broadcast(1.0f)),
            z = s * s;
  Vec p = broadcast(0.32059889797532520f);
  p = fma(p, z, broadcast(0.41219858311113240f));
  p = fma(p, z, broadcast(0.57707801635558537f));
  p = fma(p, z, broadcast(0.96179669392597562f));
  p = fma(p, z, broadcast(2.88539008177792680f));
  return fma(p, s, __builtin_convertvector(bits >> 23, Vec));
}

// 2^(x * unit) including subnormal results, for weights that may have no larger one in their row.
REGARD_INLINE Vec exp2_full_range(Vec x, Vec unit) {
  const Vec exponent = x * unit;
  return where(greater(broadcast(-63.0f), exponent), exp2(fma(x, unit, broadcast(63.0f))) * broadcast(0x1p-63f),
               exp2(x, unit));
}

// tanh and its derivative 1 - tanh^2 of an angle, given as x = 2 log2(e) * angle, so that 2^x = e^(2 angle). Computed
// from 2^x - 1, which is exact near 0; the derivative avoids the difference 1 - tanh^2, which cancels where tanh is
// near 1.
struct Tanh {
  Vec value, derivative;
};

REGARD_INLINE Tanh tanh(Vec x) {
  const UInt sign = reinterpret_cast<UInt>(x) & 0x80000000u;
  // Beyond, the value is 1 to the last bit and the derivative is 0.
  x = min(broadcast(120.0f), reinterpret_cast<Vec>(reinterpret_cast<UInt>(x) ^ sign));
  const Vec n = round(x), fraction = exp2_fraction(x - n);
  const Vec power = scale_by_power(broadcast(1.0f), n);
  const Vec grown = fma(power, fraction, power - broadcast(1.0f));
  const Vec inverse = broadcast(1.0f) / (grown + broadcast(2.0f));
  // Near 1, compute 1 - value: capped scores may all be near the cap, with a common error.
  const Vec value =
      where(greater(grown, broadcast(1.0f)), fma(broadcast(-2.0f), inverse, broadcast(1.0f)), grown * inverse);
  return {reinterpret_cast<Vec>(reinterpret_cast<UInt>(value) | sign),
          broadcast(4.0f) * fma(power, fraction, power) * (inverse * inverse)};
}

// 1 / (1 + 2^-x) including subnormal results: unlike with softmax, a row may have no larger weights. -inf is clamped
// before any arithmetic.
REGARD_INLINE Vec sigmoid(Vec x) {
  // Where 2^-x could overflow, numerator and denominator are both scaled by 2^-63.
  const LaneMask low = greater(broadcast(-63.0f), x);
  const Vec one = where(low, broadcast(0x1p-63f), broadcast(1.0f));
  const Vec weight = one / (one + exp2(-max(broadcast(-110.0f), where(low, x + broadcast(63.0f), x))));
  return where(greater(broadcast(-150.0f), x), Vec{}, weight);
}

// ---- Transposition

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

// Interleaves the lower (0) or upper (1) halves of two vectors.
template <int kHalf, int... kLane>
REGARD_INLINE Vec interleave(Vec a, Vec b, Lanes<kLane...>) {
  return __builtin_shufflevector(a, b, (kHalf * kWidth / 2 + kLane / 2 + kLane % 2 * kWidth)...);
}
template <int kHalf>
REGARD_INLINE Vec interleave(Vec a, Vec b) {
  return interleave<kHalf>(a, b, typename Count<kWidth>::Type{});
}

template <int kStep>
REGARD_INLINE void transpose_step(Vec (&x)[kWidth]) {
#pragma GCC unroll 16
  for (int i = 0; i < kWidth; i++)
    if (!(i & kStep)) swap_halves<kStep>(x[i], x[i + kStep], typename Count<kWidth>::Type{});
}

// Lane i is the sum of vector i, for kWidth vectors: a transposition in which each step halves the number of vectors.
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

// Transposes a square matrix, kWidth vectors of kWidth floats.
REGARD_INLINE void transpose(Vec (&x)[kWidth]) {
  transpose_step<1>(x);
  transpose_step<2>(x);
  if constexpr (kWidth > 4) transpose_step<4>(x);
  if constexpr (kWidth > 8) transpose_step<8>(x);
}

}  // namespace regard::REGARD_SET
