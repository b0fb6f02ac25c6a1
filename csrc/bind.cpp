// The operators of torch.ops.regard_native, by LibTorch's stable ABI: one binary for every torch from 2.10 on.
//
// They check shapes, types and strides once more, since anyone may call an operator; the errors that users see are those of
// regard/plan/arguments.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "call.h"

namespace regard {

const Kernels* kernels_baseline();
#ifdef REGARD_HAS_AVX2
const Kernels* kernels_avx2();
#endif
#ifdef REGARD_HAS_AVX512
const Kernels* kernels_avx512();
#endif
#ifdef REGARD_HAS_AVX512_BF16
const Kernels* kernels_avx512_bf16();
#endif

namespace {

// The sets that this machine runs, the fastest first.
std::vector<const Kernels*> available() {
  std::vector<const Kernels*> sets;
#if defined(REGARD_HAS_AVX512) || defined(REGARD_HAS_AVX512_BF16)
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
#ifdef REGARD_HAS_AVX512_BF16
  if (avx512 && __builtin_cpu_supports("avx512bf16")) sets.push_back(kernels_avx512_bf16());
#endif
#ifdef REGARD_HAS_AVX512
  if (avx512) sets.push_back(kernels_avx512());
#endif
#ifdef REGARD_HAS_AVX2
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) sets.push_back(kernels_avx2());
#endif
  sets.push_back(kernels_baseline());
  return sets;
}

// The set of a name; the fastest for an empty one.
const Kernels* named(const std::string& name) {
  for (const Kernels* set : available())
    if (name.empty() || name == set->name) return set;
  STD_TORCH_CHECK(false, "there are no native kernels for the instruction set '", name, "' on this machine, or in this build");
  return nullptr;
}

std::atomic<const Kernels*> in_use{nullptr};

// The set that REGARD_INSTRUCTIONS names, or the best of this machine.
const Kernels* named_by_environment() {
  const char* name = std::getenv("REGARD_INSTRUCTIONS");
  return named(name ? name : "");
}

// The set in use.
const Kernels& kernels() {
  const Kernels* set = in_use.load(std::memory_order_acquire);
  if (!set) in_use.store(set = named_by_environment(), std::memory_order_release);
  return *set;
}

#if defined(__SANITIZE_THREAD__)
// ThreadSanitizer does not see how the threads of OpenMP wait for one another, and takes all that they do for races: under
// it, threads that it sees through.
Pool pool() {
  return {4, [](int64_t count, Task task, void* context) {
            std::vector<std::thread> others;
            for (int64_t i = 1; i < count; i++) others.emplace_back(task, context, i);
            task(context, 0);
            for (std::thread& other : others) other.join();
          }};
}
#else
// When a process forks, its threads do not come along, but OpenMP waits for them in the child, for ever: torch's own operators
// do. A child of a process whose threads were woken here goes through the tasks alone.
bool is_alone() {
  static std::atomic<pid_t> awake{0};
  pid_t process = 0;
  return !awake.compare_exchange_strong(process, getpid()) && process != getpid();
}

Pool pool() {
  return {static_cast<int64_t>(torch::stable::get_num_threads()), [](int64_t count, Task task, void* context) {
            if (count == 1) return task(context, 0);
            if (is_alone()) {
              for (int64_t i = 0; i < count; i++) task(context, i);
              return;
            }
            torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
              for (int64_t i = begin; i < end; i++) task(context, i);
            });
          }};
}
#endif

Tensor empty(const Tensor& like, std::vector<int64_t> shape, ScalarType type) { return torch::stable::new_empty(like, shape, type); }
float* data(Tensor& x) { return static_cast<float*>(x.data_ptr()); }

