// The kernels of one instruction set: this file is compiled once per set, with REGARD_SET its name.
#include "backward.h"
#include "decode.h"
#include "forward.h"
#include "peak.h"
#include "sparse_backward.h"
#include "sparse_forward.h"

#define REGARD_TEXT(x) #x
#define REGARD_NAME(x) REGARD_TEXT(x)
#define REGARD_JOIN(a, b) a##b
#define REGARD_GETTER(set) REGARD_JOIN(kernels_, set)

namespace regard {
namespace REGARD_SET {
namespace {

// Tasks that workers take one by one.
struct Queue {
  int64_t next = 0;
  bool failed = false;

  int64_t take() { return __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED); }
  void fail() { __atomic_store_n(&failed, true, __ATOMIC_RELAXED); }
};

// How many multiplications are worth a thread: below, which is some 10 us, waking it costs more.
#if defined(REGARD_SANITIZED)
constexpr double kWorthAThread = 1.0;  // small problems find faults, too
#else
constexpr double kWorthAThread = 5e5;
#endif

int64_t workers(const Problem& p, int64_t rows, int64_t tasks, const Pool& pool) {
  const double work = static_cast<double>(rows) * p.S * (p.D + p.E);
  return most(1, least(least(tasks, pool.threads), static_cast<int64_t>(work / kWorthAThread)));
}
int64_t workers(const Problem& p, int64_t tasks, const Pool& pool) { return workers(p, p.B * p.H * p.L, tasks, pool); }

int64_t decoded = 0;

bool decode(const Problem& p, const Outputs& o, const Pool& pool) {
  struct Work {
    const Problem& p;
    const Outputs& o;
    Decode::Deal deal;
    float* partials;
    int32_t* done;
    Queue queue;
  } work{p, o, Decode::Deal(p, o.top), nullptr, nullptr, {}};
  __atomic_fetch_add(&decoded, 1, __ATOMIC_RELAXED);
  Scratch partials(work.deal.partials() + work.deal.groups);
  if (!partials) return false;
  work.partials = partials.take(work.deal.partials());
  work.done = reinterpret_cast<int32_t*>(partials.take(work.deal.groups));
  for (int64_t n = 0; n < work.deal.groups; n++) work.done[n] = 0;
  const auto task = [](void* context, int64_t) {
    Work& w = *static_cast<Work*>(context);
    Scratch scratch(Decode::scratch(w.deal, w.o.top));
    if (!scratch) return w.queue.fail();
    Decode decode(w.p, w.o, w.deal, scratch, w.partials, w.done);
    // The next task is taken before, so that its keys can be fetched while the last values are read.
    for (int64_t n = w.queue.take(), next; n < w.deal.tasks; n = next) decode.run(n, next = w.queue.take());
  };
  // To read a key takes as long as to multiply it with some four queries.
  pool.run(workers(p, p.B * p.G * most(work.deal.rows, 4), work.deal.tasks, pool), task, &work);
  return !work.queue.failed;
}

// In how many shares each of some heads is dealt out: their tiles go to them in turns.
int64_t deal(int64_t heads, int64_t tiles, int64_t threads) {
  int64_t shares = 1;
  while (heads * shares % threads && heads * shares < 4 * threads && shares < tiles) shares++;
  return shares;
}

// `Way` is Forward or SparseForward.
template <class Way>
bool forward_by(const Problem& p, const Outputs& o, const Pool& pool) {
  struct Work {
    const Problem& p;
    const Outputs& o;
    int64_t tiles, shares;
    float* received;
    Queue queue;
  } work{p, o, (p.L + kTile - 1) / kTile, 0, nullptr, {}};
  const int64_t heads = p.B * p.H, threads = workers(p, heads * work.tiles, pool);
  // A task is a tile; but what keys receive is summed up over some tiles first.
  work.shares = o.received ? deal(heads, work.tiles, threads) : work.tiles;
  const int64_t tasks = heads * work.shares;
  Scratch sums(o.received && work.shares > 1 ? tasks * p.S : 0);
  if (!sums) return false;
  work.received = work.shares > 1 ? sums.take(o.received ? tasks * p.S : 0) : o.received;
  const auto task = [](void* context, int64_t) {
    Work& w = *static_cast<Work*>(context);
    Scratch scratch(Way::scratch(w.p, w.o));
    if (!scratch) return w.queue.fail();
    Way forward(w.p, w.o, scratch);
    for (int64_t n; (n = w.queue.take()) < w.p.B * w.p.H * w.shares;) {
      const int64_t head = n / w.shares;
      forward.views().start();
      // Later tiles first: under a causal mask they have the most keys, and the last ones to be taken are the shortest.
      for (int64_t t = w.tiles - 1 - n % w.shares; t >= 0; t -= w.shares) forward.tile(head / w.p.H, head % w.p.H, t * kTile);
      if (w.o.received) forward.views().give(w.received + n * w.p.S);
    }
  };
  pool.run(least(threads, tasks), task, &work);
  if (work.queue.failed) return false;
  for (int64_t n = 0; o.received && work.shares > 1 && n < tasks; n++)
    for (int64_t j = 0; j < p.S; j++) o.received[n / work.shares * p.S + j] += work.received[n * p.S + j];
  return true;
}

bool forward(const Problem& p, const Outputs& o, const Pool& pool) {
  if (Decode::serves(p, o)) return decode(p, o, pool);
  return p.normalizer == Normalizer::Entmax ? forward_by<SparseForward>(p, o, pool) : forward_by<Forward>(p, o, pool);
}

// `Way` is Backward or SparseBackward.
template <class Way>
bool backward_by(const Problem& p, const Gradients& g, const Pool& pool) {
  struct Work {
    const Problem& p;
    const Gradients& g;
    int64_t shares, tasks, workers, doubles;
    bool in_order;
    float *sums, *dbias;
    double* double_sums;
    Queue queue;
  } work{p, g, 1, p.B * p.G, 1, 0, false, nullptr, nullptr, nullptr, {}};
  const int64_t heads = p.B * p.G, tiles = (p.L + kTile - 1) / kTile, threads = workers(p, heads * tiles, pool);
  // Heads that do not go evenly into the threads are dealt out by shares of their queries.
  work.shares = deal(heads, tiles, threads);
  work.tasks = heads * work.shares;
  work.workers = least(threads, work.tasks);
  work.doubles = Backward::doubles(p, g);
  // Tasks that would add to the same numbers of a bias each have a copy per worker, and a fixed worker.
  const bool shared = (p.B > 1 && !g.dbias_batch) || (p.G > 1 && !g.dbias_head) || (work.shares > 1 && !g.dbias_query);
  work.in_order = g.dbias && shared;
  const int64_t copies = work.in_order ? (work.workers - 1) * g.dbias_numbers : 0;
  Scratch scratch(work.tasks * (Backward::sums(p) + 2 * work.doubles) + copies);
  if (!scratch) return false;
  work.sums = scratch.take(work.tasks * Backward::sums(p));
  work.double_sums = reinterpret_cast<double*>(scratch.take(2 * work.tasks * work.doubles));
  work.dbias = scratch.take(copies);
  for (int64_t n = 0; n < work.tasks * work.doubles; n++) work.double_sums[n] = 0.0;
  for (int64_t n = 0; n < copies; n++) work.dbias[n] = 0.0f;

  const auto task = [](void* context, int64_t worker) {
    Work& w = *static_cast<Work*>(context);
    Scratch scratch(Way::scratch(w.p));
    if (!scratch) return w.queue.fail();
    Way backward(w.p, w.g, scratch);
    float* dbias = w.in_order && worker ? w.dbias + (worker - 1) * w.g.dbias_numbers : w.g.dbias;
    int64_t n = w.in_order ? worker * w.tasks / w.workers : w.queue.take();
    const int64_t end = w.in_order ? (worker + 1) * w.tasks / w.workers : w.tasks;
    for (; n < end; n = w.in_order ? n + 1 : w.queue.take()) {
      const int64_t head = n / w.shares;
      backward.run(head / w.p.G, head % w.p.G, n % w.shares, w.shares, w.sums + n * Backward::sums(w.p), w.double_sums + n * w.doubles, dbias);
    }
  };
  pool.run(work.workers, task, &work);
  if (work.queue.failed) return false;

  const auto give = [](void* context, int64_t head) {
    const Work& w = *static_cast<Work*>(context);
    const int64_t apart = Backward::sums(w.p);
    Backward::give(w.p, w.g, head / w.p.G, head % w.p.G, w.sums + head * w.shares * apart, w.shares, apart);
  };
  pool.run(heads, give, &work);
  for (int64_t n = 0; n < work.tasks; n++) Backward::add_doubles(p, g, n / work.shares % p.G, work.double_sums + n * work.doubles);
  for (int64_t n = 0; n < copies; n++) g.dbias[n % g.dbias_numbers] += work.dbias[n];
  return true;
}

bool backward(const Problem& p, const Gradients& g, const Pool& pool) {
  return p.normalizer == Normalizer::Entmax ? backward_by<SparseBackward>(p, g, pool) : backward_by<Backward>(p, g, pool);
}

}  // namespace
}  // namespace REGARD_SET

const Kernels* REGARD_GETTER(REGARD_SET)() {
  static const Kernels kernels{REGARD_NAME(REGARD_SET), REGARD_SET::forward, REGARD_SET::backward, REGARD_SET::peak, &REGARD_SET::decoded};
  return &kernels;
}

}  // namespace regard
