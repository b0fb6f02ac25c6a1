// The operators of torch.ops.regard_native, in LibTorch's stable ABI: one binary for every torch from 2.10 on.
//
// They validate shapes, dtypes and strides again, since anyone can call an operator; users see the errors of
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

#include "arguments.h"
#include "statistics.h"

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

// The instruction sets that this machine supports, the fastest first.
std::vector<const Kernels*> available_sets() {
  std::vector<const Kernels*> sets;
#if defined(REGARD_HAS_AVX512) || defined(REGARD_HAS_AVX512_BF16)
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
#ifdef REGARD_HAS_AVX512_BF16
  if (avx512 && __builtin_cpu_supports("avx512bf16")) sets.push_back(kernels_avx512_bf16());
#endif
#ifdef REGARD_HAS_AVX512
  if (avx512) sets.push_back(kernels_avx512());
#endif
#ifdef REGARD_HAS_AVX2
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    sets.push_back(kernels_avx2());
#endif
  sets.push_back(kernels_baseline());
  return sets;
}

// The set with this name; the fastest if the name is empty.
const Kernels* find_set(const std::string& name) {
  for (const Kernels* set : available_sets())
    if (name.empty() || name == set->name) return set;
  STD_TORCH_CHECK(false, "no native kernels for the instruction set '", name, "' on this machine or in this build");
  return nullptr;
}

std::atomic<const Kernels*> in_use{nullptr};

// The set that REGARD_INSTRUCTIONS names; by default, the fastest.
const Kernels* default_set() {
  const char* name = std::getenv("REGARD_INSTRUCTIONS");
  return find_set(name ? name : "");
}

// The set in use.
const Kernels& kernels() {
  const Kernels* set = in_use.load(std::memory_order_acquire);
  if (!set) in_use.store(set = default_set(), std::memory_order_release);
  return *set;
}

#if defined(__SANITIZE_THREAD__)
// ThreadSanitizer does not understand the synchronization of OpenMP threads, and reports races everywhere: use
// std::thread instead.
Pool pool() {
  return {4, [](int64_t count, Task task, void* context) {
            std::vector<std::thread> others;
            for (int64_t i = 1; i < count; i++) others.emplace_back(task, context, i);
            task(context, 0);
            for (std::thread& other : others) other.join();
          }};
}
#else
// After a fork, the child has no OpenMP threads, but OpenMP waits for them forever, also in torch's own operators. In a
// child of a process that has started threads here, tasks run sequentially.
bool is_forked() {
  static std::atomic<pid_t> started{0};
  pid_t process = 0;
  return !started.compare_exchange_strong(process, getpid()) && process != getpid();
}

Pool pool() {
  return {static_cast<int64_t>(torch::stable::get_num_threads()), [](int64_t count, Task task, void* context) {
            if (count == 1) return task(context, 0);
            if (is_forked()) {
              for (int64_t i = 0; i < count; i++) task(context, i);
              return;
            }
            torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
              for (int64_t i = begin; i < end; i++) task(context, i);
            });
          }};
}
#endif

float* data(Tensor& x) { return static_cast<float*>(x.data_ptr()); }

