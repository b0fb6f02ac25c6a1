// Masks: the coverage of a tile of queries by keys (full, partial or empty), and per key, 64 bits with the queries of a
// tile that may attend to it. Both are computed from a few parameters: no mask is materialized.
#pragma once

#include "problem.h"
#include "simd.h"

namespace regard::REGARD_SET {

constexpr int kTile = 64;  // queries per tile, one bit each

enum class Coverage { Empty, Partial, Full };

REGARD_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
REGARD_INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

// Bits [first, last), clamped to [0, 64].
REGARD_INLINE uint64_t bit_range(int64_t first, int64_t last) {
  first = max64(first, 0), last = min64(last, kTile);
  if (first >= last) return 0;
  const uint64_t until = last == kTile ? ~0ull : (1ull << last) - 1;
  return until & ~((1ull << first) - 1);
}

// Queries [i, i + ni) and keys [j, j + nj) of batch row b and head h.
struct Box {
  int64_t b, h, i, ni, j, nj;
};

class Mask {
 public:
  Mask(const MaskNode* nodes, int64_t count) : nodes_(nodes), root_(count - 1) {}
  explicit operator bool() const { return root_ >= 0; }

  Coverage coverage(const Box& box) const { return root_ < 0 ? Coverage::Full : coverage(root_, box); }

  // bits[n]: which queries may attend to key box.j + n.
  void bits(const Box& box, uint64_t* bits) const { fill_bits(root_, box, bits); }

 private:
  static Coverage to_coverage(bool some, bool all) {
    return all ? Coverage::Full : some ? Coverage::Partial : Coverage::Empty;
  }

  Coverage coverage(int64_t index, const Box& box) const {
    const MaskNode& node = nodes_[index];
    switch (node.kind) {
      case MaskNode::Band: {
        const int64_t offset = node.n[0], behind = node.n[2], ahead = node.n[3];
        const int64_t nearest = box.i + offset - (box.j + box.nj - 1);
        const int64_t farthest = box.i + box.ni - 1 + offset - box.j;
        return to_coverage(nearest <= behind && farthest >= -ahead, farthest <= behind && nearest >= -ahead);
      }
      case MaskNode::AlignedBand: {
        int64_t first = position(node, box, 0), last = first;
        for (int64_t i = 1; i < box.ni; i++) {
          const int64_t at = position(node, box, i);
          first = min64(first, at), last = max64(last, at);
        }
        const int64_t nearest = first - (box.j + box.nj - 1), farthest = last - box.j;
        return to_coverage(nearest <= node.n[0] && farthest >= -node.n[1],
                           farthest <= node.n[0] && nearest >= -node.n[1]);
      }
      case MaskNode::Before: {
        const int64_t n = node.keys[box.b * node.key_batch];
        return to_coverage(box.j < n, box.j + box.nj <= n);
      }
      case MaskNode::Documents: {
        int64_t low_q, high_q, low_k, high_k;
        extremes(node.queries + box.b * node.query_batch + box.i, box.ni, low_q, high_q);
        extremes(node.keys + box.b * node.key_batch + box.j, box.nj, low_k, high_k);
        const bool some = low_q <= high_k && low_k <= high_q;
        return to_coverage(some, some && low_q == high_q && low_k == high_k);
      }
      case MaskNode::Blocks: {
        bool some = false, all = true;
        for (int64_t r = box.i / node.n[0]; r <= (box.i + box.ni - 1) / node.n[0]; r++)
          for (int64_t c = box.j / node.n[1]; c <= (box.j + box.nj - 1) / node.n[1]; c++)
            (at(node.table, box.b, box.h, r, c) ? some : all) = at(node.table, box.b, box.h, r, c);
        return to_coverage(some, all);
      }
      case MaskNode::Dense: {
        bool some = false, all = true;
        for (int64_t i = box.i; i < box.i + box.ni && !(some && !all); i++)
          for (int64_t j = box.j; j < box.j + box.nj; j++) {
            const bool allowed = at(node.table, box.b, box.h, i, j);
            some |= allowed, all &= allowed;
          }
        return to_coverage(some, all);
      }
      case MaskNode::And: {
        const Coverage left = coverage(node.n[0], box);
        if (left == Coverage::Empty) return left;
        const Coverage right = coverage(node.n[1], box);
        return right == Coverage::Empty || left == Coverage::Full ? right : Coverage::Partial;
      }
      case MaskNode::Or: {
        const Coverage left = coverage(node.n[0], box);
        if (left == Coverage::Full) return left;
        const Coverage right = coverage(node.n[1], box);
        return right == Coverage::Full || left == Coverage::Empty ? right : Coverage::Partial;
      }
      case MaskNode::Not: {
        const Coverage inner = coverage(node.n[0], box);
        return inner == Coverage::Full    ? Coverage::Empty
               : inner == Coverage::Empty ? Coverage::Full
                                          : Coverage::Partial;
      }
      case MaskNode::kCount: break;
    }
    return Coverage::Partial;
  }