// -> out (B, H, L, E); for the backward pass, the rows' numbers (2, B, H, L), peak and total, and, unless it is of floats,
// out as floats, both empty where nothing is to follow (bit 8); then what is wanted of lse, max, entropy (bits 1, 2, 4), with
// top > 0 the largest weights and their keys (B, H, L, top), of received (B, H, S) and full (B, H, L, S) (bits 16, 32), the
// rows `numbers` (B, H, R, S), and the mass of the groups that `member` (B|1, N, S) tells (B, H, L, N).
std::vector<Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v, const Words& words, int64_t top, const MaybeTensor& member,
                            const std::vector<int64_t>& numbers, int64_t wanted) {
  const Call call(q, k, v, words);
  const Problem& p = call.problem;
  STD_TORCH_CHECK(top >= 0, "top must not be negative");
  std::vector<Tensor> results;
  const auto next = [&](std::vector<int64_t> shape, ScalarType type = ScalarType::Float) -> Tensor& {
    results.push_back(empty(q, std::move(shape), type));
    return results.back();
  };
  Outputs o;
  o.out = rows(next({p.B, p.H, p.L, p.E}, v.scalar_type()), "out", p.B, p.H, p.L, p.E);
  const bool rounded = v.scalar_type() != ScalarType::Float;
  if (wanted & 8) {
    next({0});
    if (rounded) next({0});
  } else {
    o.peak = data(next({2, p.B, p.H, p.L}));
    o.total = o.peak + p.B * p.H * p.L;
    if (rounded) o.exact = rows(next({p.B, p.H, p.L, p.E}), "out", p.B, p.H, p.L, p.E);
  }
  const std::vector<int64_t> per_query{p.B, p.H, p.L};
  if (wanted & 1) o.lse = data(next(per_query));
  if (wanted & 2) o.largest = data(next(per_query));
  if (wanted & 4) o.entropy = data(next(per_query));
  if ((o.top = top)) {
    o.top_weights = data(next({p.B, p.H, p.L, top}));
    o.top_keys = static_cast<int64_t*>(next({p.B, p.H, p.L, top}, ScalarType::Long).data_ptr());
  }
  const auto zeros = [&](std::vector<int64_t> shape) {
    results.push_back(torch::stable::new_zeros(q, shape, ScalarType::Float));
    return data(results.back());
  };
  if (wanted & 16) o.received = zeros({p.B, p.H, p.S});
  if (wanted & 32) o.full = zeros({p.B, p.H, p.L, p.S});
  if (!numbers.empty()) {
    for (int64_t number : numbers) STD_TORCH_CHECK(number >= 0 && number < p.L, "a number of a row is out of range");
    o.row_numbers = numbers.data(), o.row_count = static_cast<int64_t>(numbers.size());
    o.rows = zeros({p.B, p.H, o.row_count, p.S});
  }
  if (member) {
    STD_TORCH_CHECK(member->scalar_type() == ScalarType::Bool && member->dim() == 3 && (member->size(0) == 1 || member->size(0) == p.B) && member->size(2) == p.S,
                    "member must be bool of shape (B, N, S)");
    o.member = static_cast<const char*>(member->data_ptr());
    o.member_batch = member->size(0) == 1 ? 0 : member->stride(0), o.member_group = member->stride(1), o.member_key = member->stride(2);
    o.groups = member->size(1);
    o.mass = zeros({p.B, p.H, p.L, o.groups});
  }
  STD_TORCH_CHECK(kernels().forward(p, o, pool()), "out of memory");
  return results;
}

// -> the output of the plainest call, scale 1/sqrt(D) and nothing else, by the shortest way; nothing if anything is out of
// the ordinary.
MaybeTensor plain(Tensor q, Tensor k, Tensor v) {
  const auto type = q.scalar_type();
  if (q.dim() != 4 || k.dim() != 4 || v.dim() != 4 || k.scalar_type() != type || v.scalar_type() != type || type == ScalarType::Double) return std::nullopt;
  Problem p;
  p.B = q.size(0), p.H = q.size(1), p.L = q.size(2), p.D = q.size(3), p.G = k.size(1), p.S = k.size(2), p.E = v.size(3);
  const bool fit = k.size(0) == p.B && v.size(0) == p.B && v.size(1) == p.G && v.size(2) == p.S && k.size(3) == p.D;
  if (!fit || !p.B || !p.G || !p.L || !p.S || !p.D || !p.E || p.H % p.G || q.stride(3) != 1 || k.stride(3) != 1 || v.stride(3) != 1) return std::nullopt;
  p.q = rows(q, "q", p.B, p.H, p.L, p.D);
  p.k = rows(k, "k", p.B, p.G, p.S, p.D);
  p.v = rows(v, "v", p.B, p.G, p.S, p.E);
  p.scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(p.D)));
  Tensor out = empty(q, {p.B, p.H, p.L, p.E}, type);
  Outputs o;
  o.out = rows(out, "out", p.B, p.H, p.L, p.E);
  STD_TORCH_CHECK(kernels().forward(p, o, pool()), "out of memory");
  return out;
}

