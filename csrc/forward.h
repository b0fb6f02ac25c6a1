// Stages 2 and 3: online softmax (or sigmoid), the weighted sum, and the summaries computed in the same pass.
//
//   for each tile of 64 queries                   (in the lanes; tiles are distributed over the threads)
//     for each block of 192 keys that it may attend to
//       S (keys x queries)    = K Q^T             and the maximum of each lane
//       P                     = 2^(S - row_max)   and its sum
//       O^T (width x queries) += V^T P
//
// If a summary needs all weights, those of the tile are stored until the row sums are known.
#pragma once

#include "dropout.h"
#include "score.h"
#include "scratch.h"
#include "topk.h"
#include "weight_summaries.h"

namespace regard::REGARD_SET {

// Keys per block: 48 KB of scores, about the L1 cache.
constexpr int64_t kKeysPerBlock = 192;

class Forward {
 public:
  static int64_t scratch(const Problem& p, const Outputs& o) {
    const int64_t keys = min64(kKeysPerBlock, p.S);
    return Scores::scratch(p, keys) + (keys + 1) * kTile + value_floats(p) +
           kTile * (Scores::query_width(p) + p.E + 2 * o.top) + packed_heads(p) + WeightSummaries::scratch(p, o) +
           stored_weights(p, o) + stored_blocks(p, o);
  }

  Forward(const Problem& p, const Outputs& o, Scratch& scratch)
      : p_(p),
        o_(o),
        scores_(p, scratch.take(Scores::scratch(p, min64(kKeysPerBlock, p.S))), min64(kKeysPerBlock, p.S)),
        q_transposed_(scratch.take(kTile * Scores::query_width(p))),
        weights_(scratch.take((min64(kKeysPerBlock, p.S) + 1) * kTile)),
        values_(scratch.take(value_floats(p))),
        packed_head_(reinterpret_cast<int32_t*>(scratch.take(packed_heads(p)))),
        sums_(scratch.take(kTile * p.E)),
        unit_(broadcast(scores_.unit())),
        use_rounded_exp_(scores_.use_bf16_dot() && !(o.lse || o.max || o.entropy || o.top || o.needs_weights())),
        top_(o.top, scratch.take(kTile * o.top), reinterpret_cast<int32_t*>(scratch.take(kTile * o.top))),
        summaries_(p, o, scratch),
        stored_weights_(scratch.take(stored_weights(p, o))),
        stored_blocks_(reinterpret_cast<StoredBlock*>(scratch.take(stored_blocks(p, o)))) {
    for (int64_t n = 0; n < packed_heads(p); n++) packed_head_[n] = 0;
  }

  WeightSummaries& summaries() { return summaries_; }

  void tile(int64_t b, int64_t h, int64_t first) {
    const QueryTile q(p_, b, h, first);
    scores_.load_queries(q, q_transposed_);
    start(q);
    visit_keys(scores_.mask(), q, 0, p_.S, kKeysPerBlock, [&](const KeyBlock& keys) { add(q, keys); });
    finish(q);
  }

 private:
  enum class WeightKind { Softmax, Rounded, Sigmoid };

  // A block of stored weights, 2^(unit * (score - base)).
  struct StoredBlock {
    Vec base[kMaxVectors];
    KeyBlock keys;
  };

  // With bf16 dot products, all values of a head with keys interleaved; otherwise those of a block as floats.
  static int64_t value_floats(const Problem& p) {
    return (Scores::can_use_bf16_dot(p) ? (p.S + 1) / 2 : min64(kKeysPerBlock, p.S)) * padded(p.E);
  }
  static int64_t packed_heads(const Problem& p) { return Scores::can_use_bf16_dot(p) ? (p.S + kTile - 1) / kTile : 0; }
  static int64_t stored_weights(const Problem& p, const Outputs& o) { return o.needs_weights() ? p.S * kTile : 0; }
  static int64_t stored_blocks(const Problem& p, const Outputs& o) {
    return o.needs_weights() ? (p.S / 16 + 4) * static_cast<int64_t>(sizeof(StoredBlock) / 4) : 0;
  }