  void fill_bits(int64_t index, const Box& box, uint64_t* bits) const {
    const MaskNode& node = nodes_[index];
    switch (node.kind) {
      case MaskNode::Band:
        // The query at bit n has position i + offset + n: bits from position j - ahead to j + behind.
        for (int64_t n = 0; n < box.nj; n++) {
          const int64_t position = box.j + n - box.i - node.n[0];
          bits[n] = bit_range(position - node.n[3], position + node.n[2] + 1);
        }
        return;
      case MaskNode::AlignedBand: {
        // Queries of one row or document have adjacent positions: a run of bits, as for a band.
        for (int64_t n = 0; n < box.nj; n++) bits[n] = 0;
        for (int64_t start = 0, end; start < box.ni; start = end) {
          const int64_t first = position(node, box, start);
          for (end = start + 1; end < box.ni && position(node, box, end) == first + end - start;) end++;
          const uint64_t run = bit_range(start, end);
          for (int64_t n = 0; n < box.nj; n++) {
            const int64_t bit = box.j + n - first + start;
            bits[n] |= run & bit_range(bit - node.n[1], bit + node.n[0] + 1);
          }
        }
        return;
      }
      case MaskNode::Before:
        for (int64_t n = 0; n < box.nj; n++) bits[n] = box.j + n < node.keys[box.b * node.key_batch] ? ~0ull : 0;
        return;
      case MaskNode::Documents: {
        const int64_t* queries = node.queries + box.b * node.query_batch + box.i;
        const int64_t* keys = node.keys + box.b * node.key_batch + box.j;
        for (int64_t n = 0; n < box.nj; n++) {
          // Neighboring keys mostly share a document, and therefore their bits.
          if (n && keys[n] == keys[n - 1]) {
            bits[n] = bits[n - 1];
            continue;
          }
          bits[n] = 0;
          for (int64_t i = 0; i < box.ni; i++) bits[n] |= static_cast<uint64_t>(queries[i] == keys[n]) << i;
        }
        return;
      }
      case MaskNode::Blocks:
        for (int64_t n = 0; n < box.nj; n++) {
          bits[n] = 0;
          for (int64_t i = 0; i < box.ni; i++)
            bits[n] |=
                static_cast<uint64_t>(at(node.table, box.b, box.h, (box.i + i) / node.n[0], (box.j + n) / node.n[1]))
                << i;
        }
        return;
      case MaskNode::Dense:
        for (int64_t n = 0; n < box.nj; n++) bits[n] = 0;
        for (int64_t i = 0; i < box.ni; i++)
          for (int64_t n = 0; n < box.nj; n++)
            bits[n] |= static_cast<uint64_t>(at(node.table, box.b, box.h, box.i + i, box.j + n)) << i;
        return;
      case MaskNode::And:
      case MaskNode::Or: {
        fill_bits(node.n[0], box, bits);
        // In blocks, so that deeply nested masks need little stack.
        uint64_t other[kTile];
        for (int64_t from = 0; from < box.nj; from += kTile) {
          const int64_t count = min64(kTile, box.nj - from);
          fill_bits(node.n[1], {box.b, box.h, box.i, box.ni, box.j + from, count}, other);
          for (int64_t n = 0; n < count; n++)
            bits[from + n] = node.kind == MaskNode::And ? bits[from + n] & other[n] : bits[from + n] | other[n];
        }
        return;
      }
      case MaskNode::Not:
        fill_bits(node.n[0], box, bits);
        for (int64_t n = 0; n < box.nj; n++) bits[n] = ~bits[n];
        return;
      case MaskNode::kCount: return;
    }
  }

  // The position of query box.i + i of an AlignedBand.
  static int64_t position(const MaskNode& node, const Box& box, int64_t i) {
    const int64_t* queries = node.queries + box.b * node.query_batch;
    return node.query_step ? queries[box.i + i] : queries[0] + box.i + i - node.n[2];
  }

  static bool at(const Table& table, int64_t b, int64_t h, int64_t i, int64_t j) {
    return table.data[b * table.batch + h * table.head + i * table.query + j * table.key] != 0;
  }

  static void extremes(const int64_t* ids, int64_t count, int64_t& low, int64_t& high) {
    low = high = ids[0];
    for (int64_t n = 1; n < count; n++) low = min64(low, ids[n]), high = max64(high, ids[n]);
  }

  const MaskNode* nodes_;
  int64_t root_;
};

}  // namespace regard::REGARD_SET
