// Dot products of bfloat16 pairs (VDPBF16PS): 2 x 2 x 16 operations per instruction, where a float FMA does 2 x 16.
// Sums are floats; weights and dS are rounded to bfloat16 before they enter a product, as q, k and v are.
#pragma once

#include "tile.h"

namespace regard::REGARD_SET {

// Interleaves two rows that are neighbors along the depth: (a, b) per lane.
REGARD_INLINE UInt interleave_bf16(Short a, Short b) {
  return __builtin_convertvector(a, UInt) | __builtin_convertvector(b, UInt) << 16;
}

// The same for floats, with rounding.
REGARD_INLINE UInt interleave_bf16(Vec a, Vec b) {
#if defined(__AVX512BF16__)
  const __m512i both =
      reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(a)));
  const __m512i order =
      _mm512_add_epi32(_mm512_set1_epi32(0x00100000), reinterpret_cast<__m512i>(lanes() * 0x00010001));
  return reinterpret_cast<UInt>(_mm512_permutexvar_epi16(order, both));
#else
  return interleave_bf16(to_bfloat16(a), to_bfloat16(b));
#endif
}

REGARD_INLINE Short read_short(const char* p, int count) {
  if (count >= kWidth) return *reinterpret_cast<const UnalignedShort*>(p);
  Short x{};
  for (int i = 0; i < count; i++) x[i] = reinterpret_cast<const uint16_t*>(p)[i];
  return x;
}

// Whether rows can be read as pairs of columns.
inline bool can_pair_columns(const Rows& x, int64_t width) {
  return x.type == Type::BFloat16 && width % 2 == 0 && x.row % 2 == 0;
}

// Row r as pairs of columns.
inline const BF16Pair* pair_row(const Rows& x, int64_t b, int64_t h, int64_t r) {
  return reinterpret_cast<const BF16Pair*>(x.at(b, h, r));
}

// Transposes pairs of columns: to[column / 2 * ld + row].
inline void transpose_pairs(const Rows& x, int64_t b, int64_t h, int64_t first, int count, int64_t width, float* to,
                            int64_t ld) {
  transpose_rows({x.at(b, h, first), 0, 0, x.row / 2, Type::Float}, 0, 0, 0, count, width / 2, to, ld);
}

// Interleaves rows [first, first + count) pairwise: to[row / 2 * ld + column], padded with 0 to `rows` rows and `ld`
// columns.
inline void interleave_rows(const Rows& x, int64_t b, int64_t h, int64_t first, int64_t count, int64_t width, float* to,
                            int64_t rows, int64_t ld) {
  for (int64_t r = 0; r < rows; r += 2)
    for (int64_t c = 0; c < ld; c += kWidth) {
      const int columns = static_cast<int>(min64(kWidth, max64(0, width - c)));
      const auto at = [&](int64_t row) __attribute__((always_inline)) {
        return row < count ? read_short(x.at(b, h, first + row) + c * 2, columns) : Short{};
      };
      store(reinterpret_cast<BF16Pair*>(to) + r / 2 * ld + c, interleave_bf16(at(r), at(r + 1)));
    }
}

REGARD_INLINE const BF16Pair* as_pairs(const float* x) { return reinterpret_cast<const BF16Pair*>(x); }
REGARD_INLINE BF16Pair* as_pairs(float* x) { return reinterpret_cast<BF16Pair*>(x); }

}  // namespace regard::REGARD_SET
