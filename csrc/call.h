// What the operators are told of a call, and its checks: anyone may call an operator. Part of bind.cpp.
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
    default: STD_TORCH_CHECK(false, name, " is of a type that the native kernels do not have"); return Type::Float;
  }
}

// A tensor (B, H, rows, width) whose last axis is contiguous.
Rows rows(const Tensor& x, const char* name, int64_t B, int64_t H, int64_t R, int64_t W) {
  STD_TORCH_CHECK(x.dim() == 4 && x.size(0) == B && x.size(1) == H && x.size(2) == R && x.size(3) == W, name, " has another shape than expected");
  STD_TORCH_CHECK(W <= 1 || x.stride(3) == 1, name, " has gaps in its last axis");
  return {static_cast<char*>(x.data_ptr()), x.stride(0), x.stride(1), x.stride(2), type_of(x, name)};
}

// Contiguous floats of so many numbers; null where there is no tensor.
const float* floats(const MaybeTensor& x, const char* name, int64_t numbers) {
  if (!x) return nullptr;
  STD_TORCH_CHECK(x->scalar_type() == ScalarType::Float && x->is_contiguous() && x->numel() == numbers, name, " must be ", numbers, " contiguous floats");
  return static_cast<const float*>(x->data_ptr());
}

// Strides of a tensor that broadcasts to (B, H, L, S).
Table table(const Tensor& x, const char* name, int64_t B, int64_t H, int64_t L, int64_t S, Type type) {
  const int64_t full[4] = {B, H, L, S};
  int64_t stride[4];
  STD_TORCH_CHECK(x.dim() == 4, name, " must have four axes");
  for (int axis = 0; axis < 4; axis++) {
    STD_TORCH_CHECK(x.size(axis) == full[axis] || x.size(axis) == 1, name, " does not broadcast to (B, H, L, S)");
    stride[axis] = x.size(axis) == 1 ? 0 : x.stride(axis);
  }
  return {static_cast<const char*>(x.data_ptr()), stride[0], stride[1], stride[2], stride[3], type};
}

// A node is eight numbers: its kind, three parameters, the nodes inside (two), and its tensors (two; -1 for none).
constexpr size_t kNodeNumbers = 8;

std::vector<MaskNode> mask_nodes(const std::vector<int64_t>& numbers, const std::vector<Tensor>& tensors, const Problem& p) {
  STD_TORCH_CHECK(numbers.size() % kNodeNumbers == 0, "a mask must be nodes of ", kNodeNumbers, " numbers");
  std::vector<MaskNode> nodes;
  const auto tensor = [&](int64_t index) -> const Tensor& {
    STD_TORCH_CHECK(index >= 0 && index < static_cast<int64_t>(tensors.size()), "a node of the mask names a tensor that is not there");
    return tensors[index];
  };
  const auto integers = [&](const Tensor& x, int64_t length) {
    STD_TORCH_CHECK(x.scalar_type() == ScalarType::Long && x.dim() == 2 && (x.size(0) == 1 || x.size(0) == p.B) && x.size(1) == length && (length <= 1 || x.stride(1) == 1),
                    "a tensor of the mask must be int64 of shape (B, ", length, ")");
    return static_cast<const int64_t*>(x.data_ptr());
  };
  const auto batch = [](const Tensor& x) { return x.size(0) == 1 ? int64_t{0} : x.stride(0); };
  for (size_t at = 0; at < numbers.size(); at += kNodeNumbers) {
    const int64_t* n = numbers.data() + at;
    MaskNode node;
    STD_TORCH_CHECK(n[0] >= MaskNode::Band && n[0] <= MaskNode::Not, "a node of the mask is of no known kind");
    node.kind = static_cast<MaskNode::Kind>(n[0]);
    node.offset = n[1], node.behind = n[2], node.ahead = n[3], node.left = n[4], node.right = n[5];
    const int64_t index = static_cast<int64_t>(nodes.size());
    const bool inner = node.kind == MaskNode::And || node.kind == MaskNode::Or || node.kind == MaskNode::Not;
    STD_TORCH_CHECK(!inner || (node.left >= 0 && node.left < index && node.right >= 0 && node.right < index), "a node of the mask joins nodes that do not come before it");
    if (node.kind == MaskNode::Before || node.kind == MaskNode::Documents) {
      const Tensor& keys = tensor(n[7]);
      node.keys = integers(keys, node.kind == MaskNode::Before ? 1 : p.S);
      node.key_batch = batch(keys);
    }
    if (node.kind == MaskNode::Documents) {
      const Tensor& queries = tensor(n[6]);
      node.queries = integers(queries, p.L);
      node.query_batch = batch(queries);
    }
    if (node.kind == MaskNode::Blocks || node.kind == MaskNode::Dense) {
      const Tensor& x = tensor(n[6]);
      const bool blocks = node.kind == MaskNode::Blocks;
      STD_TORCH_CHECK(x.scalar_type() == ScalarType::Bool, "a table of the mask must be bool");
      STD_TORCH_CHECK(!blocks || (node.behind > 0 && node.ahead > 0), "the blocks of a mask must not be empty");
      const int64_t R = blocks ? (p.L + node.behind - 1) / node.behind : p.L, C = blocks ? (p.S + node.ahead - 1) / node.ahead : p.S;
      node.table = table(x, "a table of the mask", p.B, p.H, R, C, Type::Float);
    }
    nodes.push_back(node);
  }
  return nodes;
}

