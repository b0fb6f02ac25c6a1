// Numbers of bfloat16 in pairs, as the instructions take them that multiply two at once (VDPBF16PS): 2 x 2 x 16 operations
// where a multiply-add of floats does 2 x 16. Sums stay floats; weights and slopes are rounded to bfloat16 on their way into
// a product, as its other side is.
#pragma once

#include "tile.h"

namespace regard::REGARD_SET {

// Two rows are neighbours along the depth: (a, b) of each lane.
REGARD_INLINE Word pair_up(Short a, Short b) { return __builtin_convertvector(a, Word) | __builtin_convertvector(b, Word) << 16; }

// The same of floats, which are rounded.
REGARD_INLINE Word pair_up(Vec a, Vec b) {
#if defined(__AVX512BF16__)
  const __m512i both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(a)));
  const __m512i turns = _mm512_add_epi32(_mm512_set1_epi32(0x00100000), reinterpret_cast<__m512i>(lanes() * 0x00010001));
  return reinterpret_cast<Word>(_mm512_permutexvar_epi16(turns, both));
#else
  return pair_up(to_bfloat16(a), to_bfloat16(b));
#endif
}

REGARD_INLINE Short read_short(const char* p, int count) {
  if (count >= kWidth) return *reinterpret_cast<const AnyShort*>(p);
  Short x{};
  for (int i = 0; i < count; i++) x[i] = reinterpret_cast<const uint16_t*>(p)[i];
  return x;
}

// Can the rows be read as pairs of columns?
inline bool in_pairs(const Rows& x, int64_t width) { return x.type == Type::BFloat16 && width % 2 == 0 && x.row % 2 == 0; }

// A row, as pairs of columns; and the way to the next one.
inline const Pair* pairs_at(const Rows& x, int64_t b, int64_t h, int64_t r) { return reinterpret_cast<const Pair*>(x.at(b, h, r)); }

// Pairs of columns, turned: to[column / 2 * ld + row].
inline void turn_pairs(const Rows& x, int64_t b, int64_t h, int64_t first, int count, int64_t width, float* to, int64_t ld) {
  turn({x.at(b, h, first), 0, 0, x.row / 2, Type::Float}, 0, 0, 0, count, width / 2, to, ld);
}

// Rows [first, first + count) in pairs of rows: to[row / 2 * ld + column], filled up with 0 to `rows` rows and `ld` columns.
inline void pair_rows(const Rows& x, int64_t b, int64_t h, int64_t first, int64_t count, int64_t width, float* to, int64_t rows, int64_t ld) {
  for (int64_t r = 0; r < rows; r += 2)
    for (int64_t c = 0; c < ld; c += kWidth) {
      const int columns = static_cast<int>(least(kWidth, most(0, width - c)));
      const auto at = [&](int64_t row) __attribute__((always_inline)) { return row < count ? read_short(x.at(b, h, first + row) + c * 2, columns) : Short{}; };
      store(reinterpret_cast<Pair*>(to) + r / 2 * ld + c, pair_up(at(r), at(r + 1)));
    }
}

REGARD_INLINE const Pair* pairs(const float* x) { return reinterpret_cast<const Pair*>(x); }
REGARD_INLINE Pair* pairs(float* x) { return reinterpret_cast<Pair*>(x); }

}  // namespace regard::REGARD_SET
