// What cannot be told while the weights are not final: a second pass over the scores, after the forward pass.
//
// Received attention, the mass of groups of keys, whole rows, and all weights; a task is a head.
#pragma once

#include "scratch.h"
#include "threshold.h"

namespace regard::REGARD_SET {

class Survey {
 public:
  Survey(const Problem& p, const Views& views, Scratch& scratch)
      : p_(p),
        views_(views),
        scores_(p, scratch.take(Scores::scratch(p, kTile)), kTile),
        threshold_(p, scores_.scale()),
        turned_(scratch.take(kTile * Scores::turned(p))),
        weights_(scratch.take(kTile * kTile)),
        received_(scratch.take(views.received ? p.S * kWidth : 0)),
        mass_(scratch.take(views.groups * kTile)) {}

  static int64_t scratch(const Problem& p, const Views& views) {
    return Scores::scratch(p, kTile) + kTile * (Scores::turned(p) + kTile + views.groups) + (views.received ? p.S * kWidth : 0);
  }

  void head(int64_t b, int64_t h) {
    if (views_.received)
      for (int64_t at = 0; at < p_.S * kWidth; at += kWidth) store(received_ + at, Vec{});
    for (int64_t first = 0; first < p_.L; first += kTile) {
      const Queries q(p_, b, h, first);
      scores_.turn_queries(q, turned_);
      for (int64_t at = 0; at < views_.groups * q.lanes(); at += kWidth) store(mass_ + at, Vec{});
      visit_keys(scores_.mask(), q, 0, p_.S, kTile, [&](const Keys& keys) { add(q, keys); });
      for (int64_t i = 0; i < q.count; i++)
        for (int64_t n = 0; n < views_.groups; n++) views_.mass[((b * p_.H + h) * p_.L + first + i) * views_.groups + n] = mass_[n * q.lanes() + i];
    }
    if (views_.received)
      for (int64_t j = 0; j < p_.S; j++) views_.received[(b * p_.H + h) * p_.S + j] = sum(load(received_ + j * kWidth));
  }

 private:
  void add(const Queries& q, const Keys& keys) {
    weigh(q, keys);
    const int64_t lanes = q.lanes(), head = q.b * p_.H + q.h;
    if (views_.received)
      for (int64_t n = 0; n < keys.count; n++) {
        float* at = received_ + (keys.first + n) * kWidth;
        Vec total = load(at);
        for (int i = 0; i < q.vectors; i++) total += load(weights_ + n * lanes + i * kWidth);
        store(at, total);
      }
    for (int64_t g = 0; g < views_.groups; g++) {
      const char* member = views_.member + q.b * views_.member_batch + g * views_.member_group + keys.first * views_.member_key;
      // The sum of sums rounds less than one long sum.
      Vec sums[kMostVectors] = {};
      for (int64_t n = 0; n < keys.count; n++)
        if (member[n * views_.member_key])
          for (int i = 0; i < q.vectors; i++) sums[i] += load(weights_ + n * lanes + i * kWidth);
      for (int i = 0; i < q.vectors; i++) {
        float* at = mass_ + g * lanes + i * kWidth;
        store(at, load(at) + sums[i]);
      }
    }
    for (int64_t r = 0; r < views_.row_count; r++) {
      const int64_t lane = views_.row_numbers[r] - q.first;
      if (lane < 0 || lane >= q.count) continue;
      for (int64_t n = 0; n < keys.count; n++) views_.rows[(head * views_.row_count + r) * p_.S + keys.first + n] = weights_[n * lanes + lane];
    }
    if (views_.full) {
      alignas(64) float ones[kTile];
      for (float& one : ones) one = 1.0f;
      const Rows full{reinterpret_cast<char*>(views_.full + keys.first), p_.H * p_.L * p_.S, p_.L * p_.S, p_.S, Type::Float};
      turn_back(weights_, lanes, ones, keys.count, full, q.b, q.h, q.first, q.count);
    }
  }

  void weigh(const Queries& q, const Keys& keys) {
    Vec unused[kMostVectors] = {};
    scores_.fill(q, turned_, keys, weights_, unused);
    const int64_t row = (q.b * p_.H + q.h) * p_.L + q.first;
    const bool softmax = p_.normalizer == Normalizer::Softmax, entmax = p_.normalizer == Normalizer::Entmax;
    const Vec bias = fill(!softmax && p_.sink ? p_.sink[q.h] * kLog2e : 0.0f), unit = fill(scores_.unit());
    for (int i = 0; i < q.vectors; i++) {
      const int lanes = q.count - i * kWidth;
      // Lanes without a query have no weights.
      const Vec peak = load_some(views_.peak + row + i * kWidth, lanes), inverse = load_some(views_.total + row + i * kWidth, lanes);
      const Vec threshold = where(below(lanes), peak, fill(kInfinity));
      for (int64_t n = 0; n < keys.count; n++) {
        float* at = weights_ + n * q.lanes() + i * kWidth;
        const Vec x = load(at);
        store(at, entmax ? threshold_.weight(threshold_.gap(x, threshold, inverse)) : (softmax ? exp2_far(x - peak, unit) : sigmoid(fma(x, unit, bias))) * inverse);
      }
    }
  }

  const Problem& p_;
  const Views& views_;
  Scores scores_;
  Threshold threshold_;
  float *turned_, *weights_;
  float* received_;  // (S, lanes of one vector)
  float* mass_;      // (groups, lanes)
};

}  // namespace regard::REGARD_SET
