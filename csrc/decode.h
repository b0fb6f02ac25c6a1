// Decoding: a few queries and many keys. Time is that of reading k and v once, where the tiles of forward.h, which have
// queries in their lanes, would fill one lane of 16 and read a key once for each query head of its group.
//
//   for each split of up to 512 keys, of each group of query heads      (splits go to the threads)
//     S (rows x keys)   = Q K^T           a row is a query of one of the heads; lanes go along the width
//     P                 = 2^(S - peak)    lanes go along the keys
//     O (rows x width)  = P V             lanes go along the width
//   who ends the last split of a group merges all of them, in their order, by their peaks and sums
#pragma once

#include "score.h"
#include "scratch.h"
#include "stream.h"
#include "top.h"

namespace regard::REGARD_SET {

// Rows a task: with more, reading is no longer what takes the time.
constexpr int64_t kMostRows = 32;
// Keys a split: the sums that each one leaves behind are 1/512 of what 512 keys and values are, for each row.
constexpr int64_t kSplit = 512;
// Keys that all rows go over before the next ones, which are fetched meanwhile, 4 to 16 KB ahead: without that, memory waits
// for arithmetic and arithmetic for memory (10 GB/s on a core that reads 20; with it, 18).
constexpr int64_t kRun = 32;

class Decode {
 public:
  // How a problem falls into tasks: by its sizes alone, so that no bit of the result depends on the threads.
  struct Deal {
    int64_t rows, parts, keys, splits, groups, tasks, q_width, v_width, numbers;

    Deal(const Problem& p, int64_t top) {
      rows = p.repeats() * p.L;
      parts = (rows + kMostRows - 1) / kMostRows;
      const int64_t count = (p.S + kSplit - 1) / kSplit;
      keys = ((p.S + count - 1) / count + kTile - 1) / kTile * kTile;
      splits = (p.S + keys - 1) / keys;
      groups = p.B * p.G * parts;
      tasks = groups * splits;
      q_width = whole_vectors(p.D) * kWidth, v_width = whole_vectors(p.E) * kWidth;
      numbers = (least(rows, kMostRows) * (v_width + kStatistics + 2 * top) + kLine - 1) / kLine * kLine;
    }
    int64_t partials() const { return tasks * numbers; }
  };

  // Whether this is faster than tiles, which turns on how many of their lanes L queries fill, on nothing else: measured with
  // vectors of 16, 12x as fast for 1 query of each of 4 heads and 8,192 keys, 4x for 1 head; 3x for 4 queries; 1.6x for 8,
  // and 0.8x for 16. Where there are few keys, merging tells: 8 queries of 16 keys 0.7x, of 128 keys 1.3x.
  //
  // Not where the backward pass or the second look follow: they compute the scores anew, in tiles, and these are rounded in
  // another way. What is left between their weights and the sums of this pass made errors of gradients up to seven times as
  // large, where scores are in the hundreds.
  static bool serves(const Problem& p, const Outputs& o) {
    const bool few = 4 * p.L <= kWidth || (2 * p.L <= kWidth && p.S >= kTile);
    const bool told = p.normalizer == Normalizer::Softmax || (p.normalizer == Normalizer::Sigmoid && !o.lse && !o.entropy);
    return few && told && !o.peak && !o.looks() && !p.weight && !p.drops;
  }

  static int64_t scratch(const Deal& deal, int64_t top) {
    return kMostRows * (deal.q_width + kSplit) + kRun * most(deal.q_width, deal.v_width) + deal.v_width + 2 * top;
  }

