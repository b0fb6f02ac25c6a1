// What the binding passes to the kernels: validated sizes, pointers and strides, independent of torch.
//
//   B batch rows   H query heads   G key/value heads   L queries   S keys   D width of q and k   E width of v
#pragma once

#include <stdint.h>

namespace regard {

enum class Type : int64_t { Float, BFloat16, Half };

constexpr int64_t size_of(Type type) { return type == Type::Float ? 4 : 2; }

// A tensor (batch, head, row, column) whose last dimension is contiguous; strides are in elements, and 0 for broadcast
// dimensions.
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

// A node of a mask: a leaf or a combination of other nodes. Nodes precede the nodes that refer to them; the last one is
// the mask.
struct MaskNode {
  enum Kind : int64_t { Band, Before, Documents, Blocks, Dense, And, Or, Not } kind;
  // Band: keys from `behind` before the query's position to `ahead` after it; query i has position i + offset. Blocks:
  // `behind` queries and `ahead` keys per block. And, Or, Not: the indices of the child nodes.
  int64_t offset = 0, behind = 0, ahead = 0;
  int64_t left = 0, right = 0;
  // Before: the number of visible keys (B). Documents: ids of queries (B, L) and keys (B, S), int64. Blocks, Dense:
  // bool.
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
  const float* weight = nullptr;  // (H, D) or (D), of an additive score; then scale is 1 and q and k are floats
  int64_t weight_head = 0;
  float softcap = 0.0f;               // 0: none
  const float* key_bias = nullptr;    // (B, G, S), added to the score of each key
  const float* query_bias = nullptr;  // (B, H, L)
  Table bias;                         // added after the softcap
  const float* relative = nullptr;    // bias by distance: index (query - key) + S - 1 per head
  int64_t relative_head = 0;
  const MaskNode* mask = nullptr;
  int64_t mask_nodes = 0;
  Normalizer normalizer = Normalizer::Softmax;
  const float* sink = nullptr;  // (H); of a sigmoid, its bias
  double alpha = 2.0;           // of entmax: in (1, 2]; 2 is sparsemax
  bool has_dropout = false;
  uint32_t drop_threshold = 0;  // a weight is dropped where its hash is below
  float keep_scale = 1.0f;      // factor for the other weights
  int64_t seed = 0;
  bool allow_bf16_dot = true;  // whether weights may be rounded to bfloat16, as q, k and v are

  int64_t repeats() const { return H / G; }
};

// Floats per head of a bias by distance: lanes past the last query read beyond the L + S - 1 distances.
inline int64_t relative_size(const Problem& p) { return p.L + p.S - 1 + 64; }

// The outputs of a forward pass, all contiguous. Null if not requested.
struct Outputs {
  Rows out;    // (B, H, L, E)
  Rows exact;  // the same in float32 if out has another dtype, for the backward pass
  // With inverse_sum, recovers the weights from the scores: the maximum score or sink; 0 for an empty row. Of entmax:
  // the score at the threshold; inf for an empty row.
  float* row_max = nullptr;  // (B, H, L)
  // 1 / sum of e^(score - row_max); 0 for an empty row. Of entmax: the correction of the threshold.
  float* inverse_sum = nullptr;  // (B, H, L)
  float* lse = nullptr;          // (B, H, L)
  float* max_weight = nullptr;   // (B, H, L)
  float* entropy = nullptr;      // (B, H, L)
  float* top_weights = nullptr;  // (B, H, L, top)
  int64_t* top_keys = nullptr;
  int64_t top = 0;
  // The summaries that need all final weights of a row or of a key. Initially 0.
  float* received = nullptr;  // (B, H, S)
  float* full = nullptr;      // (B, H, L, S)
  float* rows = nullptr;      // (B, H, row_count, S)
  const int64_t* row_indices = nullptr;
  int64_t row_count = 0;
  float* mass = nullptr;         // (B, H, L, groups)
  const char* member = nullptr;  // bool (B, groups, S)
  int64_t member_batch = 0, member_group = 0, member_key = 0, groups = 0;

  bool needs_weights() const { return received || full || row_count || groups; }
};

// The inputs and outputs of a backward pass. Null if not requested.
struct Gradients {
  Rows out, dout;                      // out as float32
  const float* row_max = nullptr;      // (B, H, L), of the forward pass; null for a sigmoid
  const float* inverse_sum = nullptr;  // (B, H, L)
  const float* dlse = nullptr;         // (B, H, L)
  Rows dq, dk, dv;
  float* dkey_bias = nullptr;    // (B, G, S)
  float* dquery_bias = nullptr;  // (B, H, L)
  float* head_sums = nullptr;    // (B, H, L): the gradient of the sink, or of the bias of a sigmoid, per query
  double* drelative = nullptr;   // (H, L + S - 1 + 64), initially 0
  double* dweight = nullptr;     // (H, D), initially 0; set for an additive score
  float* dbias = nullptr;        // in the shape of the bias, initially 0; strides are 0 for dimensions of size 1
  int64_t dbias_batch = 0, dbias_head = 0, dbias_query = 0, dbias_key = 0, dbias_size = 0;
};

// Runs task(context, i) for i in [0, count), on the threads of the caller's pool.
using Task = void (*)(void* context, int64_t index);
struct Pool {
  int64_t threads;
  void (*run)(int64_t count, Task task, void* context);
};

// Which peak to measure: float FMAs, bf16 dot products, or reads of a buffer; see peak.h.
enum class PeakKind : int64_t { FMA, BF16Dot, Read };

// The kernels of one instruction set. They return false if memory ran out.
struct Kernels {
  const char* name;
  bool (*forward)(const Problem&, const Outputs&, const Pool&);
  bool (*backward)(const Problem&, const Gradients&, const Pool&);
  double (*peak)(PeakKind, int64_t rounds, const float* buffer, int64_t count, const Pool&);
  const int64_t* decode_count;  // number of forward passes by decode.h, for tests
};

}  // namespace regard
