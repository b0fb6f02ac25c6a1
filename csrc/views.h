// What is told of all weights, once they are final: received attention, the mass of groups of keys, whole rows, and the weights
// themselves. Whoever makes the weights keeps those of a tile until then: a strip, 64 queries wide, of all their keys.
#pragma once

#include "scratch.h"
#include "tile.h"

namespace regard::REGARD_SET {

class Views {
 public:
  static int64_t scratch(const Problem& p, const Outputs& o) { return (o.received ? whole_vectors(p.S) * kWidth * kWidth : 0) + o.groups * kTile; }

  Views(const Problem& p, const Outputs& o, Scratch& scratch)
      : p_(p), o_(o), received_(scratch.take(o.received ? whole_vectors(p.S) * kWidth * kWidth : 0)), mass_(scratch.take(o.groups * kTile)) {}

  explicit operator bool() const { return o_.looks(); }

  // Before the first of some tiles of a head, and after the last: what each key received from them (S).
  void start() {
    for (int64_t at = 0; o_.received && at < whole_vectors(p_.S) * kWidth * kWidth; at += kWidth) store(received_ + at, Vec{});
  }
  void give(float* received) const {
    for (int64_t j = 0; j < p_.S; j += kWidth) {
      Vec sums[kWidth];
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; i++) sums[i] = load(received_ + (j + i) * kWidth);
      store_some(received + j, sum_each(sums), static_cast<int>(least(kWidth, p_.S - j)));
    }
  }

  // The same of a tile.
  void start(const Queries& q) {
    for (int64_t at = 0; at < o_.groups * q.lanes(); at += kWidth) store(mass_ + at, Vec{});
  }
  void finish(const Queries& q) const {
    for (int64_t i = 0; i < q.count; i++)
      for (int64_t n = 0; n < o_.groups; n++) o_.mass[((q.b * p_.H + q.h) * p_.L + q.first + i) * o_.groups + n] = mass_[n * q.lanes() + i];
  }

  // The weights of some keys (keys, lanes), each still to be multiplied by what its lane has in `factors`.
  void add(const Queries& q, const Keys& keys, const float* weights, const Vec* factors) {
    // Lanes without a query tell nothing.
    Vec factor[kMostVectors];
    for (int i = keys.from; i < keys.upto; i++) factor[i] = where(below(q.count - i * kWidth), factors[i], Vec{});
    if (o_.received) receive(q, keys, weights, factor);
    for (int64_t n = 0; n < o_.groups; n++) add_mass(q, keys, weights, factor, n);
    for (int64_t n = 0; n < o_.row_count; n++) copy_row(q, keys, weights, factor, n);
    if (o_.full) copy_all(q, keys, weights, factor);
  }

 private:
  void receive(const Queries& q, const Keys& keys, const float* weights, const Vec* factor) {
    for (int64_t n = 0; n < keys.count; n++) {
      float* at = received_ + (keys.first + n) * kWidth;
      Vec total = load(at);
      for (int i = keys.from; i < keys.upto; i++) total = fma(load(weights + n * q.lanes() + i * kWidth), factor[i], total);
      store(at, total);
    }
  }

  void add_mass(const Queries& q, const Keys& keys, const float* weights, const Vec* factor, int64_t group) {
    const char* member = o_.member + q.b * o_.member_batch + group * o_.member_group + keys.first * o_.member_key;
    Vec sums[kMostVectors] = {};
    for (int64_t n = 0; n < keys.count;) {
      Vec part[kMostVectors] = {};
      for (const int64_t end = least(n + kSummed, keys.count); n < end; n++)
        if (member[n * o_.member_key])
          for (int i = keys.from; i < keys.upto; i++) part[i] += load(weights + n * q.lanes() + i * kWidth);
      for (int i = keys.from; i < keys.upto; i++) sums[i] += part[i];
    }
    for (int i = keys.from; i < keys.upto; i++) {
      float* at = mass_ + group * q.lanes() + i * kWidth;
      store(at, fma(sums[i], factor[i], load(at)));
    }
  }

  void copy_row(const Queries& q, const Keys& keys, const float* weights, const Vec* factor, int64_t number) const {
    const int64_t lane = o_.row_numbers[number] - q.first;
    if (lane < keys.from * kWidth || lane >= keys.from * kWidth + keys.queries(q)) return;
    float* row = o_.rows + ((q.b * p_.H + q.h) * o_.row_count + number) * p_.S + keys.first;
    for (int64_t n = 0; n < keys.count; n++) row[n] = weights[n * q.lanes() + lane] * factor[lane / kWidth][lane % kWidth];
  }

  void copy_all(const Queries& q, const Keys& keys, const float* weights, const Vec* factor) const {
    alignas(64) float scale[kTile];
    for (int i = keys.from; i < keys.upto; i++) store(scale + i * kWidth, factor[i]);
    const Rows full{reinterpret_cast<char*>(o_.full + keys.first), p_.H * p_.L * p_.S, p_.L * p_.S, p_.S, Type::Float};
    const int64_t from = keys.from * kWidth;
    turn_back(weights + from, q.lanes(), scale + from, keys.count, full, q.b, q.h, q.first + from, static_cast<int>(keys.queries(q)));
  }

  const Problem& p_;
  const Outputs& o_;
  float* received_;  // (S, lanes of one vector)
  float* mass_;      // (groups, lanes)
};

}  // namespace regard::REGARD_SET
