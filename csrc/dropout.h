// Dropout as in regard/backends/dropout.py: a weight is kept or dropped by a hash of (seed, batch, head, query, key).
#pragma once

#include "mask.h"

namespace regard::REGARD_SET {

constexpr uint32_t kGolden = 0x9e3779b9u;

template <class T>
REGARD_INLINE T mix(T x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

// The rows of a tile: an offset and an odd factor each.
class Dropout {
 public:
  void set(const Problem& p, int64_t b, int64_t h, int64_t first, int count) {
    uint32_t head = mix(static_cast<uint32_t>(p.seed) ^ kGolden);
    head = mix(head * kGolden ^ static_cast<uint32_t>(p.seed >> 32));
    head = mix(head * kGolden ^ static_cast<uint32_t>(b));
    head = mix(head * kGolden ^ static_cast<uint32_t>(h));
    for (int i = 0; i < kTile; i++) {
      offset_[i] = i < count ? mix(head * kGolden ^ static_cast<uint32_t>(first + i)) : 0;
      factor_[i] = mix(offset_[i] ^ kGolden) | 1u;
    }
    threshold_ = p.threshold;
  }

  // Which lanes of vector n keep their weight of a key.
  Bits kept(int64_t key, int n) const {
    const Word offset = reinterpret_cast<const AnyWord*>(offset_)[n], factor = reinterpret_cast<const AnyWord*>(factor_)[n];
    return bits_of(reinterpret_cast<Int>(mix((offset + static_cast<uint32_t>(key)) * factor) >= fill_word(threshold_)));
  }

 private:
  alignas(64) uint32_t offset_[kTile], factor_[kTile];
  uint32_t threshold_ = 0;
};

}  // namespace regard::REGARD_SET