// Returns, in this order:
// - out (B, H, L, E);
// - row_max and inverse_sum (2, B, H, L); with a 16-bit dtype, also out as float32 (B, H, L, E); both are empty with
//   bit 0 of `requested`: no backward pass follows;
// - the statistics of REGARD_SUMMARIES that the next bits request, in order. They take `top`, the number of largest
//   weights; `row_indices`, the queries of `rows`, negative ones from the end; and `member`, bool (B|1, N, S), the
//   groups of `mass`.
std::vector<Tensor> forward(Tensor q, Tensor k, Tensor v, std::vector<Tensor> tensors, int64_t present_mask,
                            Tensor packed, int64_t seed, int64_t top, MaybeTensor member,
                            std::vector<int64_t> row_indices, int64_t requested) {
  const Arguments arguments = unpack(tensors, present_mask, packed, seed);
  const Call call(q, k, v, arguments);
  const Problem& p = call.problem;
  check_requested(requested, top, row_indices.size(), member.has_value());
  std::vector<Tensor> results;
  const auto next = [&](const std::vector<int64_t>& shape, ScalarType type = ScalarType::Float) -> Tensor& {
    results.push_back(empty(shape, type));
    return results.back();
  };
  Outputs o;
  o.out = rows(next({p.B, p.H, p.L, p.E}, v.scalar_type()), "out", p.B, p.H, p.L, p.E);
  const bool is_16_bit = v.scalar_type() != ScalarType::Float;
  if (requested & 1) {
    next({0});
    if (is_16_bit) next({0});
  } else {
    o.row_max = data(next({2, p.B, p.H, p.L}));
    o.inverse_sum = o.row_max + p.B * p.H * p.L;
    if (is_16_bit) o.exact = rows(next({p.B, p.H, p.L, p.E}), "out", p.B, p.H, p.L, p.E);
  }
  o.top = top;
  for (int64_t& row : row_indices) {
    STD_TORCH_CHECK(row >= -p.L && row < p.L, "a row index is out of range");
    if (row < 0) row += p.L;
  }
  o.row_indices = row_indices.data(), o.row_count = static_cast<int64_t>(row_indices.size());
  if (member) {
    STD_TORCH_CHECK(member->scalar_type() == ScalarType::Bool && member->dim() == 3 &&
                        (member->size(0) == 1 || member->size(0) == p.B) && member->size(2) == p.S,
                    "member must be bool of shape (B, N, S)");
    o.member = static_cast<const char*>(member->data_ptr());
    o.member_batch = member->size(0) == 1 ? 0 : member->stride(0), o.member_group = member->stride(1),
    o.member_key = member->stride(2);
    o.groups = member->size(1);
  }
  allocate_statistics(p, o, q, requested, results);
  STD_TORCH_CHECK(kernels().forward(p, o, pool()), "out of memory");
  return results;
}

// Returns the output of a call with default arguments (scale 1/sqrt(D), softmax) without a backward pass, and the
// statistics that the bits of `requested` name, as `forward` does, with minimal overhead: those that take no argument
// but `top`. Returns nothing if the tensors need anything else.
std::vector<Tensor> plain(Tensor q, Tensor k, Tensor v, int64_t top, int64_t requested) {
  const auto type = q.scalar_type();
  if (q.dim() != 4 || k.dim() != 4 || v.dim() != 4 || k.scalar_type() != type || v.scalar_type() != type ||
      type == ScalarType::Double)
    return {};
  Problem p;
  p.B = q.size(0), p.H = q.size(1), p.L = q.size(2), p.D = q.size(3), p.G = k.size(1), p.S = k.size(2), p.E = v.size(3);
  const bool fit = k.size(0) == p.B && v.size(0) == p.B && v.size(1) == p.G && v.size(2) == p.S && k.size(3) == p.D;
  if (!fit || !p.B || !p.G || !p.L || !p.S || !p.D || !p.E || p.H % p.G || q.stride(3) != 1 || k.stride(3) != 1 ||
      v.stride(3) != 1)
    return {};
  check_requested(requested, top, 0, false);
  p.q = rows(q, "q", p.B, p.H, p.L, p.D);
  p.k = rows(k, "k", p.B, p.G, p.S, p.D);
  p.v = rows(v, "v", p.B, p.G, p.S, p.E);
  p.scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(p.D)));
  std::vector<Tensor> results{empty({p.B, p.H, p.L, p.E}, type)};
  Outputs o;
  o.out = rows(results[0], "out", p.B, p.H, p.L, p.E);
  o.top = top;
  allocate_statistics(p, o, q, requested, results);
  STD_TORCH_CHECK(kernels().forward(p, o, pool()), "out of memory");
  return results;
}