  // `done`: of each group, how many of its splits are; 0 at the start.
  Decode(const Problem& p, const Outputs& o, const Deal& deal, Scratch& scratch, float* partials, int32_t* done)
      : p_(p),
        o_(o),
        deal_(deal),
        scores_(p, nullptr, 0),
        queries_(scratch.take(kMostRows * deal.q_width)),
        weights_(scratch.take(kMostRows * kSplit)),
        copy_(scratch.take(kRun * most(deal.q_width, deal.v_width))),
        whole_(scratch.take(deal.v_width)),
        top_(o.top, scratch.take(o.top), reinterpret_cast<int32_t*>(scratch.take(o.top))),
        partials_(partials),
        done_(done),
        unit_(fill(scores_.unit())) {
    for (int64_t n = 0; n < p.mask_nodes; n++) per_head_ |= p.mask[n].table.head != 0;
  }

  // `next` is the task that will follow, if there is one.
  void run(int64_t task, int64_t next) {
    next_ = next < deal_.tasks ? next : task;
    const int64_t group = task / deal_.splits, first = task % deal_.splits * deal_.keys;
    if (group != group_) take_queries(group);
    attend(first, least(deal_.keys, p_.S - first), partials_ + task * deal_.numbers);
    if (__atomic_add_fetch(done_ + group, 1, __ATOMIC_ACQ_REL) < deal_.splits) return;
    for (int n = 0; n < count_; n++) merge(n, partials_ + group * deal_.splits * deal_.numbers);
  }

 private:
  // What a split leaves of each row, after its sums: the largest score, the sum of 2^x, where x = unit * (score - largest),
  // and the sum of x 2^x; then the largest scores and their keys.
  struct Statistics {
    float peak, total, moment;
  };
  static constexpr int64_t kStatistics = sizeof(Statistics) / sizeof(float), kLine = 16;
  struct Row {
    int64_t h, i;
  };

  Statistics* statistics(float* partial) const { return reinterpret_cast<Statistics*>(partial + count_ * deal_.v_width); }
  RowTop top(float* partial, int n) const {
    float* scores = partial + count_ * (deal_.v_width + kStatistics) + 2 * n * o_.top;
    return {o_.top, scores, reinterpret_cast<int32_t*>(scores + o_.top)};
  }
  Row row(int64_t n) const { return {g_ * p_.repeats() + (first_ + n) / p_.L, (first_ + n) % p_.L}; }

  // Where rows are not whole steps of what is read at once, they are copied, as floats and filled up with 0.
  static int64_t step(Type type) { return type == Type::BFloat16 ? BFloats::kStep : kWidth; }
  static Type read_type(const Rows& x, int64_t width) { return width % step(x.type) ? Type::Float : x.type; }
  static int64_t place(Type type, int64_t c) { return type == Type::BFloat16 ? BFloats::place(c) : c; }

  Lines lines(const Rows& x, int64_t width, int64_t first, int64_t count) {
    if (width % step(x.type) == 0) return {x.at(b_, g_, first), x.row * size_of(x.type)};
    const int64_t ld = whole_vectors(width) * kWidth;
    copy_rows(x, b_, g_, first, count, width, nullptr, copy_, ld);
    return {reinterpret_cast<const char*>(copy_), ld * 4};
  }

  static Lines raw(const Rows& x, int64_t b, int64_t g, int64_t first) { return {x.at(b, g, first), x.row * size_of(x.type)}; }

  void take_queries(int64_t group) {
    group_ = group, b_ = group / deal_.parts / p_.G, g_ = group / deal_.parts % p_.G;
    first_ = group % deal_.parts * kMostRows, count_ = static_cast<int>(least(kMostRows, deal_.rows - first_));
    const Type type = read_type(p_.k, p_.D);
    for (int n = 0; n < count_; n++) {
      float* to = queries_ + n * deal_.q_width;
      copy_rows(p_.q, b_, row(n).h, row(n).i, 1, p_.D, nullptr, copy_, deal_.q_width);
      for (int64_t c = 0; c < deal_.q_width; c++) to[place(type, c)] = copy_[c];
    }
  }