// -> those of the gradients that are wanted: of q, k, v (bits 1, 2, 4), of key_bias and query_bias (8, 16), of bias (32),
// of relative (64), of the sink, or the bias of a sigmoid, by query (B, H, L) (128), and of weight by head (H, D) (256). Where bit 1, 2 or 4 is not
// set, an empty tensor stands in its place; the others are left out.
std::vector<Tensor> backward(const Tensor& out, const Tensor& dout, const Tensor& stats, const MaybeTensor& dlse, const Tensor& q, const Tensor& k, const Tensor& v,
                             const Words& words, int64_t wanted) {
  const Call call(q, k, v, words);
  const Problem& p = call.problem;
  const int64_t per_query = p.B * p.H * p.L;
  Gradients g;
  g.out = rows(out, "out", p.B, p.H, p.L, p.E);
  g.dout = rows(dout, "dout", p.B, p.H, p.L, p.E);
  if (p.normalizer != Normalizer::Sigmoid) g.peak = floats(stats, "stats", 2 * per_query), g.total = g.peak + per_query;
  g.dlse = floats(dlse, "dlse", per_query);
  std::vector<Tensor> results;
  const auto zeros = [&](std::vector<int64_t> shape) {
    results.push_back(torch::stable::new_zeros(q, shape, ScalarType::Float));
    return data(results.back());
  };
  const auto like = [&](const Tensor& x, bool want, Rows& to, int64_t H, int64_t R, int64_t W) {
    results.push_back(want ? empty(x, {p.B, H, R, W}, x.scalar_type()) : empty(x, {0}, x.scalar_type()));
    if (want) to = rows(results.back(), "a gradient", p.B, H, R, W);
  };
  like(q, wanted & 1, g.dq, p.H, p.L, p.D);
  like(k, wanted & 2, g.dk, p.G, p.S, p.D);
  like(v, wanted & 4, g.dv, p.G, p.S, p.E);
  STD_TORCH_CHECK(!(wanted & 8) || words.key_bias, "there is no key_bias to have a gradient");
  if (wanted & 8) g.dkey_bias = zeros({p.B, p.G, p.S});
  if (wanted & 16) g.dquery_bias = zeros({p.B, p.H, p.L});
  if (wanted & 32) {
    STD_TORCH_CHECK(words.bias, "there is no bias to have a gradient");
    int64_t size[4], stride[4], numbers = 1;
    for (int axis = 3; axis >= 0; axis--) {
      size[axis] = words.bias->size(axis), stride[axis] = size[axis] == 1 ? 0 : numbers;
      numbers *= size[axis];
    }
    g.dbias = zeros({size[0], size[1], size[2], size[3]});
    g.dbias_batch = stride[0], g.dbias_head = stride[1], g.dbias_query = stride[2], g.dbias_key = stride[3], g.dbias_numbers = numbers;
  }
  if (wanted & 64) {
    results.push_back(torch::stable::new_zeros(q, {p.H, relative_numbers(p)}, ScalarType::Double));
    g.drelative = static_cast<double*>(results.back().data_ptr());
  }
  if (wanted & 128) g.head_sums = zeros({p.B, p.H, p.L});
  Tensor dweight = torch::stable::new_zeros(q, {p.weight ? p.H : 0, p.D}, ScalarType::Double);
  g.dweight = static_cast<double*>(dweight.data_ptr());
  if (wanted & 256) results.push_back(dweight);
  STD_TORCH_CHECK(kernels().backward(p, g, pool()), "out of memory");
  return results;
}

