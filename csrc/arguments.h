// The arguments of the operators and their validation, needed because anyone can call an operator. Part of bind.cpp.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <vector>

#include "problem.h"

namespace regard {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

Type type_of(const Tensor& x, const char* name) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return Type::Float;
    case ScalarType::BFloat16: return Type::BFloat16;
    case ScalarType::Half: return Type::Half;
    default: STD_TORCH_CHECK(false, name, " has a dtype that the native kernels do not support"); return Type::Float;
  }
}

// A tensor (B, H, rows, width) whose last dimension is contiguous.
Rows rows(const Tensor& x, const char* name, int64_t B, int64_t H, int64_t R, int64_t W) {
  STD_TORCH_CHECK(x.dim() == 4 && x.size(0) == B && x.size(1) == H && x.size(2) == R && x.size(3) == W, name,
                  " has an unexpected shape");
  STD_TORCH_CHECK(W <= 1 || x.stride(3) == 1, name, " must be contiguous in its last dimension");
  return {static_cast<char*>(x.data_ptr()), x.stride(0), x.stride(1), x.stride(2), type_of(x, name)};
}

// A contiguous float tensor with `count` elements; null if absent.
const float* floats(const MaybeTensor& x, const char* name, int64_t count) {
  if (!x) return nullptr;
  STD_TORCH_CHECK(x->scalar_type() == ScalarType::Float && x->is_contiguous() && x->numel() == count, name, " must be ",
                  count, " contiguous floats");
  return static_cast<const float*>(x->data_ptr());
}

// Strides of a tensor that broadcasts to (B, H, L, S).
Table table(const Tensor& x, const char* name, int64_t B, int64_t H, int64_t L, int64_t S, Type type) {
  const int64_t full[4] = {B, H, L, S};
  int64_t stride[4];
  STD_TORCH_CHECK(x.dim() == 4, name, " must have four dimensions");
  for (int axis = 0; axis < 4; axis++) {
    STD_TORCH_CHECK(x.size(axis) == full[axis] || x.size(axis) == 1, name, " does not broadcast to (B, H, L, S)");
    stride[axis] = x.size(axis) == 1 ? 0 : x.stride(axis);
  }
  return {static_cast<const char*>(x.data_ptr()), stride[0], stride[1], stride[2], stride[3], type};
}

// A node is seven integers: its kind, MaskNode::n, and the indices of two tensors (-1 for none).
constexpr size_t kNodeSize = 7;

struct MaskKind {
  int64_t parts;
  MaskTensors tensors;
};
#define REGARD_KIND(name, parts, tensors) {parts, MaskTensors::tensors},
constexpr MaskKind kMaskKinds[] = {REGARD_MASKS(REGARD_KIND)};
#undef REGARD_KIND