// Returns the requested gradients: of q, k, v (bits 1, 2, 4), key_bias, query_bias (8, 16), bias (32), relative (64),
// of the sink or the bias of a sigmoid per query (B, H, L) (128), and of weight per head (H, D) (256). For bits 1, 2
// and 4, an empty tensor is returned if the bit is not set; the others are omitted.
std::vector<Tensor> backward(Tensor out, Tensor dout, Tensor stats, MaybeTensor dlse, Tensor q, Tensor k, Tensor v,
                             std::vector<Tensor> tensors, int64_t present_mask, Tensor packed, int64_t seed,
                             int64_t requested) {
  const Arguments arguments = unpack(tensors, present_mask, packed, seed);
  const Call call(q, k, v, arguments);
  const Problem& p = call.problem;
  const int64_t per_query = p.B * p.H * p.L;
  Gradients g;
  g.out = rows(out, "out", p.B, p.H, p.L, p.E);
  g.dout = rows(dout, "dout", p.B, p.H, p.L, p.E);
  if (p.normalizer != Normalizer::Sigmoid)
    g.row_max = floats(stats, "stats", 2 * per_query), g.inverse_sum = g.row_max + per_query;
  g.dlse = floats(dlse, "dlse", per_query);
  std::vector<Tensor> results;
  const auto zeros = [&](std::vector<int64_t> shape) {
    results.push_back(torch::stable::new_zeros(q, shape, ScalarType::Float));
    return data(results.back());
  };
  const auto like = [&](const Tensor& x, bool want, Rows& to, int64_t H, int64_t R, int64_t W) {
    results.push_back(want ? empty({p.B, H, R, W}, x.scalar_type()) : empty({0}, x.scalar_type()));
    if (want) to = rows(results.back(), "a gradient", p.B, H, R, W);
  };
  like(q, requested & 1, g.dq, p.H, p.L, p.D);
  like(k, requested & 2, g.dk, p.G, p.S, p.D);
  like(v, requested & 4, g.dv, p.G, p.S, p.E);
  STD_TORCH_CHECK(!(requested & 8) || arguments.key_bias,
                  "the gradient of key_bias was requested, but there is no key_bias");
  if (requested & 8) g.dkey_bias = zeros({p.B, p.G, p.S});
  if (requested & 16) g.dquery_bias = zeros({p.B, p.H, p.L});
  if (requested & 32) {
    STD_TORCH_CHECK(arguments.bias, "the gradient of bias was requested, but there is no bias");
    int64_t size[4], stride[4], count = 1;
    for (int axis = 3; axis >= 0; axis--) {
      size[axis] = arguments.bias->size(axis), stride[axis] = size[axis] == 1 ? 0 : count;
      count *= size[axis];
    }
    g.dbias = zeros({size[0], size[1], size[2], size[3]});
    g.dbias_batch = stride[0], g.dbias_head = stride[1], g.dbias_query = stride[2], g.dbias_key = stride[3],
    g.dbias_size = count;
  }
  if (requested & 64) {
    results.push_back(torch::stable::new_zeros(q, {p.H, relative_size(p)}, ScalarType::Double));
    g.drelative = static_cast<double*>(results.back().data_ptr());
  }
  if (requested & 128) g.head_sums = zeros({p.B, p.H, p.L});
  Tensor dweight = torch::stable::new_zeros(q, {p.weight ? p.H : 0, p.D}, ScalarType::Double);
  g.dweight = static_cast<double*>(dweight.data_ptr());
  if (requested & 256) results.push_back(dweight);
  STD_TORCH_CHECK(kernels().backward(p, g, pool()), "out of memory");
  return results;
}

// Whether all elements of a row are finite. Adding one to the lowest bit of the exponent carries into the sign only if
// all exponent bits are set. A sum of the elements would not do: it may overflow although all are finite.
template <class UInt>
bool is_finite(const char* row, int64_t width, UInt lowest) {
  const UInt* x = reinterpret_cast<const UInt*>(row);
  const UInt sign = static_cast<UInt>(UInt{1} << (8 * sizeof(UInt) - 1));
  UInt carried = 0;
  for (int64_t i = 0; i < width; i++) carried |= static_cast<UInt>((x[i] & static_cast<UInt>(~sign)) + lowest);
  return !(carried & sign);
}

bool is_finite(const char* row, int64_t width, Type type) {
  if (type == Type::Float) return is_finite<uint32_t>(row, width, 0x00800000);
  return is_finite<uint16_t>(row, width, type == Type::Half ? 0x0400 : 0x0080);
}