// The operators: with the words one by one, and packed.
std::vector<Tensor> forward_words(Tensor q, Tensor k, Tensor v, MaybeTensor weight, MaybeTensor key_bias, MaybeTensor query_bias, MaybeTensor bias, MaybeTensor relative,
                                  MaybeTensor sink, std::vector<Tensor> mask_tensors, std::vector<int64_t> mask, double scale, double softcap, int64_t normalizer,
                                  double alpha, double dropout, int64_t seed, bool pairs, int64_t top, MaybeTensor member, std::vector<int64_t> numbers, int64_t wanted) {
  const Words words{weight, key_bias, query_bias, bias, relative, sink, mask_tensors, mask, scale, softcap, normalizer, alpha, dropout, seed, pairs};
  return forward(q, k, v, words, top, member, numbers, wanted);
}

std::vector<Tensor> forward_told(Tensor q, Tensor k, Tensor v, std::vector<Tensor> tensors, int64_t there, Tensor told, int64_t seed, int64_t top, MaybeTensor member,
                                 std::vector<int64_t> numbers, int64_t wanted) {
  return forward(q, k, v, unpack(tensors, there, told, seed), top, member, numbers, wanted);
}

std::vector<Tensor> backward_words(Tensor out, Tensor dout, Tensor stats, MaybeTensor dlse, Tensor q, Tensor k, Tensor v, MaybeTensor weight, MaybeTensor key_bias,
                                   MaybeTensor query_bias, MaybeTensor bias, MaybeTensor relative, MaybeTensor sink, std::vector<Tensor> mask_tensors,
                                   std::vector<int64_t> mask, double scale, double softcap, int64_t normalizer, double alpha, double dropout, int64_t seed, bool pairs,
                                   int64_t wanted) {
  const Words words{weight, key_bias, query_bias, bias, relative, sink, mask_tensors, mask, scale, softcap, normalizer, alpha, dropout, seed, pairs};
  return backward(out, dout, stats, dlse, q, k, v, words, wanted);
}

std::vector<Tensor> backward_told(Tensor out, Tensor dout, Tensor stats, MaybeTensor dlse, Tensor q, Tensor k, Tensor v, std::vector<Tensor> tensors, int64_t there,
                                  Tensor told, int64_t seed, int64_t wanted) {
  return backward(out, dout, stats, dlse, q, k, v, unpack(tensors, there, told, seed), wanted);
}

// Have all numbers of a row a finite exponent? One is added to it at its lowest bit: only what has all bits set carries over
// into the sign. No sum of floats, which may overflow where all are finite.
template <class Bits>
bool is_finite(const char* row, int64_t width, Bits lowest) {
  const Bits* x = reinterpret_cast<const Bits*>(row);
  const Bits sign = static_cast<Bits>(Bits{1} << (8 * sizeof(Bits) - 1));
  Bits carried = 0;
  for (int64_t i = 0; i < width; i++) carried |= static_cast<Bits>((x[i] & static_cast<Bits>(~sign)) + lowest);
  return !(carried & sign);
}

bool is_finite(const char* row, int64_t width, Type type) {
  if (type == Type::Float) return is_finite<uint32_t>(row, width, 0x00800000);
  return is_finite<uint16_t>(row, width, type == Type::Half ? 0x0400 : 0x0080);
}

// -> is there neither NaN nor inf in q, k and v? False also where they are of no type or layout that the kernels read.
bool finite(Tensor q, Tensor k, Tensor v) {
  struct Work {
    Rows x;
    int64_t H, R, W, rows, tasks;
    std::atomic<bool> fine{true};
  };
  const Pool threads = pool();
  for (const Tensor& x : {q, k, v}) {
    const auto type = x.scalar_type();
    const bool known = type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half;
    if (!known || x.dim() != 4 || (x.size(3) > 1 && x.stride(3) != 1)) return false;
    Work work;
    work.H = x.size(1), work.R = x.size(2), work.W = x.size(3);
    work.x = rows(x, "x", x.size(0), work.H, work.R, work.W);
    if (work.x.row == work.W) work.W *= work.R, work.R = 1;  // without gaps, the rows of a head are one long row
    work.rows = x.size(0) * work.H * work.R;
    // A thread for some 100,000 numbers: below, waking it takes longer.
    work.tasks = std::max<int64_t>(1, std::min<int64_t>(threads.threads, work.rows * work.W / 100000));
    const auto task = [](void* context, int64_t i) {
      Work& w = *static_cast<Work*>(context);
      const int64_t end = w.rows * (i + 1) / w.tasks;
      for (int64_t n = w.rows * i / w.tasks; n < end; n++)
        if (!is_finite(w.x.at(n / (w.H * w.R), n / w.R % w.H, n % w.R), w.W, w.x.type)) return w.fine.store(false, std::memory_order_relaxed);
    };
    threads.run(work.tasks, task, &work);
    if (!work.fine.load(std::memory_order_relaxed)) return false;
  }
  return true;
}