std::vector<MaskNode> mask_nodes(const std::vector<int64_t>& values, const std::vector<Tensor>& tensors,
                                 const Problem& p) {
  STD_TORCH_CHECK(values.size() % kNodeSize == 0, "a mask must consist of nodes of ", kNodeSize, " integers");
  std::vector<MaskNode> nodes;
  const auto tensor = [&](int64_t index) -> const Tensor& {
    STD_TORCH_CHECK(index >= 0 && index < static_cast<int64_t>(tensors.size()),
                    "a mask node refers to a missing tensor");
    return tensors[index];
  };
  const auto integers = [&](const Tensor& x, int64_t length, const int64_t*& data, int64_t& batch) {
    STD_TORCH_CHECK(x.scalar_type() == ScalarType::Long && x.dim() == 2 && (x.size(0) == 1 || x.size(0) == p.B) &&
                        x.size(1) == length && (length <= 1 || x.stride(1) == 1),
                    "a mask tensor must be int64 of shape (B, ", length, ")");
    data = static_cast<const int64_t*>(x.data_ptr());
    batch = x.size(0) == 1 ? 0 : x.stride(0);
  };
  const auto flags = [&](const Tensor& x, int64_t R, int64_t C) {
    STD_TORCH_CHECK(x.scalar_type() == ScalarType::Bool, "a mask table must be bool");
    return table(x, "a mask table", p.B, p.H, R, C, Type::Float);
  };
  for (size_t at = 0; at < values.size(); at += kNodeSize) {
    const int64_t* given = values.data() + at;
    STD_TORCH_CHECK(given[0] >= 0 && given[0] < MaskNode::kCount, "a mask node has an unknown kind");
    MaskNode node;
    node.kind = static_cast<MaskNode::Kind>(given[0]);
    std::copy(given + 1, given + 5, node.n);
    const MaskKind& kind = kMaskKinds[node.kind];
    for (int64_t i = 0; i < kind.parts; i++)
      STD_TORCH_CHECK(node.n[i] >= 0 && node.n[i] < static_cast<int64_t>(nodes.size()),
                      "a mask node refers to nodes that do not precede it");
    if (node.kind == MaskNode::Band && node.n[1]) node.n[0] += p.S - p.L;
    switch (kind.tensors) {
      case MaskTensors::None: break;
      case MaskTensors::Counts: integers(tensor(given[5]), 1, node.keys, node.key_batch); break;
      case MaskTensors::Ids:
        integers(tensor(given[5]), p.L, node.queries, node.query_batch);
        integers(tensor(given[6]), p.S, node.keys, node.key_batch);
        break;
      case MaskTensors::Positions: {
        const Tensor& x = tensor(given[5]);
        integers(x, x.dim() == 2 && x.size(1) == 1 ? 1 : p.L, node.queries, node.query_batch);
        node.query_step = x.size(1) == 1 ? 0 : 1;
        if (node.n[2]) node.n[2] = p.L;
        break;
      }
      case MaskTensors::Pairs: node.table = flags(tensor(given[5]), p.L, p.S); break;
      case MaskTensors::Blocks: {
        const Tensor& x = tensor(given[5]);
        const int64_t length[2] = {p.L, p.S};
        STD_TORCH_CHECK(x.dim() == 4 && x.size(2) > 0 && x.size(3) > 0, "a mask table must have four dimensions");
        for (int i = 0; i < 2; i++) {
          if (!node.n[i]) node.n[i] = std::max<int64_t>(1, (length[i] + x.size(2 + i) - 1) / x.size(2 + i));
          STD_TORCH_CHECK(node.n[i] > 0, "mask blocks must not be empty");
        }
        node.table = flags(x, (p.L + node.n[0] - 1) / node.n[0], (p.S + node.n[1] - 1) / node.n[1]);
        break;
      }
    }
    nodes.push_back(node);
  }
  return nodes;
}

// The arguments besides q, k and v.
struct Arguments {
  MaybeTensor weight, key_bias, query_bias, bias, relative, sink;
  std::vector<Tensor> mask_tensors;
  std::vector<int64_t> mask;
  double scale, softcap;
  int64_t normalizer;
  double alpha, dropout;
  int64_t seed;
  int64_t origin[4];
  bool allow_bf16_dot;
};

// Unpacks the arguments; passing each one separately takes longer than computing a short sequence. Bit i of
// `present_mask` is set if the i-th of the six optional tensors is given; those come first in `tensors`, followed by
// the tensors of the mask. `packed` (int64) holds the normalizer, allow_bf16_dot, the bits of four doubles (scale,
// softcap, alpha, dropout), the four numbers of the origin, and the nodes of the mask.
Arguments unpack(const std::vector<Tensor>& tensors, int64_t present_mask, const Tensor& packed, int64_t seed) {
  STD_TORCH_CHECK(packed.scalar_type() == ScalarType::Long && packed.is_contiguous() && packed.numel() >= 10,
                  "packed must be at least 10 contiguous int64 values");
  Arguments arguments;
  auto tensor = tensors.begin();
  MaybeTensor* const optional[6] = {&arguments.weight, &arguments.key_bias, &arguments.query_bias,
                                    &arguments.bias,   &arguments.relative, &arguments.sink};
  for (int i = 0; i < 6; i++) {
    if (!(present_mask >> i & 1)) continue;
    STD_TORCH_CHECK(tensor != tensors.end(), "fewer tensors than present_mask says");
    *optional[i] = *tensor++;
  }
  arguments.mask_tensors.assign(tensor, tensors.end());
  const int64_t* n = static_cast<const int64_t*>(packed.data_ptr());
  arguments.normalizer = n[0], arguments.allow_bf16_dot = n[1] != 0, arguments.seed = seed;
  double* const reals[4] = {&arguments.scale, &arguments.softcap, &arguments.alpha, &arguments.dropout};
  for (int i = 0; i < 4; i++) std::memcpy(reals[i], n + 2 + i, sizeof(double));
  std::copy(n + 6, n + 10, arguments.origin);
  arguments.mask.assign(n + 10, n + packed.numel());
  return arguments;
}

