// Accumulators of the backward passes: the gradients of a key/value head that come from one split of its queries.
#pragma once

#include "score.h"

namespace regard::REGARD_SET {

// Keys per block of the backward passes.
constexpr int64_t kBackwardKeys = 128;

inline void zero_floats(float* at, int64_t count) {
  for (int64_t n = 0; n < count; n += kWidth) store(at + n, Vec{});
}

class GradSums {
 public:
  // Floats per task: dK (S, padded D), dV (S, padded E) and, with a key bias, its gradient (padded S).
  static int64_t floats(const Problem& p) { return p.S * (padded(p.D) + padded(p.E)) + (p.key_bias ? padded(p.S) : 0); }

  // Doubles per task: by distance, and for the weights of an additive score, one row per head.
  static int64_t doubles(const Problem& p, const Gradients& g) {
    return p.repeats() * ((g.drelative ? relative_size(p) : 0) + (p.weight ? p.D : 0));
  }

  // Adds the double accumulators of a task for key/value head `head` to the gradients.
  static void add_doubles(const Problem& p, const Gradients& g, int64_t head, const double* doubles) {
    const int64_t relative = g.drelative ? p.repeats() * relative_size(p) : 0,
                  weights = p.weight ? p.repeats() * p.D : 0;
    for (int64_t n = 0; n < relative; n++) g.drelative[head * relative + n] += doubles[n];
    for (int64_t n = 0; n < weights; n++) g.dweight[head * weights + n] += doubles[relative + n];
  }

  // Writes dK, dV and the gradient of the key bias of a head: the totals over its splits, whose sums are `stride`
  // floats apart.
  static void write_grads(const Problem& p, const Gradients& g, int64_t b, int64_t head, const float* sums,
                          int64_t num_splits, int64_t stride) {
    const int64_t D = padded(p.D), E = padded(p.E);
    const float dk_scale = can_use_bf16_dot(p, g) ? p.scale : 1.0f;  // otherwise dK is computed from scaled q
    for (int64_t j = 0; j < p.S; j++) {
      if (g.dk.data) write_row(g.dk, b, head, j, p.D, sums + j * D, num_splits, stride, dk_scale);
      if (g.dv.data) write_row(g.dv, b, head, j, p.E, sums + p.S * D + j * E, num_splits, stride, 1.0f);
    }
    if (!g.dkey_bias) return;
    const Rows bias{reinterpret_cast<char*>(g.dkey_bias), p.G * p.S, p.S, p.S, Type::Float};
    write_row(bias, b, head, 0, p.S, sums + p.S * (D + E), num_splits, stride, 1.0f);
  }

  // Gradients of parameters are sums that may cancel: dS rounded to bfloat16 would not be precise enough.
  static bool can_use_bf16_dot(const Problem& p, const Gradients& g) {
    const bool has_bias_grad =
        g.dbias || g.drelative || g.dkey_bias || g.dquery_bias || (g.head_sums && p.normalizer == Normalizer::Sigmoid);
    return Scores::can_use_bf16_dot(p) && can_pair_columns(g.dout, p.E) && p.normalizer != Normalizer::Entmax &&
           !has_bias_grad;
  }

 private:
  static void write_row(const Rows& to, int64_t b, int64_t h, int64_t j, int64_t width, const float* sums,
                        int64_t num_splits, int64_t stride, float scale) {
    for (int64_t c = 0; c < width; c += kWidth) {
      Vec total = load(sums + c);
      for (int64_t n = 1; n < num_splits; n++) total += load(sums + n * stride + c);
      write(to.at(b, h, j) + c * size_of(to.type), to.type, total * broadcast(scale),
            static_cast<int>(min64(kWidth, width - c)));
    }
  }
};

}  // namespace regard::REGARD_SET
