// Decoding: few queries, many keys. Takes the time of reading k and v once; the tiles of forward.h have queries in the
// lanes, so they would use one lane of 16 and read each key once per query head of its group.
//
//   for each split of up to 512 keys, of each group of query heads      (splits are distributed over the threads)
//     S (rows x keys)   = Q K^T             a row is a query of one of the heads; lanes run along the width
//     P                 = 2^(S - row_max)   lanes run along the keys
//     O (rows x width)  = P V               lanes run along the width
//   the thread that finishes the last split of a group merges all of them, in order, by their maxima and sums
#pragma once

#include "decode_partition.h"
#include "gemv.h"
#include "score.h"
#include "scratch.h"
#include "weight_summaries.h"

namespace regard::REGARD_SET {

// Keys per step. All rows process them before the next keys, which are prefetched meanwhile, 4 to 16 KB ahead. Without
// it memory and arithmetic wait for each other: 10 GB/s on a core that reads 20 GB/s; with it, 18 GB/s.
constexpr int64_t kKeysPerStep = 32;

class Decode {
 public:
  // Whether this is faster than tiles, which depends on how many of their lanes L queries fill. Measured with vectors
  // of 16: 12x as fast for 1 query of each of 4 heads and 8,192 keys, 4x for 1 head; 3x for 4 queries; 1.6x for 8, and
  // 0.8x for 16. With few keys, merging dominates: 8 queries take 0.7x with 16 keys, 1.3x with 128 keys.
  //
  // Not used if a backward pass follows: it recomputes the scores in tiles, which round differently. The mismatch
  // between its weights and the sums of this pass made gradient errors up to seven times as large for scores in the
  // hundreds. Statistics that need all weights are those of single rows, so they are computed for one query per head.
  static bool can_serve(const Problem& p, const Outputs& o) {
    const bool few = 4 * p.L <= kWidth || (2 * p.L <= kWidth && p.S >= kTile);
    const bool is_supported =
        p.normalizer == Normalizer::Softmax || (p.normalizer == Normalizer::Sigmoid && !o.lse && !o.entropy);
    return few && is_supported && !o.row_max && (!o.needs_weights() || p.L == 1) && !p.weight && !p.has_dropout;
  }

  static int64_t scratch(const DecodePartition& partition) {
    return kMaxRows * (partition.q_width + kKeysPerSplit) + kKeysPerStep * max64(partition.q_width, partition.v_width) +
           partition.v_width + 2 * partition.top;
  }

  // `done`: the number of finished splits per group, initially 0.
  Decode(const Problem& p, const Outputs& o, const DecodePartition& partition, Scratch& scratch, float* partials,
         int32_t* done)
      : p_(p),
        o_(o),
        partition_(partition),
        scores_(p, nullptr, 0),
        queries_(scratch.take(kMaxRows * partition.q_width)),
        weights_(scratch.take(kMaxRows * kKeysPerSplit)),
        copy_(scratch.take(kKeysPerStep * max64(partition.q_width, partition.v_width))),
        total_out_(scratch.take(partition.v_width)),
        top_(o.top, scratch.take(o.top), reinterpret_cast<int32_t*>(scratch.take(o.top))),
        partials_(partials),
        done_(done),
        unit_(broadcast(scores_.unit())) {
    for (int64_t n = 0; n < p.mask_nodes; n++) per_head_ |= p.mask[n].table.head != 0;
  }

  // `next`: the following task, if any.
  void run(int64_t task, int64_t next) {
    next_ = next < partition_.tasks ? next : task;
    const int64_t group = task / partition_.num_splits, first = task % partition_.num_splits * partition_.keys;
    if (group != group_) load_queries(group);
    attend(first, min64(partition_.keys, p_.S - first), partials_ + task * partition_.floats);
    if (__atomic_add_fetch(done_ + group, 1, __ATOMIC_ACQ_REL) < partition_.num_splits) return;
    for (int n = 0; n < count_; n++) merge(n, partials_ + group * partition_.num_splits * partition_.floats);
  }

 private:
  struct Row {
    int64_t h, i;
  };
  struct RowScale {
    float high, inverse_sum;
  };