// The validated arguments that the forward and backward pass share, as the kernels read them. The tensors must outlive
// it.
struct Call {
  Problem problem;
  std::vector<MaskNode> nodes;

  Call(const Tensor& q, const Tensor& k, const Tensor& v, const Arguments& arguments) {
    STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, "q, k and v must have four dimensions");
    Problem& p = problem;
    p.B = q.size(0), p.H = q.size(1), p.L = q.size(2), p.D = q.size(3), p.G = k.size(1), p.S = k.size(2),
    p.E = v.size(3);
    STD_TORCH_CHECK(p.G > 0 && p.H % p.G == 0, "the number of heads of q must be a multiple of that of k");
    p.q = rows(q, "q", p.B, p.H, p.L, p.D);
    p.k = rows(k, "k", p.B, p.G, p.S, p.D);
    p.v = rows(v, "v", p.B, p.G, p.S, p.E);
    p.scale = static_cast<float>(arguments.scale), p.softcap = static_cast<float>(arguments.softcap);
    if (arguments.weight) {
      STD_TORCH_CHECK(p.q.type == Type::Float && p.k.type == Type::Float && p.scale == 1.0f,
                      "with a weight, q and k must be float32 and scale must be 1");
      p.weight = floats(arguments.weight, "weight", (arguments.weight->dim() == 1 ? 1 : p.H) * p.D);
      p.weight_head = arguments.weight->dim() == 1 ? 0 : p.D;
    }
    p.key_bias = floats(arguments.key_bias, "key_bias", p.B * p.G * p.S);
    p.query_bias = floats(arguments.query_bias, "query_bias", p.B * p.H * p.L);
    if (arguments.bias) p.bias = table(*arguments.bias, "bias", p.B, p.H, p.L, p.S, type_of(*arguments.bias, "bias"));
    if (arguments.relative) {
      STD_TORCH_CHECK(
          arguments.relative->dim() == 2 && (arguments.relative->size(0) == 1 || arguments.relative->size(0) == p.H),
          "relative must have shape (H, ...)");
      p.relative = floats(arguments.relative, "relative", arguments.relative->size(0) * relative_size(p));
      p.relative_head = arguments.relative->size(0) == 1 ? 0 : relative_size(p);
    }
    p.sink = floats(arguments.sink, "sink", p.H);
    STD_TORCH_CHECK(arguments.normalizer >= 0 && arguments.normalizer < static_cast<int64_t>(Normalizer::kCount),
                    "the normalizer has an unknown kind");
    p.normalizer = static_cast<Normalizer>(arguments.normalizer);
    STD_TORCH_CHECK(arguments.alpha > 1.0 && arguments.alpha <= 2.0, "alpha must be in (1, 2]");
    p.alpha = arguments.alpha;
    STD_TORCH_CHECK(arguments.dropout >= 0.0 && arguments.dropout <= 1.0, "dropout must be in [0, 1]");
    p.has_dropout = arguments.dropout > 0.0;
    p.keep_scale = arguments.dropout < 1.0 ? static_cast<float>(1.0 / (1.0 - arguments.dropout)) : 0.0f;
    p.drop_threshold = static_cast<uint32_t>(std::min(std::nearbyint(arguments.dropout * 4294967296.0), 4294967295.0));
    std::copy(arguments.origin, arguments.origin + 4, p.origin);
    p.seed = arguments.seed, p.allow_bf16_dot = arguments.allow_bf16_dot;
    nodes = mask_nodes(arguments.mask, arguments.mask_tensors, p);
    p.mask = nodes.data(), p.mask_nodes = static_cast<int64_t>(nodes.size());
  }
  Call(const Call&) = delete;
};

}  // namespace
}  // namespace regard
