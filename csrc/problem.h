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

// The tensors of a kind of mask, and what they are in MaskNode.
enum class MaskTensors {
  None,
  Counts,     // keys: the number of visible keys (B|1, 1), int64
  Ids,        // queries (B|1, L) and keys (B|1, S), int64
  Positions,  // queries: the positions of the queries (B|1, L), or of the first one (B|1, 1), int64
  Pairs,      // table: bool, broadcasts to (B, H, L, S)
  Blocks,     // table: bool, broadcasts to (B, H, L / n[0], S / n[1]), both rounded up
};

// The kinds of masks, one per line: its name, how many masks it combines, its tensors. The position in this list is its
// number; the class in Python has the same name, and reads the list by the operator `names`.
#define REGARD_MASKS(X)        \
  X(Band, 0, None)             \
  X(Before, 0, Counts)         \
  X(Documents, 0, Ids)         \
  X(Blocks, 0, Blocks)         \
  X(Dense, 0, Pairs)           \
  X(AlignedBand, 0, Positions) \
  X(And, 2, None)              \
  X(Or, 2, None)               \
  X(Not, 1, None)

// A node of a mask: a leaf or a combination of other nodes. Nodes precede the nodes that refer to them; the last one is
// the mask.
struct MaskNode {
#define REGARD_ENUMERATOR(name, ...) name,
  enum Kind : int64_t { REGARD_MASKS(REGARD_ENUMERATOR) kCount } kind;
  // Of a combination, the indices of its nodes; otherwise the integers of the mask. Band: query i has position i +
  // n[0], plus S - L if n[1]; it may attend to n[2] positions before it and n[3] after it. AlignedBand: the same with
  // n[0] and n[1]; n[2], 1 or 0 in a call, is L or 0, which is subtracted from the position of the first query. Blocks:
  // queries and keys per block; 0 in a call divides L or S evenly.
  int64_t n[4] = {0, 0, 0, 0};
  const int64_t* queries = nullptr;
  const int64_t* keys = nullptr;
  int64_t query_batch = 0, key_batch = 0;
  int64_t query_step = 0;  // of AlignedBand: 0 if `queries` holds the position of the first query only, otherwise 1
  Table table;
};

#define REGARD_NORMALIZERS(X) X(Softmax) X(Sigmoid) X(Entmax)
enum class Normalizer : int64_t { REGARD_NORMALIZERS(REGARD_ENUMERATOR) kCount };

// The statistics of the weights, one per line: its name, its type, its axes, and whether it needs all final weights of
// a row or of a key (see weight_summaries.h): these start as zeros. Axes are those above, and K the largest weights, R
// the requested rows, N the groups of keys.
#define REGARD_SUMMARIES(X)            \
  X(lse, float, "BHL", false)          \
  X(max, float, "BHL", false)          \
  X(entropy, float, "BHL", false)      \
  X(top_weights, float, "BHLK", false) \
  X(top_keys, int64_t, "BHLK", false)  \
  X(received, float, "BHS", true)      \
  X(full, float, "BHLS", true)         \
  X(rows, float, "BHRS", true)         \
  X(mass, float, "BHLN", true)

enum class Summary : int { REGARD_SUMMARIES(REGARD_ENUMERATOR) };
#undef REGARD_ENUMERATOR

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
  int64_t origin[4] = {0, 0, 0, 0};  // the indices of the first batch row, head, query and key for dropout
  bool allow_bf16_dot = true;        // whether weights may be rounded to bfloat16, as q, k and v are

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
#define REGARD_POINTER(name, type, ...) type* name = nullptr;
  REGARD_SUMMARIES(REGARD_POINTER)
#undef REGARD_POINTER
  int64_t top = 0;                       // the number of largest weights
  const int64_t* row_indices = nullptr;  // which queries `rows` holds
  int64_t row_count = 0;
  const char* member = nullptr;  // which keys belong to which group of `mass`: bool (B, groups, S)
  int64_t member_batch = 0, member_group = 0, member_key = 0, groups = 0;

#define REGARD_NEEDS_WEIGHTS(name, type, axes, is_final) || (is_final && name)
  bool needs_weights() const { return false REGARD_SUMMARIES(REGARD_NEEDS_WEIGHTS); }
#undef REGARD_NEEDS_WEIGHTS
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