  SplitStatistics* statistics(float* partial) const { return partition_.statistics(partial, count_); }
  RowTopK top(float* partial, int n) const { return partition_.top_of(partial, count_, n); }
  float* all_weights(float* partial, int n) const { return partition_.weights(partial, count_, n); }
  Row row(int64_t n) const { return {g_ * p_.repeats() + (first_ + n) / p_.L, (first_ + n) % p_.L}; }

  // Rows whose width is not a multiple of the read step are copied as floats, padded with 0.
  static int64_t step(Type type) { return type == Type::BFloat16 ? ReadBFloat16::kStep : kWidth; }
  static Type read_type(const Rows& x, int64_t width) { return width % step(x.type) ? Type::Float : x.type; }
  static int64_t position(Type type, int64_t c) { return type == Type::BFloat16 ? ReadBFloat16::position(c) : c; }

  RowView rows_for_reading(const Rows& x, int64_t width, int64_t first, int64_t count) {
    if (width % step(x.type) == 0) return {x.at(b_, g_, first), x.row * size_of(x.type)};
    const int64_t ld = whole_vectors(width) * kWidth;
    copy_rows(x, b_, g_, first, count, width, nullptr, copy_, ld);
    return {reinterpret_cast<const char*>(copy_), ld * 4};
  }

  static RowView rows_in_place(const Rows& x, int64_t b, int64_t g, int64_t first) {
    return {x.at(b, g, first), x.row * size_of(x.type)};
  }

  void load_queries(int64_t group) {
    group_ = group, b_ = group / partition_.row_blocks / p_.G, g_ = group / partition_.row_blocks % p_.G;
    first_ = group % partition_.row_blocks * kMaxRows,
    count_ = static_cast<int>(min64(kMaxRows, partition_.rows - first_));
    const Type type = read_type(p_.k, p_.D);
    for (int n = 0; n < count_; n++) {
      float* to = queries_ + n * partition_.q_width;
      copy_rows(p_.q, b_, row(n).h, row(n).i, 1, p_.D, nullptr, copy_, partition_.q_width);
      for (int64_t c = 0; c < partition_.q_width; c++) to[position(type, c)] = copy_[c];
    }
  }

  Coverage coverage(int64_t first, int64_t count) const {
    const Coverage result = scores_.mask().coverage({b_, row(0).h, 0, p_.L, first, count});
    for (int64_t h = row(0).h + 1; per_head_ && h <= row(count_ - 1).h; h++)
      if (scores_.mask().coverage({b_, h, 0, p_.L, first, count}) != result) return Coverage::Partial;
    return result;
  }

  void attend(int64_t first, int64_t count, float* partial) {
    KeyBlock runs[kKeysPerSplit / kTile];
    int num_runs = 0;
    const Coverage whole = coverage(first, count);
    if (whole == Coverage::Full) runs[num_runs++] = {first, count, false, 0, 1, nullptr};
    for (int64_t j = first; whole == Coverage::Partial && j < first + count; j += kTile) {
      const KeyBlock keys{j, min64(kTile, first + count - j), false, 0, 1, nullptr};
      const Coverage some = coverage(keys.first, keys.count);
      if (some != Coverage::Empty)
        runs[num_runs++] = {keys.first, keys.count, some == Coverage::Partial, 0, 1, nullptr};
    }
    for (int n = 0; n < num_runs; n++) score(runs[n], weights_ + runs[n].first - first);
    bool any = false;
    for (int n = 0; n < count_; n++) {
      const SplitStatistics row = compute_weights(n, runs, num_runs, first, top(partial, n));
      statistics(partial)[n] = row;
      if (o_.needs_weights()) keep_weights(n, runs, num_runs, first, count, all_weights(partial, n));
      any |= row.max > -kInfinity || row.total != 0.0f;
    }
    if (!any) return;
    for (int64_t at = 0; at < count_ * partition_.v_width; at += kWidth) store(partial + at, Vec{});
    for (int n = 0; n < num_runs; n++) aggregate(runs[n], weights_ + runs[n].first - first, partial);
  }

