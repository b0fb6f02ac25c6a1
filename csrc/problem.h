// What the binding hands to the kernels: sizes, pointers and strides, checked, with nothing of torch in it.
//
//   B batch rows   H query heads   G key/value heads   L queries   S keys   D width of q and k   E width of v
#pragma once

#include <stdint.h>

namespace regard {

enum class Type : int64_t { Float, BFloat16, Half };

constexpr int64_t size_of(Type type) { return type == Type::Float ? 4 : 2; }

// A tensor (batch, head, row, column) whose last axis is contiguous; strides count numbers, and are 0 where it broadcasts.
struct Rows {
  char* data = nullptr;
  int64_t batch = 0, head = 0, row = 0;
  Type type = Type::Float;

  char* at(int64_t b, int64_t h, int64_t r) const { return data + (b * batch + h * head + r * row) * size_of(type); }
};

// A tensor that broadcasts to (B, H, L, S).
struct Table {
  const char* data = nullptr;
  int64_t batch = 0, head = 0, query = 0, key = 0;
  Type type = Type::Float;
};

// A node of a mask: a leaf, or two joined. Nodes come before those that join them; the last one is the mask.
struct MaskNode {
  enum Kind : int64_t { Band, Before, Documents, Blocks, Dense, And, Or, Not } kind;
  // Band: keys from `behind` before the query's place to `ahead` after it; the place of query i is i + offset.
  // Blocks: so many queries and keys a block. And, Or, Not: the nodes inside.
  int64_t offset = 0, behind = 0, ahead = 0;
  int64_t left = 0, right = 0;
  // Before: the number of keys (B). Documents: ids of queries (B, L) and keys (B, S), int64. Blocks, Dense: bools.
  const int64_t* queries = nullptr;
  const int64_t* keys = nullptr;
  int64_t query_batch = 0, key_batch = 0;
  Table table;
};

enum class Normalizer : int64_t { Softmax, Sigmoid, Entmax };

struct Problem {
  int64_t B, H, G, L, S, D, E;
  Rows q, k, v;
  float scale;
  const float* weight = nullptr;    // of an additive score, (H, D) or (D); its scale is 1, its q and k are floats
  int64_t weight_head = 0;
  float softcap = 0.0f;             // 0: none
  const float* key_bias = nullptr;  // (B, G, S), added to the score of each key
  const float* query_bias = nullptr;  // (B, H, L)
  Table bias;                       // added after the softcap
  const float* relative = nullptr;  // the same by distance: entry (query - key) + S - 1 of each head
  int64_t relative_head = 0;
  const MaskNode* mask = nullptr;
  int64_t mask_nodes = 0;
  Normalizer normalizer = Normalizer::Softmax;
  const float* sink = nullptr;  // (H); for a sigmoid, its bias
  double alpha = 2.0;           // of an entmax: above 1, to 2, which is sparsemax
  bool drops = false;
  uint32_t threshold = 0;  // a weight is dropped where its hash is below
  float kept = 1.0f;       // what the others are multiplied by
  int64_t seed = 0;
  bool pairs = true;  // may weights be rounded to bfloat16, as q, k and v are, for products of pairs

  int64_t repeats() const { return H / G; }
};

// Numbers a head of a table by distance: the lanes past the last query reach beyond its L + S - 1 distances.
inline int64_t relative_numbers(const Problem& p) { return p.L + p.S - 1 + 64; }

// What a forward pass gives. A null pointer is not asked for; all are contiguous.
struct Outputs {
  Rows out;                     // (B, H, L, E)
  Rows exact;                   // the same as floats, where out is of another type; for the backward pass
  // What the weights are made of once more, from the scores: the largest score, or the sink; 0 for an empty row. Of an
  // entmax: the score at the threshold; inf for an empty row.
  float* peak = nullptr;        // (B, H, L)
  // 1 / sum of e^(score - peak); 0 for an empty row. Of an entmax: what is missing from the threshold.
  float* total = nullptr;       // (B, H, L)
  float* lse = nullptr;         // (B, H, L)
  float* largest = nullptr;     // (B, H, L): the largest weight
  float* entropy = nullptr;     // (B, H, L)
  float* top_weights = nullptr;  // (B, H, L, top)
  int64_t* top_keys = nullptr;
  int64_t top = 0;
  // What all weights are needed for, of a row or of a key: 0 at the start.
  float* received = nullptr;  // (B, H, S)
  float* full = nullptr;      // (B, H, L, S)
  float* rows = nullptr;      // (B, H, row_count, S)
  const int64_t* row_numbers = nullptr;
  int64_t row_count = 0;
  float* mass = nullptr;         // (B, H, L, groups)
  const char* member = nullptr;  // bool (B, groups, S)
  int64_t member_batch = 0, member_group = 0, member_key = 0, groups = 0;

  bool looks() const { return received || full || row_count || groups; }
};

// What a backward pass takes and gives. A null pointer is not asked for.
struct Gradients {
  Rows out, dout;                // out as floats
  const float* peak = nullptr;   // (B, H, L), of the forward pass; null for a sigmoid
  const float* total = nullptr;  // (B, H, L)
  const float* dlse = nullptr;   // (B, H, L)
  Rows dq, dk, dv;
  float* dkey_bias = nullptr;    // (B, G, S)
  float* dquery_bias = nullptr;  // (B, H, L)
  float* head_sums = nullptr;    // (B, H, L): the gradient of the sink, or of the bias of a sigmoid, that comes from each query
  double* drelative = nullptr;   // (H, L + S - 1 + 64), 0 at the start
  double* dweight = nullptr;     // (H, D), 0 at the start; there for an additive score
  float* dbias = nullptr;        // in the shape of the bias, 0 at the start; strides are 0 where that is 1
  int64_t dbias_batch = 0, dbias_head = 0, dbias_query = 0, dbias_key = 0, dbias_numbers = 0;
};

// Runs task(context, i) for i in [0, count), on the threads of the caller's pool.
using Task = void (*)(void* context, int64_t index);
struct Pool {
  int64_t threads;
  void (*run)(int64_t count, Task task, void* context);
};

// What the machine can do at most: multiply-adds of floats, of pairs of bfloat16, and reads of a buffer; see peak.h.
enum class Limit : int64_t { Multiply, MultiplyPairs, Read };

// The kernels of one instruction set; false where memory ran out.
struct Kernels {
  const char* name;
  bool (*forward)(const Problem&, const Outputs&, const Pool&);
  bool (*backward)(const Problem&, const Gradients&, const Pool&);
  double (*peak)(Limit, int64_t rounds, const float* buffer, int64_t numbers, const Pool&);
  const int64_t* decoded;  // how many forward passes went by decode.h
};

}  // namespace regard
