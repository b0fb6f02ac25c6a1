// The largest scores of each query and their keys, kept in order while the scores go by.
#pragma once

#include "score.h"

namespace regard::REGARD_SET {

class Top {
 public:
  Top(int64_t count, float* scores, int32_t* keys) : count_(count), scores_(scores), keys_(keys) {}

  void clear(int64_t lanes) {
    lanes_ = lanes;
    for (int64_t at = 0; at < count_ * lanes; at++) scores_[at] = -kInfinity, keys_[at] = -1;
  }

  void add(const float* s, const Keys& keys) {
    for (int i = keys.from; i < keys.upto; i++) {
      Vec least = last(i);
      for (int64_t n = 0; n < keys.count; n++) {
        const Vec x = load(s + n * lanes_ + i * kWidth);
        if (__builtin_expect(greater(x, least), 0)) {
          insert(x, static_cast<int32_t>(keys.first + n), i);
          least = last(i);
        }
      }
    }
  }

  // Replaces the scores of vector i by what they are worth.
  template <class Worth>
  void each(int i, Worth worth) {
    for (int64_t t = 0; t < count_; t++) {
      float* at = scores_ + t * lanes_ + i * kWidth;
      const Vec score = load(at);
      store(at, where(greater(score, fill(-kInfinity)), worth(score), Vec{}));
    }
  }

  void give(int queries, float* weights, int64_t* keys) const {
    for (int i = 0; i < queries; i++)
      for (int64_t t = 0; t < count_; t++) *weights++ = scores_[t * lanes_ + i], *keys++ = keys_[t * lanes_ + i];
  }

 private:
  Vec last(int i) const { return load(scores_ + (count_ - 1) * lanes_ + i * kWidth); }

  // One sweep: in each lane, the first score that is smaller makes way, and moves on in the place of x.
  void insert(Vec x, int32_t key, int i) {
    Int moving = key - Int{};
    for (int64_t t = 0; t < count_; t++) {
      float* at = scores_ + t * lanes_ + i * kWidth;
      auto* key_at = reinterpret_cast<AnyWord*>(keys_ + t * lanes_ + i * kWidth);
      const Vec held = load(at);
      const Int held_key = reinterpret_cast<Int>(static_cast<Word>(*key_at));
      const Int larger = x > held;
      store(at, larger ? x : held);
      *key_at = reinterpret_cast<Word>(larger ? moving : held_key);
      x = larger ? held : x;
      moving = larger ? held_key : moving;
    }
  }

  int64_t count_, lanes_ = 0;
  float* scores_;  // (count, lanes), the largest first
  int32_t* keys_;
};

// The same of one query, whose scores lie side by side.
class RowTop {
 public:
  RowTop(int64_t count, float* scores, int32_t* keys) : count_(count), scores_(scores), keys_(keys) {}

  void clear() {
    for (int64_t t = 0; t < count_; t++) scores_[t] = -kInfinity, keys_[t] = -1;
  }

  // Whole vectors of scores, of the keys from `first` on.
  void add(const float* s, int64_t first, int64_t keys) {
    for (int64_t n = 0; n < keys; n += kWidth)
      for (Bits left = greater(load(s + n), fill(scores_[count_ - 1])); left; left &= left - 1) {
        const int lane = __builtin_ctz(left);
        insert(s[n + lane], static_cast<int32_t>(first + n + lane));
      }
  }

  // What another one has found, among later keys.
  void add(const RowTop& other) {
    for (int64_t t = 0; t < count_; t++) insert(other.scores_[t], other.keys_[t]);
  }

  // The scores by what they are worth.
  template <class Worth>
  void give(Worth worth, float* weights, int64_t* keys) const {
    for (int64_t t = 0; t < count_; t++) weights[t] = scores_[t] > -kInfinity ? worth(scores_[t]) : 0.0f, keys[t] = keys_[t];
  }

 private:
  // Scores that are equal stay in the order of their keys.
  void insert(float score, int32_t key) {
    if (!(score > scores_[count_ - 1])) return;
    int64_t t = count_ - 1;
    for (; t && score > scores_[t - 1]; t--) scores_[t] = scores_[t - 1], keys_[t] = keys_[t - 1];
    scores_[t] = score, keys_[t] = key;
  }

  int64_t count_;
  float* scores_;
  int32_t* keys_;
};

}  // namespace regard::REGARD_SET