// What the operators are told beside q, k and v, in their order.
struct Words {
  MaybeTensor weight, key_bias, query_bias, bias, relative, sink;
  std::vector<Tensor> mask_tensors;
  std::vector<int64_t> mask;
  double scale, softcap;
  int64_t normalizer;
  double alpha, dropout;
  int64_t seed;
  bool pairs;
};

// The same, packed: to hand over each by itself takes longer than a short sequence takes to compute. Of the six tensors that
// may be left out, the bits of `there` say which stand first among `tensors`, in their order; those of the mask follow. `told`
// are normalizer and pairs, scale, softcap, alpha and dropout as the bits of doubles, and the nodes of the mask.
Words unpack(const std::vector<Tensor>& tensors, int64_t there, const Tensor& told, int64_t seed) {
  STD_TORCH_CHECK(told.scalar_type() == ScalarType::Long && told.is_contiguous() && told.numel() >= 6, "told must be at least 6 contiguous whole numbers");
  Words words;
  auto tensor = tensors.begin();
  MaybeTensor* const optional[6] = {&words.weight, &words.key_bias, &words.query_bias, &words.bias, &words.relative, &words.sink};
  for (int i = 0; i < 6; i++) {
    if (!(there >> i & 1)) continue;
    STD_TORCH_CHECK(tensor != tensors.end(), "there are fewer tensors than told");
    *optional[i] = *tensor++;
  }
  words.mask_tensors.assign(tensor, tensors.end());
  const int64_t* n = static_cast<const int64_t*>(told.data_ptr());
  words.normalizer = n[0], words.pairs = n[1] != 0, words.seed = seed;
  double* const reals[4] = {&words.scale, &words.softcap, &words.alpha, &words.dropout};
  for (int i = 0; i < 4; i++) std::memcpy(reals[i], n + 2 + i, sizeof(double));
  words.mask.assign(n + 6, n + told.numel());
  return words;
}

// All that forward and backward pass are told alike, as the kernels read it. Tensors must outlive it.
struct Call {
  Problem problem;
  std::vector<MaskNode> nodes;

  Call(const Tensor& q, const Tensor& k, const Tensor& v, const Words& words) {
    STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, "q, k and v must have four axes");
    Problem& p = problem;
    p.B = q.size(0), p.H = q.size(1), p.L = q.size(2), p.D = q.size(3), p.G = k.size(1), p.S = k.size(2), p.E = v.size(3);
    STD_TORCH_CHECK(p.G > 0 && p.H % p.G == 0, "the heads of q must be a multiple of those of k");
    p.q = rows(q, "q", p.B, p.H, p.L, p.D);
    p.k = rows(k, "k", p.B, p.G, p.S, p.D);
    p.v = rows(v, "v", p.B, p.G, p.S, p.E);
    p.scale = static_cast<float>(words.scale), p.softcap = static_cast<float>(words.softcap);
    if (words.weight) {
      STD_TORCH_CHECK(p.q.type == Type::Float && p.k.type == Type::Float && p.scale == 1.0f, "with a weight, q and k must be floats, and scale 1");
      p.weight = floats(words.weight, "weight", (words.weight->dim() == 1 ? 1 : p.H) * p.D);
      p.weight_head = words.weight->dim() == 1 ? 0 : p.D;
    }
    p.key_bias = floats(words.key_bias, "key_bias", p.B * p.G * p.S);
    p.query_bias = floats(words.query_bias, "query_bias", p.B * p.H * p.L);
    if (words.bias) p.bias = table(*words.bias, "bias", p.B, p.H, p.L, p.S, type_of(*words.bias, "bias"));
    if (words.relative) {
      STD_TORCH_CHECK(words.relative->dim() == 2 && (words.relative->size(0) == 1 || words.relative->size(0) == p.H), "relative must be of shape (H, ...)");
      p.relative = floats(words.relative, "relative", words.relative->size(0) * relative_numbers(p));
      p.relative_head = words.relative->size(0) == 1 ? 0 : relative_numbers(p);
    }
    p.sink = floats(words.sink, "sink", p.H);
    STD_TORCH_CHECK(words.normalizer >= 0 && words.normalizer <= 2, "normalizer must be 0 (softmax), 1 (sigmoid) or 2 (entmax)");
    p.normalizer = static_cast<Normalizer>(words.normalizer);
    STD_TORCH_CHECK(words.alpha > 1.0 && words.alpha <= 2.0, "alpha must be above 1, and at most 2");
    p.alpha = words.alpha;
    STD_TORCH_CHECK(words.dropout >= 0.0 && words.dropout <= 1.0, "dropout must be from 0 to 1");
    p.drops = words.dropout > 0.0;
    p.kept = words.dropout < 1.0 ? static_cast<float>(1.0 / (1.0 - words.dropout)) : 0.0f;
    p.threshold = static_cast<uint32_t>(std::min(std::nearbyint(words.dropout * 4294967296.0), 4294967295.0));
    p.seed = words.seed, p.pairs = words.pairs;
    nodes = mask_nodes(words.mask, words.mask_tensors, p);
    p.mask = nodes.data(), p.mask_nodes = static_cast<int64_t>(nodes.size());
  }
  Call(const Call&) = delete;
};

}  // namespace
}  // namespace regard
