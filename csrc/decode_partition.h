// How decoding is divided into tasks, and the partial results of one.
#pragma once

#include "topk.h"

namespace regard::REGARD_SET {

// Rows per task: with more, reading no longer dominates.
constexpr int64_t kMaxRows = 32;
// Keys per split: the partial sums of a split are 1/512 of the size of 512 keys and values, per row.
constexpr int64_t kKeysPerSplit = 512;

// Of a row in a split: the maximum score, the sum of 2^x with x = unit * (score - maximum), and the sum of x 2^x.
struct SplitStatistics {
  float max, total, moment;
};

// The tasks: one per split of the keys and group of rows. They depend on the sizes only, so results are bitwise
// identical for any number of threads.
//
// The results of a task of `count` rows are, in this order: the weighted sums of values (count, v_width); the
// statistics (count); the top-k scores and their keys (count, 2, top); and, where statistics need them, the weights 2^x
// of all keys of the split (count, keys).
struct DecodePartition {
  int64_t rows, row_blocks, keys, num_splits, groups, tasks, q_width, v_width, top, floats;

  DecodePartition(const Problem& p, const Outputs& o) {
    rows = p.repeats() * p.L;
    row_blocks = (rows + kMaxRows - 1) / kMaxRows;
    const int64_t count = (p.S + kKeysPerSplit - 1) / kKeysPerSplit;
    keys = ((p.S + count - 1) / count + kTile - 1) / kTile * kTile;
    num_splits = (p.S + keys - 1) / keys;
    groups = p.B * p.G * row_blocks;
    tasks = groups * num_splits;
    q_width = whole_vectors(p.D) * kWidth, v_width = whole_vectors(p.E) * kWidth, top = o.top;
    const int64_t row = v_width + kStatistics + 2 * top + (o.needs_weights() ? keys : 0);
    floats = (min64(rows, kMaxRows) * row + kLine - 1) / kLine * kLine;
  }

  int64_t partials() const { return tasks * floats; }

  SplitStatistics* statistics(float* partial, int64_t count) const {
    return reinterpret_cast<SplitStatistics*>(partial + count * v_width);
  }
  RowTopK top_of(float* partial, int64_t count, int64_t n) const {
    float* scores = partial + count * (v_width + kStatistics) + 2 * n * top;
    return {top, scores, reinterpret_cast<int32_t*>(scores + top)};
  }
  float* weights(float* partial, int64_t count, int64_t n) const {
    return partial + count * (v_width + kStatistics + 2 * top) + n * keys;
  }

 private:
  static constexpr int64_t kStatistics = sizeof(SplitStatistics) / sizeof(float), kLine = 16;
};

}  // namespace regard::REGARD_SET