  // s[n * kKeysPerSplit + j]: the score of row n and key j, -inf where masked and in the padding of the last vector.
  void score(const KeyBlock& keys, float* s) {
    for (int64_t from = 0; from < keys.count; from += kKeysPerStep) {
      const int64_t count = min64(kKeysPerStep, keys.count - from);
      const RowView k = rows_for_reading(p_.k, p_.D, keys.first + from, count);
      const RowView next = from + kKeysPerStep < keys.count
                               ? rows_in_place(p_.k, b_, g_, keys.first + from + kKeysPerStep)
                               : rows_in_place(p_.v, b_, g_, keys.first);
      with_type(read_type(p_.k, p_.D), [&](auto read) {
        by_fours(count_, [&](auto rows, int r) {
          dot_rows<decltype(read), decltype(rows)::kValue>(queries_ + r * partition_.q_width, partition_.q_width, k,
                                                           next, count, s + r * kKeysPerSplit + from, kKeysPerSplit);
        });
      });
    }
    for (int n = 0; n < count_; n++) {
      float* at = s + n * kKeysPerSplit;
      if (!scores_.is_plain()) add_biases(row(n), keys, at);
      for (int64_t j = keys.count; j % kWidth; j++) at[j] = -kInfinity;
    }
    if (keys.partial) apply_mask(keys, s);
  }

  void add_biases(Row row, const KeyBlock& keys, float* s) const {
    const float* per_key = p_.key_bias ? p_.key_bias + (b_ * p_.G + g_) * p_.S + keys.first : nullptr;
    const float term = p_.query_bias ? p_.query_bias[(b_ * p_.H + row.h) * p_.L + row.i] : 0.0f;
    // Add the key bias first: the sum of both biases may be larger than the score, and round more.
    for (int64_t j = 0; j < keys.count; j++) s[j] = s[j] * p_.scale + (per_key ? per_key[j] : 0.0f) + term;
    if (p_.softcap > 0.0f) {
      const Vec cap = broadcast(p_.softcap), angle = broadcast(2.0f * kLog2e / p_.softcap);
      for (int64_t j = 0; j < keys.count; j += kWidth) store(s + j, tanh(load(s + j) * angle).value * cap);
    }
    if (p_.relative) {
      const float* table = p_.relative + row.h * p_.relative_head + row.i + p_.S - 1 - keys.first;
      for (int64_t j = 0; j < keys.count; j++) s[j] += table[-j];
    }
    const Table& t = p_.bias;
    if (!t.data) return;
    const char* at = t.data + (b_ * t.batch + row.h * t.head + row.i * t.query + keys.first * t.key) * size_of(t.type);
    if (t.key == 1) {
      for (int64_t j = 0; j < keys.count; j += kWidth)
        store(s + j,
              load(s + j) + read(at + j * size_of(t.type), t.type, static_cast<int>(min64(kWidth, keys.count - j))));
    } else {
      for (int64_t j = 0; j < keys.count; j++) s[j] += read(at + j * t.key * size_of(t.type), t.type, 1)[0];
    }
  }

  void apply_mask(const KeyBlock& keys, float* s) const {
    uint64_t bits[kTile];
    for (int n = 0; n < count_; n++) {
      if (!n || (per_head_ && row(n).h != row(n - 1).h))
        scores_.mask().bits({b_, row(n).h, 0, p_.L, keys.first, keys.count}, bits);
      for (int64_t j = 0; j < keys.count; j++)
        s[n * kKeysPerSplit + j] = bits[j] >> row(n).i & 1 ? s[n * kKeysPerSplit + j] : -kInfinity;
    }
  }

