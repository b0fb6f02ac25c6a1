// The statistics that a forward pass returns: which ones are requested, and their tensors. Part of bind.cpp.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "arguments.h"

namespace regard {
namespace {

// Uninitialized, on the CPU. By the C interface: the dispatcher takes 1 us longer per tensor.
Tensor empty(const std::vector<int64_t>& shape, ScalarType type) {
  int64_t strides[4], count = 1;
  const int64_t dims = static_cast<int64_t>(shape.size());
  for (int64_t axis = dims - 1; axis >= 0; axis--) {
    strides[axis] = count;
    count *= std::max<int64_t>(shape[axis], 1);
  }
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      dims, shape.data(), strides, torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)),
      aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// The same with zeros.
Tensor zeros(const Tensor& like, const std::vector<int64_t>& shape, ScalarType type) {
  int64_t count = 1;
  for (const int64_t size : shape) count *= size;
  if (count > 1 << 16) return torch::stable::new_zeros(like, shape, type);  // by several threads
  Tensor result = empty(shape, type);
  std::memset(result.data_ptr(), 0, count * result.element_size());
  return result;
}

// Bit 0 of `requested` says that no backward pass follows; the next ones are those of REGARD_SUMMARIES.
bool is_requested(int64_t requested, Summary summary) {
  return (requested >> (1 + static_cast<int>(summary)) & 1) != 0;
}

void check_requested(int64_t requested, int64_t top, size_t rows, bool has_member) {
  STD_TORCH_CHECK(top >= 0 && (top > 0) == is_requested(requested, Summary::top_weights) &&
                      (top > 0) == is_requested(requested, Summary::top_keys) &&
                      (rows > 0) == is_requested(requested, Summary::rows) &&
                      has_member == is_requested(requested, Summary::mass),
                  "top, row_indices and member must be given if, and only if, they are requested");
}

// Appends the requested statistics to the results, in the order of REGARD_SUMMARIES, and points `o` to them.
void allocate_statistics(const Problem& p, Outputs& o, const Tensor& like, int64_t requested,
                         std::vector<Tensor>& results) {
  const auto size = [&](char axis) {
    switch (axis) {
      case 'B': return p.B;
      case 'H': return p.H;
      case 'L': return p.L;
      case 'S': return p.S;
      case 'K': return o.top;
      case 'R': return o.row_count;
      default: return o.groups;
    }
  };
  const auto allocate = [&](Summary summary, auto*& to, const char* axes, bool is_final) {
    if (!is_requested(requested, summary)) return;
    using Element = std::remove_reference_t<decltype(*to)>;
    const ScalarType type = std::is_same_v<Element, float> ? ScalarType::Float : ScalarType::Long;
    std::vector<int64_t> shape;
    for (; *axes; axes++) shape.push_back(size(*axes));
    results.push_back(is_final ? zeros(like, shape, type) : empty(shape, type));
    to = static_cast<Element*>(results.back().data_ptr());
  };
#define REGARD_ALLOCATE(name, type, axes, is_final) allocate(Summary::name, o.name, axes, is_final);
  REGARD_SUMMARIES(REGARD_ALLOCATE)
#undef REGARD_ALLOCATE
}

}  // namespace
}  // namespace regard