  Cover cover(int64_t first, int64_t count) const {
    const Cover found = scores_.mask().cover({b_, row(0).h, 0, p_.L, first, count});
    for (int64_t h = row(0).h + 1; per_head_ && h <= row(count_ - 1).h; h++)
      if (scores_.mask().cover({b_, h, 0, p_.L, first, count}) != found) return Cover::Some;
    return found;
  }

  void attend(int64_t first, int64_t count, float* partial) {
    Keys runs[kSplit / kTile];
    int found = 0;
    const Cover whole = cover(first, count);
    if (whole == Cover::All) runs[found++] = {first, count, false, 0, 1, nullptr};
    for (int64_t j = first; whole == Cover::Some && j < first + count; j += kTile) {
      const Keys keys{j, least(kTile, first + count - j), false, 0, 1, nullptr};
      const Cover some = cover(keys.first, keys.count);
      if (some != Cover::None) runs[found++] = {keys.first, keys.count, some == Cover::Some, 0, 1, nullptr};
    }
    for (int n = 0; n < found; n++) score(runs[n], weights_ + runs[n].first - first);
    bool any = false;
    for (int n = 0; n < count_; n++) {
      if (o_.top) {
        RowTop largest = top(partial, n);
        largest.clear();
        for (int r = 0; r < found; r++) largest.add(weights_ + n * kSplit + runs[r].first - first, runs[r].first, runs[r].count);
      }
      const Statistics row = weigh(n, runs, found, first);
      statistics(partial)[n] = row;
      any |= row.peak > -kInfinity || row.total != 0.0f;
    }
    if (!any) return;
    for (int64_t at = 0; at < count_ * deal_.v_width; at += kWidth) store(partial + at, Vec{});
    for (int n = 0; n < found; n++) aggregate(runs[n], weights_ + runs[n].first - first, partial);
  }

  // s[n * kSplit + j]: the score of row n and key j, -inf where it may not attend, and up to the next whole vector.
  void score(const Keys& keys, float* s) {
    for (int64_t from = 0; from < keys.count; from += kRun) {
      const int64_t count = least(kRun, keys.count - from);
      const Lines k = lines(p_.k, p_.D, keys.first + from, count);
      const Lines next = from + kRun < keys.count ? raw(p_.k, b_, g_, keys.first + from + kRun) : raw(p_.v, b_, g_, keys.first);
      with_type(read_type(p_.k, p_.D), [&](auto read) {
        by_fours(count_, [&](auto rows, int r) { multiply_rows<decltype(read), decltype(rows)::kValue>(queries_ + r * deal_.q_width, deal_.q_width, k, next, count, s + r * kSplit + from, kSplit); });
      });
    }
    for (int n = 0; n < count_; n++) {
      float* at = s + n * kSplit;
      if (!scores_.is_plain()) adjust(row(n), keys, at);
      for (int64_t j = keys.count; j % kWidth; j++) at[j] = -kInfinity;
    }
    if (keys.partial) forbid(keys, s);
  }

  void adjust(Row row, const Keys& keys, float* s) const {
    const float* per_key = p_.key_bias ? p_.key_bias + (b_ * p_.G + g_) * p_.S + keys.first : nullptr;
    const float term = p_.query_bias ? p_.query_bias[(b_ * p_.H + row.h) * p_.L + row.i] : 0.0f;
    // The key's term first: the sum of both would be larger than the score, and round more.
    for (int64_t j = 0; j < keys.count; j++) s[j] = s[j] * p_.scale + (per_key ? per_key[j] : 0.0f) + term;
    if (p_.softcap > 0.0f) {
      const Vec cap = fill(p_.softcap), angle = fill(2.0f * kLog2e / p_.softcap);
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
      for (int64_t j = 0; j < keys.count; j += kWidth) store(s + j, load(s + j) + read(at + j * size_of(t.type), t.type, static_cast<int>(least(kWidth, keys.count - j))));
    } else {
      for (int64_t j = 0; j < keys.count; j++) s[j] += read(at + j * t.key * size_of(t.type), t.type, 1)[0];
    }
  }