  void start(const QueryTile& q) {
    if (p_.has_dropout) dropout_.set(p_, q.b, q.h, q.first, q.count);
    for (int i = 0; i < q.vectors; i++) best_[i] = broadcast(-kInfinity), base_[i] = total_[i] = moment_[i] = Vec{};
    for (int64_t at = 0; at < p_.E * q.lanes(); at += kWidth) store(sums_ + at, Vec{});
    top_.clear(q.lanes());
    summaries_.start(q);
    num_stored_ = stored_keys_ = 0;
  }

  void add(const QueryTile& q, const KeyBlock& keys) {
    Vec before[kMaxVectors];
    for (int i = keys.from; i < keys.until; i++) before[i] = best_[i];
    scores_.compute(q, q_transposed_, keys, weights_,
                    [&](int64_t, int i, auto& x) __attribute__((always_inline)) { update_max(best_[i], x); });
    if (o_.top) top_.add(weights_, keys);
    const bool softmax = p_.normalizer == Normalizer::Softmax;
    if (softmax) rescale(q, keys, before);
    for (int i = keys.from; i < keys.until; i++) {
      if (!softmax && o_.lse) update_log_sum(q, keys, before[i], i);
      !softmax           ? compute_weights<WeightKind::Sigmoid>(q, keys, i)
      : use_rounded_exp_ ? compute_weights<WeightKind::Rounded>(q, keys, i)
                         : compute_weights<WeightKind::Softmax>(q, keys, i);
    }
    if (summaries_) {
      StoredBlock& stored_block = stored_blocks_[num_stored_++];
      for (int i = keys.from; i < keys.until; i++) stored_block.base[i] = base_[i];
      stored_block.keys = keys, stored_keys_ += keys.count;
    }
    add_values(q, keys);
  }

  void add_values(const QueryTile& q, const KeyBlock& keys) {
    const int64_t from = keys.from * kWidth;
    if (scores_.use_bf16_dot()) {
      pack_values(q, keys);
      const int64_t ld = padded(p_.E);
      return gemm<true>(p_.E, keys.vectors(), (keys.count + 1) / 2,
                        Strided<BF16Pair>{as_pairs(values_) + keys.first / 2 * ld, 1, ld}, as_pairs(weights_) + from,
                        q.lanes(), sums_ + from, q.lanes());
    }
    const FloatRows v = as_floats(p_.v, q.b, q.g, keys.first, keys.count, p_.E, values_);
    gemm<true>(p_.E, keys.vectors(), keys.count, Strided<float>{v.data, 1, v.row}, weights_ + from, q.lanes(),
               sums_ + from, q.lanes());
  }

  // Interleaves the values of some keys, once for all consecutive tiles of a head.
  void pack_values(const QueryTile& q, const KeyBlock& keys) {
    const int32_t head = static_cast<int32_t>(q.b * p_.G + q.g + 1);
    for (int64_t n = keys.first / kTile; n * kTile < keys.first + keys.count; n++) {
      if (packed_head_[n] == head) continue;
      packed_head_[n] = head;
      const int64_t count = min64(kTile, p_.S - n * kTile);
      interleave_rows(p_.v, q.b, q.g, n * kTile, count, p_.E, values_ + n * kTile / 2 * padded(p_.E), count + count % 2,
                      padded(p_.E));
    }
  }

  // Rescales the sums to the new maxima.
  void rescale(const QueryTile& q, const KeyBlock& keys, const Vec* before) {
    LaneMask risen = 0;
    Vec shrink[kMaxVectors];
    for (int i = keys.from; i < keys.until; i++) {
      risen |= greater(best_[i], before[i]);
      base_[i] = where(greater(best_[i], broadcast(-kInfinity)), best_[i], Vec{});
      const Vec step = before[i] - base_[i];  // -inf at the first keys
      shrink[i] = exp2(step, unit_);
      if (o_.entropy) moment_[i] = shrink[i] * fma(total_[i], max(step * unit_, broadcast(-200.0f)), moment_[i]);
      total_[i] *= shrink[i];
    }
    if (!risen) return;
    for (int64_t e = 0; e < p_.E; e++)
      for (int i = keys.from; i < keys.until; i++) {
        float* at = sums_ + e * q.lanes() + i * kWidth;
        store(at, load(at) * shrink[i]);
      }
  }