  // Replaces the scores of a row by its weights, and keeps the largest scores.
  SplitStatistics compute_weights(int n, const KeyBlock* runs, int count, int64_t first, RowTopK top) {
    float* s = weights_ + n * kKeysPerSplit - first;
    const auto each = [&](auto work) __attribute__((always_inline)) {
      for (int r = 0; r < count; r++)
        for (int64_t j = runs[r].first; j < runs[r].first + runs[r].count; j += kWidth) work(s + j);
    };
    Vec highest = broadcast(-kInfinity);
    LaneMask has_nan = 0;
    each([&](float* at) {
      const Vec x = load(at);
      highest = max(highest, x), has_nan |= lane_mask(x != x);
    });
    float best = -kInfinity;
    for (int i = 0; i < kWidth; i++) best = highest[i] > best ? highest[i] : best;
    if (o_.top) {
      const float bound = has_nan ? -kInfinity : top.bound(highest);
      top.clear();
      for (int r = 0; r < count; r++) top.add(s + runs[r].first, runs[r].first, runs[r].count, bound);
    }
    // Propagate NaN.
    const float nan_or_zero = has_nan ? __builtin_nanf("") : 0.0f;
    if (p_.normalizer == Normalizer::Sigmoid) {
      const Vec bias = broadcast(p_.sink ? p_.sink[row(n).h] * kLog2e : 0.0f);
      each([&](float* at) { store(at, sigmoid(fma(load(at), unit_, bias))); });
      return {best, nan_or_zero, 0.0f};
    }
    const Vec base = broadcast(best > -kInfinity ? best : 0.0f);
    Vec total{}, moment{};
    each([&](float* at) {
      const Vec x = load(at) - base, weight = exp2(x, unit_);
      total += weight;
      if (o_.entropy) moment = fma(weight, max(x * unit_, broadcast(-200.0f)), moment);
      store(at, weight);
    });
    return {best, sum(total) + nan_or_zero, sum(moment)};
  }

  void keep_weights(int n, const KeyBlock* runs, int num_runs, int64_t first, int64_t count, float* to) const {
    const float* from = weights_ + n * kKeysPerSplit;
    for (int64_t j = 0; j < count; j++) to[j] = 0.0f;
    for (int r = 0; r < num_runs; r++)
      for (int64_t j = runs[r].first - first; j < runs[r].first - first + runs[r].count; j++) to[j] = from[j];
  }

  void aggregate(const KeyBlock& keys, const float* weights, float* sums) {
    for (int64_t from = 0; from < keys.count; from += kKeysPerStep) {
      const int64_t count = min64(kKeysPerStep, keys.count - from);
      const RowView v = rows_for_reading(p_.v, p_.E, keys.first + from, count);
      const int64_t group = next_ / partition_.num_splits / partition_.row_blocks;
      const RowView next =
          from + kKeysPerStep < keys.count
              ? rows_in_place(p_.v, b_, g_, keys.first + from + kKeysPerStep)
              : rows_in_place(p_.k, group / p_.G, group % p_.G, next_ % partition_.num_splits * partition_.keys);
      with_type(read_type(p_.v, p_.E), [&](auto read) {
        by_fours(count_, [&](auto rows, int r) {
          add_weighted_rows<decltype(read), decltype(rows)::kValue>(weights + r * kKeysPerSplit + from, kKeysPerSplit,
                                                                    v, next, count, sums + r * partition_.v_width,
                                                                    partition_.v_width);
        });
      });
    }
  }

  // Merges row n over all splits.
  void merge(int n, float* partials) {
    const auto part = [&](int64_t split) { return partials + split * partition_.floats; };
    const float unit = unit_[0];
    const bool softmax = p_.normalizer == Normalizer::Softmax;
    float best = -kInfinity;
    for (int64_t split = 0; split < partition_.num_splits; split++) {
      const float max = statistics(part(split))[n].max;
      best = max > best ? max : best;
    }
    double total = 0.0, moment = 0.0;
    for (int64_t c = 0; c < partition_.v_width; c += kWidth) store(total_out_ + c, Vec{});
    for (int64_t split = 0; split < partition_.num_splits; split++) {
      const SplitStatistics own = statistics(part(split))[n];
      if (own.max == -kInfinity && own.total == 0.0f) continue;  // its sums may be unset
      const float step = softmax && best > -kInfinity ? own.max - best : 0.0f, factor = exp2_scalar(step * unit);
      moment += factor * (own.moment + static_cast<double>(step) * unit * own.total),
          total += static_cast<double>(factor) * own.total;
      for (int64_t c = 0; c < partition_.v_width; c += kWidth)
        store(total_out_ + c,
              fma(broadcast(factor), load(part(split) + n * partition_.v_width + c), load(total_out_ + c)));
    }
    top_.clear();
    for (int64_t split = 0; split < partition_.num_splits && o_.top; split++) top_.add(top(part(split), n));
    const RowScale scale = write_row(row(n), best, total, moment);
    for (int64_t split = 0; split < partition_.num_splits && o_.needs_weights(); split++) {
      const SplitStatistics own = statistics(part(split))[n];
      if (own.max == -kInfinity && own.total == 0.0f) continue;
      const float factor = softmax ? exp2_scalar((own.max - scale.high) * unit) * scale.inverse_sum : 1.0f;
      const int64_t first = split * partition_.keys;
      add_weights(p_, o_, b_, row(n).h, all_weights(part(split), n), factor, first,
                  min64(partition_.keys, p_.S - first));
    }
  }