  void forbid(const Keys& keys, float* s) const {
    uint64_t bits[kTile];
    for (int n = 0; n < count_; n++) {
      if (!n || (per_head_ && row(n).h != row(n - 1).h)) scores_.mask().bits({b_, row(n).h, 0, p_.L, keys.first, keys.count}, bits);
      for (int64_t j = 0; j < keys.count; j++) s[n * kSplit + j] = bits[j] >> row(n).i & 1 ? s[n * kSplit + j] : -kInfinity;
    }
  }

  // From the scores of a row to its weights.
  Statistics weigh(int n, const Keys* runs, int count, int64_t first) {
    float* s = weights_ + n * kSplit - first;
    const auto each = [&](auto work) __attribute__((always_inline)) {
      for (int r = 0; r < count; r++)
        for (int64_t j = runs[r].first; j < runs[r].first + runs[r].count; j += kWidth) work(s + j);
    };
    Vec highest = fill(-kInfinity);
    Bits wild = 0;
    each([&](float* at) {
      const Vec x = load(at);
      highest = max(highest, x), wild |= bits_of(x != x);
    });
    float best = -kInfinity;
    for (int i = 0; i < kWidth; i++) best = highest[i] > best ? highest[i] : best;
    // A NaN stays one.
    const float nothing = wild ? __builtin_nanf("") : 0.0f;
    if (p_.normalizer == Normalizer::Sigmoid) {
      const Vec bias = fill(p_.sink ? p_.sink[row(n).h] * kLog2e : 0.0f);
      each([&](float* at) { store(at, sigmoid(fma(load(at), unit_, bias))); });
      return {best, nothing, 0.0f};
    }
    const Vec base = fill(best > -kInfinity ? best : 0.0f);
    Vec total{}, moment{};
    each([&](float* at) {
      const Vec x = load(at) - base, weight = exp2(x, unit_);
      total += weight;
      if (o_.entropy) moment = fma(weight, max(x * unit_, fill(-200.0f)), moment);
      store(at, weight);
    });
    return {best, sum(total) + nothing, sum(moment)};
  }

  void aggregate(const Keys& keys, const float* weights, float* sums) {
    for (int64_t from = 0; from < keys.count; from += kRun) {
      const int64_t count = least(kRun, keys.count - from);
      const Lines v = lines(p_.v, p_.E, keys.first + from, count);
      const int64_t group = next_ / deal_.splits / deal_.parts;
      const Lines next = from + kRun < keys.count ? raw(p_.v, b_, g_, keys.first + from + kRun) : raw(p_.k, group / p_.G, group % p_.G, next_ % deal_.splits * deal_.keys);
      with_type(read_type(p_.v, p_.E), [&](auto read) {
        by_fours(count_, [&](auto rows, int r) { add_weighted<decltype(read), decltype(rows)::kValue>(weights + r * kSplit + from, kSplit, v, next, count, sums + r * deal_.v_width, deal_.v_width); });
      });
    }
  }

  // Row n, from what all splits left of it.
  void merge(int n, float* partials) {
    const auto part = [&](int64_t split) { return partials + split * deal_.numbers; };
    const float unit = unit_[0];
    const bool softmax = p_.normalizer == Normalizer::Softmax;
    float best = -kInfinity;
    for (int64_t split = 0; split < deal_.splits; split++) {
      const float peak = statistics(part(split))[n].peak;
      best = peak > best ? peak : best;
    }
    double total = 0.0, moment = 0.0;
    for (int64_t c = 0; c < deal_.v_width; c += kWidth) store(whole_ + c, Vec{});
    for (int64_t split = 0; split < deal_.splits; split++) {
      const Statistics own = statistics(part(split))[n];
      if (own.peak == -kInfinity && own.total == 0.0f) continue;  // there may be no sums
      const float step = softmax && best > -kInfinity ? own.peak - best : 0.0f, factor = two_to(step * unit);
      moment += factor * (own.moment + static_cast<double>(step) * unit * own.total), total += static_cast<double>(factor) * own.total;
      for (int64_t c = 0; c < deal_.v_width; c += kWidth) store(whole_ + c, fma(fill(factor), load(part(split) + n * deal_.v_width + c), load(whole_ + c)));
    }
    top_.clear();
    for (int64_t split = 0; split < deal_.splits && o_.top; split++) top_.add(top(part(split), n));
    give(row(n), best, total, moment);
  }