// -> how many operations, or bytes read of the buffer, so many rounds of a loop of nothing else were: for the benchmark.
double peak(Tensor buffer, int64_t limit, int64_t rounds) {
  STD_TORCH_CHECK(limit >= 0 && limit <= 2 && rounds >= 0, "limit must be 0 (multiply-adds of floats), 1 (of pairs of bfloat16) or 2 (reads)");
  return kernels().peak(static_cast<Limit>(limit), rounds, floats(buffer, "buffer", buffer.numel()), buffer.numel(), pool());
}

// Uses the set of this name from here on; "" for the one that is used where nobody names one.
void use(std::string name) { in_use.store(name.empty() ? named_by_environment() : named(name), std::memory_order_release); }

// Names of the sets that this machine runs, the one in use first.
std::string instructions() {
  std::string names = kernels().name;
  for (const Kernels* set : available())
    if (set != &kernels()) names += std::string(" ") + set->name;
  return names;
}

// How many forward passes of the set in use were those of decoding: for tests.
int64_t decoded() { return __atomic_load_n(kernels().decoded, __ATOMIC_RELAXED); }

#define REGARD_WORDS                                                                                                                     \
  "Tensor q, Tensor k, Tensor v, Tensor? weight, Tensor? key_bias, Tensor? query_bias, Tensor? bias, Tensor? relative, Tensor? sink, Tensor[] mask_tensors, " \
  "int[] mask, float scale, float softcap, int normalizer, float alpha, float dropout, int seed, bool pairs, "

#define REGARD_TOLD "Tensor q, Tensor k, Tensor v, Tensor[] tensors, int there, Tensor told, int seed, "

STABLE_TORCH_LIBRARY(regard_native, m) {
  m.def("forward(" REGARD_WORDS "int top, Tensor? member, int[] numbers, int wanted) -> Tensor[]");
  m.def("plain(Tensor q, Tensor k, Tensor v) -> Tensor?");
  m.def("backward(Tensor out, Tensor dout, Tensor stats, Tensor? dlse, " REGARD_WORDS "int wanted) -> Tensor[]");
  m.def("forward_told(" REGARD_TOLD "int top, Tensor? member, int[] numbers, int wanted) -> Tensor[]");
  m.def("backward_told(Tensor out, Tensor dout, Tensor stats, Tensor? dlse, " REGARD_TOLD "int wanted) -> Tensor[]");
  m.def("finite(Tensor q, Tensor k, Tensor v) -> bool");
  m.def("peak(Tensor buffer, int limit, int rounds) -> float");
  m.def("instructions() -> str");
  m.def("use(str name) -> ()");
  m.def("decoded() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(regard_native, CPU, m) {
  m.impl("forward", TORCH_BOX(&forward_words));
  m.impl("plain", TORCH_BOX(&plain));
  m.impl("backward", TORCH_BOX(&backward_words));
  m.impl("forward_told", TORCH_BOX(&forward_told));
  m.impl("backward_told", TORCH_BOX(&backward_told));
  m.impl("finite", TORCH_BOX(&finite));
  m.impl("peak", TORCH_BOX(&peak));
}

STABLE_TORCH_LIBRARY_IMPL(regard_native, CompositeExplicitAutograd, m) {
  m.impl("instructions", TORCH_BOX(&instructions));
  m.impl("use", TORCH_BOX(&use));
  m.impl("decoded", TORCH_BOX(&decoded));
}

}  // namespace
}  // namespace regard