  // Replaces scores by weights, interleaving keys for bf16 dot products, and accumulates their sums. They are summed
  // per block, and within a block per part: a sum of partial sums rounds less than one long sum, above all where the
  // weights are nearly equal.
  template <WeightKind kKind>
  void compute_weights(const QueryTile& q, const KeyBlock& keys, int i) {
    const int64_t lanes = q.lanes();
    const Vec base = base_[i], unit = unit_,
              bias = broadcast(kKind == WeightKind::Sigmoid && p_.sink ? p_.sink[q.h] * kLog2e : 0.0f);
    float *at = weights_ + i * kWidth,
          *stored = summaries_ ? stored_weights_ + stored_keys_ * lanes + i * kWidth : nullptr;
    Vec total{}, moment{}, part{}, part_moment{};
    const auto weight = [&](int64_t n) __attribute__((always_inline)) {
      const Vec score = load(at + n * lanes);
      Vec x;
      if (kKind == WeightKind::Rounded) {
        x = exp2_bf16((score - base) * unit), part += x;
      } else if (kKind == WeightKind::Softmax) {
        const Vec below = score - base;
        x = exp2(below, unit), part += x;
        if (o_.entropy) part_moment = fma(x, max(below * unit, broadcast(-200.0f)), part_moment);
      } else {
        x = sigmoid(fma(score, unit, bias));
        if (o_.entropy) part_moment = fma(x, log2(where(greater(x, Vec{}), x, broadcast(1.0f))), part_moment);
      }
      if (stored) store(stored + n * lanes, x);
      return p_.has_dropout ? where(dropout_.kept_lanes(keys.first + n, i), x, Vec{}) : x;
    };
    for (int64_t n = 0; n < keys.count;) {
      const int64_t end = min64(n + kSumBlock, keys.count);
      if (scores_.use_bf16_dot()) {
        for (; n < end; n += 2) {
          const Vec even = weight(n), odd = n + 1 < end ? weight(n + 1) : Vec{};
          store(as_pairs(weights_) + n / 2 * lanes + i * kWidth, interleave_bf16(even, odd));
        }
      } else {
        for (; n < end; n++) store(at + n * lanes, weight(n));
      }
      total += part, part = Vec{};
      moment += part_moment, part_moment = Vec{};
    }
    if (kKind != WeightKind::Sigmoid) total_[i] += total;
    moment_[i] += moment;
  }

  // The log-sum-exp of the scores under a sigmoid, which does not compute it.
  void update_log_sum(const QueryTile& q, const KeyBlock& keys, Vec before, int i) {
    base_[i] = where(greater(best_[i], broadcast(-kInfinity)), best_[i], Vec{});
    Vec total{};
    for (int64_t n = 0; n < keys.count;) {
      Vec part{};
      for (const int64_t end = min64(n + kSumBlock, keys.count); n < end; n++)
        part += exp2(load(weights_ + n * q.lanes() + i * kWidth) - base_[i], unit_);
      total += part;
    }
    total_[i] = fma(total_[i], exp2(before - base_[i], unit_), total);
  }

  // min(x, 0). Before a row has a key, its base is 0, which may be far above its maximum, and its weights are 0:
  // without the limit, these would be 0 times inf.
  static Vec below_zero(Vec x) { return where(greater(x, Vec{}), Vec{}, x); }

  // Computes the weight summaries of the tile from the stored weights, the row maxima and the inverse sums.
  void summarize(const QueryTile& q, const float* row_max, const float* inverse_sum) {
    const float* weights = stored_weights_;
    for (int64_t n = 0; n < num_stored_; n++) {
      const StoredBlock& stored_block = stored_blocks_[n];
      Vec factor[kMaxVectors];
      for (int i = stored_block.keys.from; i < stored_block.keys.until; i++)
        factor[i] = p_.normalizer == Normalizer::Softmax
                        ? exp2_full_range(below_zero(stored_block.base[i] - load(row_max + i * kWidth)), unit_) *
                              load(inverse_sum + i * kWidth)
                        : broadcast(1.0f);
      summaries_.add(q, stored_block.keys, weights, factor);
      weights += stored_block.keys.count * q.lanes();
    }
    summaries_.finish(q);
  }

