// Dropout as in regard/backends/dropout.py: a hash of (seed, batch, head, query, key) decides whether a weight is
// dropped.
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

// Per row of a tile: an offset and an odd factor.
class Dropout {
 public:
  void set(const Problem& p, int64_t b, int64_t h, int64_t first, int count) {
    uint32_t head = mix(static_cast<uint32_t>(p.seed) ^ kGolden);
    head = mix(head * kGolden ^ static_cast<uint32_t>(p.seed >> 32));
    head = mix(head * kGolden ^ static_cast<uint32_t>(p.origin[0] + b));
    head = mix(head * kGolden ^ static_cast<uint32_t>(p.origin[1] + h));
    first += p.origin[2];
    for (int i = 0; i < kTile; i++) {
      offset_[i] = i < count ? mix(head * kGolden ^ static_cast<uint32_t>(first + i)) : 0;
      factor_[i] = mix(offset_[i] ^ kGolden) | 1u;
    }
    drop_threshold_ = p.drop_threshold;
    first_key_ = static_cast<uint32_t>(p.origin[3]);
  }

  // The lanes of vector n that keep their weight for a key.
  LaneMask kept_lanes(int64_t key, int n) const {
    const UInt offset = reinterpret_cast<const UnalignedUInt*>(offset_)[n],
               factor = reinterpret_cast<const UnalignedUInt*>(factor_)[n];
    return lane_mask(reinterpret_cast<Int>(mix((offset + (first_key_ + static_cast<uint32_t>(key))) * factor) >=
                                           broadcast_uint(drop_threshold_)));
  }

 private:
  alignas(64) uint32_t offset_[kTile], factor_[kTile];
  uint32_t drop_threshold_ = 0, first_key_ = 0;
};

}  // namespace regard::REGARD_SET