  void give(Row row, float best, double total, double moment) {
    const bool softmax = p_.normalizer == Normalizer::Softmax;
    float high = 0.0f, rest = 1.0f, share = 1.0f;
    if (softmax) {
      // The sink is an extra key whose value is 0.
      const float sink = p_.sink ? scores_.sink(row.h) : -kInfinity;
      high = sink > best ? sink : best;
      const bool some = high > -kInfinity || total != 0.0;
      high = high > -kInfinity ? high : 0.0f;
      const float factor = two_to((best - high) * unit_[0]);
      rest = some ? static_cast<float>(1.0 / (total * factor + two_to((sink - high) * unit_[0]))) : 0.0f;
      share = factor * rest;
    } else if (total != 0.0) {
      share = static_cast<float>(total);  // NaN
    }
    const Type type = read_type(p_.v, p_.E);
    for (int64_t c = 0; c < p_.E; c += kWidth) {
      alignas(64) float numbers[kWidth];
      for (int i = 0; i < kWidth; i++) numbers[i] = c + i < p_.E ? whole_[place(type, c + i)] * share : 0.0f;
      const int columns = static_cast<int>(least(kWidth, p_.E - c));
      write(o_.out.at(b_, row.h, row.i) + c * size_of(o_.out.type), o_.out.type, load(numbers), columns);
    }
    const int64_t at = (b_ * p_.H + row.h) * p_.L + row.i;
    if (o_.lse) o_.lse[at] = rest == 0.0f ? -kInfinity : static_cast<float>((static_cast<double>(high) * unit_[0] - __builtin_log2(rest)) * kLn2);
    // -sum p log p, with p = share * 2^x and the sums of 2^x and of x 2^x.
    if (o_.entropy) o_.entropy[at] = share > 0.0f ? static_cast<float>(-kLn2 * share * (moment + __builtin_log2(share) * total)) : 0.0f;
    const float bias = p_.sink && !softmax ? p_.sink[row.h] * kLog2e : 0.0f;
    if (o_.largest) o_.largest[at] = softmax ? share : sigmoid(fill(best * unit_[0] + bias))[0];
    const auto worth = [&](float score) { return softmax ? exp2_far(fill(score - high), unit_)[0] * rest : sigmoid(fill(score * unit_[0] + bias))[0]; };
    if (o_.top) top_.give(worth, o_.top_weights + at * o_.top, o_.top_keys + at * o_.top);
  }

  static float two_to(float x) { return exp2_far(fill(x), fill(1.0f))[0]; }

  const Problem& p_;
  const Outputs& o_;
  const Deal& deal_;
  Scores scores_;
  float* queries_;  // (rows, q_width), in the places where the numbers of keys come to lie
  float* weights_;  // (rows, kSplit)
  float* copy_;
  float* whole_;    // a row's sums over all splits
  RowTop top_;      // and its largest scores
  float* partials_;
  int32_t* done_;
  Vec unit_;
  bool per_head_ = false;  // the mask is not the same for all heads
  // The group at hand: rows [first, first + count) of those of batch row b and key/value head g.
  int64_t next_ = 0, group_ = -1, b_ = 0, g_ = 0, first_ = 0;
  int count_ = 0;
};

}  // namespace regard::REGARD_SET
