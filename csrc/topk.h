// The top-k scores of each query and their keys, kept sorted while scores are added.
#pragma once

#include "score.h"

namespace regard::REGARD_SET {

class TopK {
 public:
  TopK(int64_t count, float* scores, int32_t* keys) : count_(count), scores_(scores), keys_(keys) {}

  void clear(int64_t lanes) {
    lanes_ = lanes;
    for (int64_t at = 0; at < count_ * lanes; at++) scores_[at] = -kInfinity, keys_[at] = -1;
  }

  void add(const float* s, const KeyBlock& keys) {
    for (int i = keys.from; i < keys.until; i++) {
      Vec smallest = last(i);
      for (int64_t n = 0; n < keys.count; n++) {
        const Vec x = load(s + n * lanes_ + i * kWidth);
        if (__builtin_expect(greater(x, smallest), 0)) {
          insert(x, static_cast<int32_t>(keys.first + n), i);
          smallest = last(i);
        }
      }
    }
  }

  // Replaces the scores of vector i by weights.
  template <class ToWeight>
  void transform(int i, ToWeight to_weight) {
    for (int64_t t = 0; t < count_; t++) {
      float* at = scores_ + t * lanes_ + i * kWidth;
      const Vec score = load(at);
      store(at, where(greater(score, broadcast(-kInfinity)), to_weight(score), Vec{}));
    }
  }

  void write(int queries, float* weights, int64_t* keys) const {
    for (int i = 0; i < queries; i++)
      for (int64_t t = 0; t < count_; t++) *weights++ = scores_[t * lanes_ + i], *keys++ = keys_[t * lanes_ + i];
  }

 private:
  Vec last(int i) const { return load(scores_ + (count_ - 1) * lanes_ + i * kWidth); }

  // One insertion pass: in each lane, the first smaller score is replaced, and moves on as x.
  void insert(Vec x, int32_t key, int i) {
    Int moving = key - Int{};
    for (int64_t t = 0; t < count_; t++) {
      float* at = scores_ + t * lanes_ + i * kWidth;
      auto* key_at = reinterpret_cast<UnalignedUInt*>(keys_ + t * lanes_ + i * kWidth);
      const Vec current = load(at);
      const Int current_key = reinterpret_cast<Int>(static_cast<UInt>(*key_at));
      const Int larger = x > current;
      store(at, larger ? x : current);
      *key_at = reinterpret_cast<UInt>(larger ? moving : current_key);
      x = larger ? current : x;
      moving = larger ? current_key : moving;
    }
  }

  int64_t count_, lanes_ = 0;
  float* scores_;  // (count, lanes), in descending order
  int32_t* keys_;
};

// The same for a single query, whose scores are contiguous.
class RowTopK {
 public:
  RowTopK(int64_t count, float* scores, int32_t* keys) : count_(count), scores_(scores), keys_(keys) {}

  void clear() {
    for (int64_t t = 0; t < count_; t++) scores_[t] = -kInfinity, keys_[t] = -1;
  }

  // Whole vectors of scores, of the keys from `first` on. Those below `least` are skipped.
  void add(const float* s, int64_t first, int64_t keys, float least) {
    for (int64_t n = 0; n < keys; n += kWidth) {
      const Vec x = load(s + n);
      LaneMask left = lane_mask(x >= broadcast(least)) & greater(x, broadcast(scores_[count_ - 1]));
      for (; left; left &= left - 1) {
        const int lane = __builtin_ctz(left);
        insert(s[n + lane], static_cast<int32_t>(first + n + lane));
      }
    }
  }

  // Returns a lower bound of the k largest scores of a row, from the largest score of each lane, of which k belong to
  // different keys. Without it, k ln(keys / k) scores are inserted only to be displaced: 15 % of the time of 512 keys.
  // What was added before is lost.
  float bound(Vec largest_of_lanes) {
    if (count_ > kWidth) return -kInfinity;
    clear();
    for (int lane = 0; lane < kWidth; lane++) insert(largest_of_lanes[lane], lane);
    return scores_[count_ - 1];
  }

  // Merges the result of later keys.
  void add(const RowTopK& other) {
    for (int64_t t = 0; t < count_; t++) insert(other.scores_[t], other.keys_[t]);
  }

  // Writes weights and keys.
  template <class ToWeight>
  void write(ToWeight to_weight, float* weights, int64_t* keys) const {
    for (int64_t t = 0; t < count_; t++)
      weights[t] = scores_[t] > -kInfinity ? to_weight(scores_[t]) : 0.0f, keys[t] = keys_[t];
  }

 private:
  // Equal scores stay in the order of their keys.
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
