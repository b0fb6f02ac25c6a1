// Summaries that need all final weights: received attention, mass of groups of keys, single rows, and the full matrix.
// The caller stores the weights of a tile (64 queries by all their keys) until they can be normalized.
#pragma once

#include "scratch.h"
#include "tile.h"

namespace regard::REGARD_SET {

class WeightSummaries {
 public:
  static int64_t scratch(const Problem& p, const Outputs& o) {
    return (o.received ? whole_vectors(p.S) * kWidth * kWidth : 0) + o.groups * kTile;
  }

  WeightSummaries(const Problem& p, const Outputs& o, Scratch& scratch)
      : p_(p),
        o_(o),
        received_(scratch.take(o.received ? whole_vectors(p.S) * kWidth * kWidth : 0)),
        mass_(scratch.take(o.groups * kTile)) {}

  explicit operator bool() const { return o_.needs_weights(); }

  // Called before the first and after the last of some tiles of a head; write_received writes what each key received
  // from them (S).
  void start() {
    for (int64_t at = 0; o_.received && at < whole_vectors(p_.S) * kWidth * kWidth; at += kWidth)
      store(received_ + at, Vec{});
  }
  void write_received(float* received) const {
    for (int64_t j = 0; j < p_.S; j += kWidth) {
      Vec sums[kWidth];
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; i++) sums[i] = load(received_ + (j + i) * kWidth);
      store_partial(received + j, sum_each(sums), static_cast<int>(min64(kWidth, p_.S - j)));
    }
  }

  // Called before and after each tile.
  void start(const QueryTile& q) {
    for (int64_t at = 0; at < o_.groups * q.lanes(); at += kWidth) store(mass_ + at, Vec{});
  }
  void finish(const QueryTile& q) const {
    for (int64_t i = 0; i < q.count; i++)
      for (int64_t n = 0; n < o_.groups; n++)
        o_.mass[((q.b * p_.H + q.h) * p_.L + q.first + i) * o_.groups + n] = mass_[n * q.lanes() + i];
  }

  // Adds the weights of some keys (keys, lanes), each to be multiplied by the factor of its lane.
  void add(const QueryTile& q, const KeyBlock& keys, const float* weights, const Vec* factors) {
    // Lanes without a query contribute 0.
    Vec factor[kMaxVectors];
    for (int i = keys.from; i < keys.until; i++)
      factor[i] = where(first_lanes(q.count - i * kWidth), factors[i], Vec{});
    if (o_.received) add_received(q, keys, weights, factor);
    for (int64_t n = 0; n < o_.groups; n++) add_mass(q, keys, weights, factor, n);
    for (int64_t n = 0; n < o_.row_count; n++) copy_row(q, keys, weights, factor, n);
    if (o_.full) copy_all(q, keys, weights, factor);
  }

 private:
  void add_received(const QueryTile& q, const KeyBlock& keys, const float* weights, const Vec* factor) {
    for (int64_t n = 0; n < keys.count; n++) {
      float* at = received_ + (keys.first + n) * kWidth;
      Vec total = load(at);
      for (int i = keys.from; i < keys.until; i++)
        total = fma(load(weights + n * q.lanes() + i * kWidth), factor[i], total);
      store(at, total);
    }
  }

  void add_mass(const QueryTile& q, const KeyBlock& keys, const float* weights, const Vec* factor, int64_t group) {
    const char* member = o_.member + q.b * o_.member_batch + group * o_.member_group + keys.first * o_.member_key;
    Vec sums[kMaxVectors] = {};
    for (int64_t n = 0; n < keys.count;) {
      Vec part[kMaxVectors] = {};
      for (const int64_t end = min64(n + kSumBlock, keys.count); n < end; n++)
        if (member[n * o_.member_key])
          for (int i = keys.from; i < keys.until; i++) part[i] += load(weights + n * q.lanes() + i * kWidth);
      for (int i = keys.from; i < keys.until; i++) sums[i] += part[i];
    }
    for (int i = keys.from; i < keys.until; i++) {
      float* at = mass_ + group * q.lanes() + i * kWidth;
      store(at, fma(sums[i], factor[i], load(at)));
    }
  }

  void copy_row(const QueryTile& q, const KeyBlock& keys, const float* weights, const Vec* factor,
                int64_t index) const {
    const int64_t lane = o_.row_indices[index] - q.first;
    if (lane < keys.from * kWidth || lane >= keys.from * kWidth + keys.queries(q)) return;
    float* row = o_.rows + ((q.b * p_.H + q.h) * o_.row_count + index) * p_.S + keys.first;
    for (int64_t n = 0; n < keys.count; n++)
      row[n] = weights[n * q.lanes() + lane] * factor[lane / kWidth][lane % kWidth];
  }

  void copy_all(const QueryTile& q, const KeyBlock& keys, const float* weights, const Vec* factor) const {
    alignas(64) float scale[kTile];
    for (int i = keys.from; i < keys.until; i++) store(scale + i * kWidth, factor[i]);
    const Rows full{reinterpret_cast<char*>(o_.full + keys.first), p_.H * p_.L * p_.S, p_.L * p_.S, p_.S, Type::Float};
    const int64_t from = keys.from * kWidth;
    transpose_back(weights + from, q.lanes(), scale + from, keys.count, full, q.b, q.h, q.first + from,
                   static_cast<int>(keys.queries(q)));
  }

  const Problem& p_;
  const Outputs& o_;
  float* received_;  // (S, lanes of one vector)
  float* mass_;      // (groups, lanes)
};

// Adds the weights of some keys, each times a factor, to the statistics of the only query of a head.
inline void add_weights(const Problem& p, const Outputs& o, int64_t b, int64_t h, const float* weights, float factor,
                        int64_t first, int64_t count) {
  const int64_t head = b * p.H + h;
  const auto copy = [&](float* row) {
    for (int64_t j = 0; j < count; j++) row[first + j] = weights[j] * factor;
  };
  if (o.received) copy(o.received + head * p.S);
  if (o.full) copy(o.full + head * p.S);
  for (int64_t n = 0; n < o.row_count; n++) copy(o.rows + (head * o.row_count + n) * p.S);
  for (int64_t n = 0; n < o.groups; n++) {
    const char* member = o.member + b * o.member_batch + n * o.member_group + first * o.member_key;
    float total = 0.0f;
    for (int64_t j = 0; j < count; j++) total += member[j * o.member_key] ? weights[j] * factor : 0.0f;
    o.mass[head * o.groups + n] += total;
  }
}

}  // namespace regard::REGARD_SET