  void finish(const QueryTile& q) {
    alignas(64) float scale[kTile], row_max[kTile], inverse_sum[kTile], max_weight[kTile];
    const bool softmax = p_.normalizer == Normalizer::Softmax;
    for (int i = 0; i < q.vectors; i++) {
      Vec factor = broadcast(1.0f), high = Vec{}, inverse = broadcast(1.0f);
      if (softmax) {
        // A sink is an extra key whose value is 0.
        const Vec sink = broadcast(p_.sink ? scores_.sink(q.h) : -kInfinity);
        high = max(best_[i], sink);
        const LaneMask none = lane_mask(high == broadcast(-kInfinity));
        high = where(none, Vec{}, high);
        factor = exp2_full_range(best_[i] - high, unit_);  // the sink may be far larger than all scores
        inverse = where(none, Vec{}, broadcast(1.0f) / fma(total_[i], factor, exp2(sink - high, unit_)));
      }
      store(row_max + i * kWidth, high);
      store(inverse_sum + i * kWidth, inverse);
      store(max_weight + i * kWidth, factor * inverse);
      store(scale + i * kWidth, factor * inverse * broadcast(p_.keep_scale));
    }
    transpose_back(sums_, q.lanes(), scale, p_.E, o_.out, q.b, q.h, q.first, q.count);
    if (o_.exact.data) transpose_back(sums_, q.lanes(), scale, p_.E, o_.exact, q.b, q.h, q.first, q.count);
    const int64_t row = (q.b * p_.H + q.h) * p_.L + q.first;
    for (int i = 0; i < q.count; i++) {
      if (o_.row_max) o_.row_max[row + i] = row_max[i], o_.inverse_sum[row + i] = inverse_sum[i];
      if (o_.lse)
        o_.lse[row + i] = softmax ? log_sum(row_max[i], inverse_sum[i] == 0.0f ? 0.0 : 1.0 / inverse_sum[i])
                                  : log_sum(lane(base_, i), lane(total_, i));
      if (o_.max) o_.max[row + i] = softmax ? max_weight[i] : max_sigmoid_weight(q, i);
      if (o_.entropy) {
        // -sum p log p, with p = max_weight * 2^x, from the sums of 2^x and of x 2^x.
        const double part = max_weight[i], total = lane(total_, i), moment = lane(moment_, i);
        o_.entropy[row + i] =
            part > 0.0 ? static_cast<float>(-kLn2 * part * (moment + __builtin_log2(part) * total)) : 0.0f;
      }
    }
    if (summaries_) summarize(q, row_max, inverse_sum);
    if (!o_.top) return;
    for (int i = 0; i < q.vectors; i++) {
      const Vec high = load(row_max + i * kWidth), inverse = load(inverse_sum + i * kWidth),
                bias = broadcast(p_.sink && !softmax ? p_.sink[q.h] * kLog2e : 0.0f);
      top_.transform(i, [&](Vec score) {
        return softmax ? exp2_full_range(score - high, unit_) * inverse : sigmoid(fma(score, unit_, bias));
      });
    }
    top_.write(q.count, o_.top_weights + row * o_.top, o_.top_keys + row * o_.top);
  }

  // The logarithm of total * 2^(unit * base).
  float log_sum(double base, double total) const {
    return total == 0.0 ? -kInfinity : static_cast<float>((base * unit_[0] + __builtin_log2(total)) * kLn2);
  }

  float max_sigmoid_weight(const QueryTile& q, int i) const {
    return sigmoid(broadcast(lane(best_, i) * scores_.unit() + (p_.sink ? p_.sink[q.h] * kLog2e : 0.0f)))[0];
  }

  const Problem& p_;
  const Outputs& o_;
  Scores scores_;
  float* q_transposed_;   // (width, lanes)
  float* weights_;        // (keys, lanes)
  float* values_;         // (keys, E): as floats if they have another dtype, or (keys / 2, E) interleaved
  int32_t* packed_head_;  // per tile of keys, the head whose values are interleaved, counted from 1
  float* sums_;           // (E, lanes)
  Vec unit_;
  const bool use_rounded_exp_;  // weights are only used rounded to bfloat16
  TopK top_;
  WeightSummaries summaries_;
  float* stored_weights_;  // (keys, lanes): the weights of a tile, block by block
  StoredBlock* stored_blocks_;
  int64_t num_stored_ = 0, stored_keys_ = 0;
  Dropout dropout_;
  // Per query: the maximum score; the same, or 0 instead of -inf, which is subtracted from scores; the sum of 2^x with
  // x = unit * (score - base); and the sum of x 2^x.
  Vec best_[kMaxVectors], base_[kMaxVectors], total_[kMaxVectors], moment_[kMaxVectors];
};

}  // namespace regard::REGARD_SET