// Whether q, k and v contain neither NaN nor inf. False also for dtypes and layouts that the kernels do not read.
bool finite(Tensor q, Tensor k, Tensor v) {
  struct Work {
    Rows x;
    int64_t H, R, W, rows, tasks;
    std::atomic<bool> is_finite{true};
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
    // One thread per 100,000 elements: for less, waking it takes longer.
    work.tasks = std::max<int64_t>(1, std::min<int64_t>(threads.threads, work.rows * work.W / 100000));
    const auto task = [](void* context, int64_t i) {
      Work& w = *static_cast<Work*>(context);
      const int64_t end = w.rows * (i + 1) / w.tasks;
      for (int64_t n = w.rows * i / w.tasks; n < end; n++)
        if (!is_finite(w.x.at(n / (w.H * w.R), n / w.R % w.H, n % w.R), w.W, w.x.type))
          return w.is_finite.store(false, std::memory_order_relaxed);
    };
    threads.run(work.tasks, task, &work);
    if (!work.is_finite.load(std::memory_order_relaxed)) return false;
  }
  return true;
}

// Returns the number of operations, or of bytes read, in `rounds` rounds of a loop; for the benchmark.
double peak(Tensor buffer, int64_t kind, int64_t rounds) {
  STD_TORCH_CHECK(kind >= 0 && kind <= 2 && rounds >= 0,
                  "kind must be 0 (float FMA), 1 (bf16 dot product) or 2 (reads)");
  return kernels().peak(static_cast<PeakKind>(kind), rounds, floats(buffer, "buffer", buffer.numel()), buffer.numel(),
                        pool());
}

// Selects the instruction set with this name; "" restores the default.
void use(std::string name) { in_use.store(name.empty() ? default_set() : find_set(name), std::memory_order_release); }

// Names of the supported sets, the one in use first.
std::string instructions() {
  std::string names = kernels().name;
  for (const Kernels* set : available_sets())
    if (set != &kernels()) names += std::string(" ") + set->name;
  return names;
}

// The names in a table of problem.h, in the order of their numbers.
std::string names(std::string table) {
#define REGARD_NAME(name, ...) #name " "
  if (table == "masks") return REGARD_MASKS(REGARD_NAME);
  if (table == "normalizers") return REGARD_NORMALIZERS(REGARD_NAME);
  if (table == "summaries") return REGARD_SUMMARIES(REGARD_NAME);
#undef REGARD_NAME
  STD_TORCH_CHECK(false, "no table is named '", table, "'; expected masks, normalizers or summaries");
  return "";
}

// The number of forward passes by decode.h in the set in use; for tests.
int64_t decode_count() { return __atomic_load_n(kernels().decode_count, __ATOMIC_RELAXED); }

#define REGARD_ARGUMENTS "Tensor q, Tensor k, Tensor v, Tensor[] tensors, int present_mask, Tensor packed, int seed, "

STABLE_TORCH_LIBRARY(regard_native, m) {
  m.def("forward(" REGARD_ARGUMENTS "int top, Tensor? member, int[] row_indices, int requested) -> Tensor[]");
  m.def("plain(Tensor q, Tensor k, Tensor v, int top, int requested) -> Tensor[]");
  m.def("backward(Tensor out, Tensor dout, Tensor stats, Tensor? dlse, " REGARD_ARGUMENTS "int requested) -> Tensor[]");
  m.def("finite(Tensor q, Tensor k, Tensor v) -> bool");
  m.def("peak(Tensor buffer, int kind, int rounds) -> float");
  m.def("instructions() -> str");
  m.def("names(str table) -> str");
  m.def("use(str name) -> ()");
  m.def("decode_count() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(regard_native, CPU, m) {
  m.impl("forward", TORCH_BOX(&forward));
  m.impl("plain", TORCH_BOX(&plain));
  m.impl("backward", TORCH_BOX(&backward));
  m.impl("finite", TORCH_BOX(&finite));
  m.impl("peak", TORCH_BOX(&peak));
}

STABLE_TORCH_LIBRARY_IMPL(regard_native, CompositeExplicitAutograd, m) {
  m.impl("instructions", TORCH_BOX(&instructions));
  m.impl("names", TORCH_BOX(&names));
  m.impl("use", TORCH_BOX(&use));
  m.impl("decode_count", TORCH_BOX(&decode_count));
}

}  // namespace
}  // namespace regard
