// Rows of elements of any dtype: read as floats, written back, and transposed, so that queries are in the lanes.
#pragma once

#include "problem.h"
#include "simd.h"

namespace regard::REGARD_SET {

using Short = uint16_t __attribute__((vector_size(2 * kWidth)));
using UnalignedShort = uint16_t __attribute__((vector_size(2 * kWidth), aligned(2), may_alias));

REGARD_INLINE Vec from_bfloat16(Short x) { return reinterpret_cast<Vec>(__builtin_convertvector(x, UInt) << 16); }

REGARD_INLINE Short to_bfloat16(Vec x) {
#if defined(__AVX512BF16__)
  return reinterpret_cast<Short>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(x)));
#else
  // Round to nearest even; NaN stays NaN.
  const UInt bits = reinterpret_cast<UInt>(x);
  const UInt rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return __builtin_convertvector(x == x ? rounded : (bits >> 16) | 0x40, Short);
#endif
}

#if defined(__AVX512F__)
REGARD_INLINE Vec from_half(Short x) { return reinterpret_cast<Vec>(_mm512_cvtph_ps(reinterpret_cast<__m256i>(x))); }
REGARD_INLINE Short to_half(Vec x) { return reinterpret_cast<Short>(_mm512_cvtps_ph(reinterpret_cast<__m512>(x), 0)); }
#elif defined(__AVX2__)
REGARD_INLINE Vec from_half(Short x) { return reinterpret_cast<Vec>(_mm256_cvtph_ps(reinterpret_cast<__m128i>(x))); }
REGARD_INLINE Short to_half(Vec x) { return reinterpret_cast<Short>(_mm256_cvtps_ph(reinterpret_cast<__m256>(x), 0)); }
#else
REGARD_INLINE Vec from_half(Short x) {
  Vec y;
  for (int i = 0; i < kWidth; i++) {
    _Float16 half;
    __builtin_memcpy(&half, &x[i], 2);
    y[i] = half;
  }
  return y;
}
REGARD_INLINE Short to_half(Vec x) {
  Short y;
  for (int i = 0; i < kWidth; i++) {
    const _Float16 half = static_cast<_Float16>(x[i]);
    uint16_t bits;
    __builtin_memcpy(&bits, &half, 2);
    y[i] = bits;
  }
  return y;
}
#endif

// Up to kWidth elements, padded with 0.
REGARD_INLINE Vec read(const char* p, Type type, int count) {
  if (type == Type::Float) return load_partial(reinterpret_cast<const float*>(p), count);
  Short x{};
  if (count >= kWidth) {
    x = *reinterpret_cast<const UnalignedShort*>(p);
  } else {
    for (int i = 0; i < count; i++) x[i] = reinterpret_cast<const uint16_t*>(p)[i];
  }
  return type == Type::BFloat16 ? from_bfloat16(x) : from_half(x);
}

REGARD_INLINE void write(char* p, Type type, Vec x, int count) {
  if (type == Type::Float) return store_partial(reinterpret_cast<float*>(p), x, count);
  const Short y = type == Type::BFloat16 ? to_bfloat16(x) : to_half(x);
  if (count >= kWidth) {
    *reinterpret_cast<UnalignedShort*>(p) = y;
  } else {
    for (int i = 0; i < count; i++) reinterpret_cast<uint16_t*>(p)[i] = y[i];
  }
}

constexpr int whole_vectors(int64_t count) { return static_cast<int>((count + kWidth - 1) / kWidth); }
constexpr int64_t padded(int64_t width) { return whole_vectors(width) * kWidth; }

// Transposes rows [first, first + count) of a head: to[column * ld + row]. Lanes past the last row are 0.
inline void transpose_rows(const Rows& x, int64_t b, int64_t h, int64_t first, int count, int64_t width, float* to,
                           int64_t ld) {
  for (int r = 0; r < count; r += kWidth)
    for (int64_t c = 0; c < width; c += kWidth) {
      const int columns = static_cast<int>(width - c < kWidth ? width - c : kWidth);
      Vec square[kWidth];
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; i++)
        square[i] = r + i < count ? read(x.at(b, h, first + r + i) + c * size_of(x.type), x.type, columns) : Vec{};
      transpose(square);
      if (columns == kWidth) {
#pragma GCC unroll 16
        for (int i = 0; i < kWidth; i++) store(to + (c + i) * ld + r, square[i]);
      } else {
        for (int i = 0; i < columns; i++) store(to + (c + i) * ld + r, square[i]);
      }
    }
}

// The inverse: writes rows of `from[column * ld + row]`, each multiplied by `scale[row]`.
inline void transpose_back(const float* from, int64_t ld, const float* scale, int64_t width, const Rows& x, int64_t b,
                           int64_t h, int64_t first, int count) {
  for (int r = 0; r < count; r += kWidth) {
    const Vec factor = load(scale + r);
    for (int64_t c = 0; c < width; c += kWidth) {
      const int columns = static_cast<int>(width - c < kWidth ? width - c : kWidth);
      Vec square[kWidth];
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; i++) square[i] = i < columns ? load(from + (c + i) * ld + r) * factor : Vec{};
      transpose(square);
      for (int i = 0; i < kWidth && r + i < count; i++)
        write(x.at(b, h, first + r + i) + c * size_of(x.type), x.type, square[i], columns);
    }
  }
}

// Rows [first, first + count) as floats, multiplied by `scale`, in rows of `ld` floats padded with 0.
inline void copy_rows(const Rows& x, int64_t b, int64_t h, int64_t first, int64_t count, int64_t width,
                      const float* scale, float* to, int64_t ld) {
  for (int64_t r = 0; r < count; r++) {
    const char* row = x.at(b, h, first + r);
    const Vec factor = broadcast(scale ? scale[r] : 1.0f);
    for (int64_t c = 0; c < ld; c += kWidth) {
      const int64_t left = width - c;
      const int columns = static_cast<int>(left < 0 ? 0 : left < kWidth ? left : kWidth);
      store(to + r * ld + c, read(row + c * size_of(x.type), x.type, columns) * factor);
    }
  }
}

// Rows of keys or values as floats: in place if they are floats, otherwise a copy.
struct FloatRows {
  const float* data;
  int64_t row;
};

inline FloatRows as_floats(const Rows& x, int64_t b, int64_t h, int64_t first, int64_t count, int64_t width,
                           float* copy) {
  if (x.type == Type::Float) return {reinterpret_cast<const float*>(x.at(b, h, first)), x.row};
  const int64_t ld = whole_vectors(width) * kWidth;
  copy_rows(x, b, h, first, count, width, nullptr, copy, ld);
  return {copy, ld};
}

}  // namespace regard::REGARD_SET