  // Returns the maximum score or sink, and the inverse sum of the weights relative to it.
  RowScale write_row(Row row, float best, double total, double moment) {
    const bool softmax = p_.normalizer == Normalizer::Softmax;
    float high = 0.0f, inverse_sum = 1.0f, max_weight = 1.0f;
    if (softmax) {
      // A sink is a key whose value is 0.
      const float sink = p_.sink ? scores_.sink(row.h) : -kInfinity;
      high = sink > best ? sink : best;
      const bool some = high > -kInfinity || total != 0.0;
      high = high > -kInfinity ? high : 0.0f;
      const float factor = exp2_scalar((best - high) * unit_[0]);
      inverse_sum = some ? static_cast<float>(1.0 / (total * factor + exp2_scalar((sink - high) * unit_[0]))) : 0.0f;
      max_weight = factor * inverse_sum;
    } else if (total != 0.0) {
      max_weight = static_cast<float>(total);  // NaN
    }
    const Type type = read_type(p_.v, p_.E);
    for (int64_t c = 0; c < p_.E; c += kWidth) {
      alignas(64) float row_out[kWidth];
      for (int i = 0; i < kWidth; i++)
        row_out[i] = c + i < p_.E ? total_out_[position(type, c + i)] * max_weight : 0.0f;
      const int columns = static_cast<int>(min64(kWidth, p_.E - c));
      write(o_.out.at(b_, row.h, row.i) + c * size_of(o_.out.type), o_.out.type, load(row_out), columns);
    }
    const int64_t at = (b_ * p_.H + row.h) * p_.L + row.i;
    if (o_.lse)
      o_.lse[at] =
          inverse_sum == 0.0f
              ? -kInfinity
              : static_cast<float>((static_cast<double>(high) * unit_[0] - __builtin_log2(inverse_sum)) * kLn2);
    // -sum p log p, with p = max_weight * 2^x, from the sums of 2^x and of x 2^x.
    if (o_.entropy)
      o_.entropy[at] = max_weight > 0.0f
                           ? static_cast<float>(-kLn2 * max_weight * (moment + __builtin_log2(max_weight) * total))
                           : 0.0f;
    const float bias = p_.sink && !softmax ? p_.sink[row.h] * kLog2e : 0.0f;
    if (o_.max) o_.max[at] = softmax ? max_weight : sigmoid(broadcast(best * unit_[0] + bias))[0];
    const auto to_weight = [&](float score) {
      return softmax ? exp2_full_range(broadcast(score - high), unit_)[0] * inverse_sum
                     : sigmoid(broadcast(score * unit_[0] + bias))[0];
    };
    if (o_.top) top_.write(to_weight, o_.top_weights + at * o_.top, o_.top_keys + at * o_.top);
    return {high, inverse_sum};
  }

  static float exp2_scalar(float x) { return exp2_full_range(broadcast(x), broadcast(1.0f))[0]; }

  const Problem& p_;
  const Outputs& o_;
  const DecodePartition& partition_;
  Scores scores_;
  float* queries_;  // (rows, q_width), permuted as keys are read
  float* weights_;  // (rows, kKeysPerSplit)
  float* copy_;
  float* total_out_;  // (v_width): the merged sums of a row
  RowTopK top_;       // and its top-k scores
  float* partials_;
  int32_t* done_;
  Vec unit_;
  bool per_head_ = false;  // whether the mask differs between heads
  // The current group: rows [first, first + count) of batch row b and key/value head g.
  int64_t next_ = 0, group_ = -1, b_ = 0, g_ = 0, first_ = 0;
  int count_ = 0;
};

}  // namespace regard::REGARD_SET
