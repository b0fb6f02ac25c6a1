// The kernels of one instruction set. This file is compiled once per set, with REGARD_SET its name.
#include "backward.h"
#include "decode.h"
#include "entmax_backward.h"
#include "entmax_forward.h"
#include "forward.h"
#include "peak.h"

#define REGARD_TEXT(x) #x
#define REGARD_NAME(x) REGARD_TEXT(x)
#define REGARD_JOIN(a, b) a##b
#define REGARD_GETTER(set) REGARD_JOIN(kernels_, set)

namespace regard {
namespace REGARD_SET {
namespace {

// A queue of task indices shared by the workers.
struct Queue {
  int64_t next = 0;
  bool failed = false;

  int64_t take() { return __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED); }
  void fail() { __atomic_store_n(&failed, true, __ATOMIC_RELAXED); }
};

// Minimum number of multiplications per thread, about 10 us: for less work, waking a thread costs more than it saves.
#if defined(REGARD_SANITIZED)
constexpr double kMinWorkPerThread = 1.0;  // small problems exercise the threads, too
#else
constexpr double kMinWorkPerThread = 5e5;
#endif

int64_t num_workers(const Problem& p, int64_t rows, int64_t tasks, const Pool& pool) {
  const double work = static_cast<double>(rows) * p.S * (p.D + p.E);
  return max64(1, min64(min64(tasks, pool.threads), static_cast<int64_t>(work / kMinWorkPerThread)));
}
int64_t num_workers(const Problem& p, int64_t tasks, const Pool& pool) {
  return num_workers(p, p.B * p.H * p.L, tasks, pool);
}

int64_t decode_count = 0;

bool decode(const Problem& p, const Outputs& o, const Pool& pool) {
  struct Work {
    const Problem& p;
    const Outputs& o;
    DecodePartition partition;
    float* partials;
    int32_t* done;
    Queue queue;
  } work{p, o, DecodePartition(p, o), nullptr, nullptr, {}};
  __atomic_fetch_add(&decode_count, 1, __ATOMIC_RELAXED);
  Scratch partials(work.partition.partials() + work.partition.groups);
  if (!partials) return false;
  work.partials = partials.take(work.partition.partials());
  work.done = reinterpret_cast<int32_t*>(partials.take(work.partition.groups));
  for (int64_t n = 0; n < work.partition.groups; n++) work.done[n] = 0;
  const auto task = [](void* context, int64_t) {
    Work& w = *static_cast<Work*>(context);
    Scratch scratch(Decode::scratch(w.partition));
    if (!scratch) return w.queue.fail();
    Decode decode(w.p, w.o, w.partition, scratch, w.partials, w.done);
    // Take the next task first, so that its keys can be prefetched while the last values are read.
    for (int64_t n = w.queue.take(), next; n < w.partition.tasks; n = next) decode.run(n, next = w.queue.take());
  };
  // Reading a key takes as long as multiplying it with about four queries.
  pool.run(num_workers(p, p.B * p.G * max64(work.partition.rows, 4), work.partition.tasks, pool), task, &work);
  return !work.queue.failed;
}

// Number of splits per head that balances the threads; the tiles of a head are assigned to its splits round-robin.
int64_t partition(int64_t heads, int64_t tiles, int64_t threads) {
  int64_t num_splits = 1;
  while (heads * num_splits % threads && heads * num_splits < 4 * threads && num_splits < tiles) num_splits++;
  return num_splits;
}

// `Pass` is Forward or EntmaxForward.
template <class Pass>
bool run_forward(const Problem& p, const Outputs& o, const Pool& pool) {
  struct Work {
    const Problem& p;
    const Outputs& o;
    int64_t tiles, num_splits;
    float* received;
    Queue queue;
  } work{p, o, (p.L + kTile - 1) / kTile, 0, nullptr, {}};
  const int64_t heads = p.B * p.H, threads = num_workers(p, heads * work.tiles, pool);
  // A task is a single tile, except that `received` is first summed over several tiles.
  work.num_splits = o.received ? partition(heads, work.tiles, threads) : work.tiles;
  const int64_t tasks = heads * work.num_splits;
  Scratch sums(o.received && work.num_splits > 1 ? tasks * p.S : 0);
  if (!sums) return false;
  work.received = work.num_splits > 1 ? sums.take(o.received ? tasks * p.S : 0) : o.received;
  const auto task = [](void* context, int64_t) {
    Work& w = *static_cast<Work*>(context);
    Scratch scratch(Pass::scratch(w.p, w.o));
    if (!scratch) return w.queue.fail();
    Pass forward(w.p, w.o, scratch);
    for (int64_t n; (n = w.queue.take()) < w.p.B * w.p.H * w.num_splits;) {
      const int64_t head = n / w.num_splits;
      forward.summaries().start();
      // Start with later tiles: under a causal mask they have the most keys, so that the last tasks are the shortest.
      for (int64_t t = w.tiles - 1 - n % w.num_splits; t >= 0; t -= w.num_splits)
        forward.tile(head / w.p.H, head % w.p.H, t * kTile);
      if (w.o.received) forward.summaries().write_received(w.received + n * w.p.S);
    }
  };
  pool.run(min64(threads, tasks), task, &work);
  if (work.queue.failed) return false;
  for (int64_t n = 0; o.received && work.num_splits > 1 && n < tasks; n++)
    for (int64_t j = 0; j < p.S; j++) o.received[n / work.num_splits * p.S + j] += work.received[n * p.S + j];
  return true;
}

bool forward(const Problem& p, const Outputs& o, const Pool& pool) {
  if (Decode::can_serve(p, o)) return decode(p, o, pool);
  return p.normalizer == Normalizer::Entmax ? run_forward<EntmaxForward>(p, o, pool) : run_forward<Forward>(p, o, pool);
}

// `Pass` is Backward or EntmaxBackward.
template <class Pass>
bool run_backward(const Problem& p, const Gradients& g, const Pool& pool) {
  struct Work {
    const Problem& p;
    const Gradients& g;
    int64_t num_splits, tasks, workers, doubles;
    bool has_copies;
    float *sums, *dbias;
    double* double_sums;
    Queue queue;
  } work{p, g, 1, p.B * p.G, 1, 0, false, nullptr, nullptr, nullptr, {}};
  const int64_t heads = p.B * p.G, tiles = (p.L + kTile - 1) / kTile, threads = num_workers(p, heads * tiles, pool);
  // If the number of heads is not a multiple of the number of threads, heads are split by queries.
  work.num_splits = partition(heads, tiles, threads);
  work.tasks = heads * work.num_splits;
  work.workers = min64(threads, work.tasks);
  work.doubles = GradSums::doubles(p, g);
  // Tasks that would add to the same elements of dbias run on a fixed worker, with one copy of dbias per worker.
  const bool shared =
      (p.B > 1 && !g.dbias_batch) || (p.G > 1 && !g.dbias_head) || (work.num_splits > 1 && !g.dbias_query);
  work.has_copies = g.dbias && shared;
  const int64_t copies = work.has_copies ? (work.workers - 1) * g.dbias_size : 0;
  Scratch scratch(work.tasks * (GradSums::floats(p) + 2 * work.doubles) + copies);
  if (!scratch) return false;
  work.sums = scratch.take(work.tasks * GradSums::floats(p));
  work.double_sums = reinterpret_cast<double*>(scratch.take(2 * work.tasks * work.doubles));
  work.dbias = scratch.take(copies);
  for (int64_t n = 0; n < work.tasks * work.doubles; n++) work.double_sums[n] = 0.0;
  for (int64_t n = 0; n < copies; n++) work.dbias[n] = 0.0f;

  const auto task = [](void* context, int64_t worker) {
    Work& w = *static_cast<Work*>(context);
    Scratch scratch(Pass::scratch(w.p));
    if (!scratch) return w.queue.fail();
    Pass backward(w.p, w.g, scratch);
    float* dbias = w.has_copies && worker ? w.dbias + (worker - 1) * w.g.dbias_size : w.g.dbias;
    int64_t n = w.has_copies ? worker * w.tasks / w.workers : w.queue.take();
    const int64_t end = w.has_copies ? (worker + 1) * w.tasks / w.workers : w.tasks;
    for (; n < end; n = w.has_copies ? n + 1 : w.queue.take()) {
      const int64_t head = n / w.num_splits;
      backward.run(head / w.p.G, head % w.p.G, n % w.num_splits, w.num_splits, w.sums + n * GradSums::floats(w.p),
                   w.double_sums + n * w.doubles, dbias);
    }
  };
  pool.run(work.workers, task, &work);
  if (work.queue.failed) return false;

  const auto write = [](void* context, int64_t head) {
    const Work& w = *static_cast<Work*>(context);
    const int64_t stride = GradSums::floats(w.p);
    GradSums::write_grads(w.p, w.g, head / w.p.G, head % w.p.G, w.sums + head * w.num_splits * stride, w.num_splits,
                          stride);
  };
  pool.run(heads, write, &work);
  for (int64_t n = 0; n < work.tasks; n++)
    GradSums::add_doubles(p, g, n / work.num_splits % p.G, work.double_sums + n * work.doubles);
  for (int64_t n = 0; n < copies; n++) g.dbias[n % g.dbias_size] += work.dbias[n];
  return true;
}

bool backward(const Problem& p, const Gradients& g, const Pool& pool) {
  return p.normalizer == Normalizer::Entmax ? run_backward<EntmaxBackward>(p, g, pool)
                                            : run_backward<Backward>(p, g, pool);
}

}  // namespace
}  // namespace REGARD_SET

const Kernels* REGARD_GETTER(REGARD_SET)() {
  static const Kernels kernels{REGARD_NAME(REGARD_SET), REGARD_SET::forward, REGARD_SET::backward, REGARD_SET::peak,
                               &REGARD_SET::decode_count};
  return &kernels;
}

}  // namespace regard
