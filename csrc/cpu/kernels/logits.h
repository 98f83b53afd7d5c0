// The passes over a row of logits (ops/logits_loops.h), after which a token is chosen. Bound: the exponentials, 40 operations in
// float64 each.
#pragma once

#include "cpu/kernels/math.h"
#include "ops/logits_loops.h"

namespace llama_ext::LLAMA_EXT_ISA_NAMESPACE {

static int64_t logits_argmax(const float* logits, int64_t size) {
  // First the block, then the place in it.
  constexpr int64_t kBlock = 1024;
  const vf least = vset1(-__FLT_MAX__);
  vf bad = vzero();  // NaN, where a logit is NaN or +inf
  float best = -__builtin_inff();
  int64_t best_begin = 0;
  for (int64_t begin = 0; begin < size; begin += kBlock) {
    const int64_t end = size - begin < kBlock ? size : begin + kBlock;
    vf largest = vset1(-__builtin_inff());
    const auto take = [&](vf x) {
      largest = vmax(x, largest);
      const vf raised = vmax(least, x);  // -inf is allowed; NaN stays
      bad = vadd(bad, vsub(raised, raised));
    };
    int64_t i = begin;
    for (; i + kWidth <= end; i += kWidth) take(vload(logits + i));
    if (i < end) take(vload_n(logits + i, end - i, -__builtin_inff()));
    const float found = reduce_max(largest);
    if (found > best) {
      best = found;
      best_begin = begin;
    }
  }
  float lanes[kWidth];
  vstore(lanes, bad);
  for (int i = 0; i < kWidth; ++i) {
    if (lanes[i] != lanes[i]) return -1;
  }
  int64_t at = best_begin;
  while (logits[at] != best) ++at;
  return at;
}

static double logits_exp_sum(const float* logits, int64_t size, float largest) {
  return exp_sum_in_lanes(logits, size, largest);
}

static void logits_weights(double* x, int64_t size, double largest, double temperature) {
  weights_in_place(x, size, largest, temperature);
}

static constexpr LogitsLoops kLogits = {logits_argmax, logits_exp_sum, logits_weights};

}  // namespace llama_ext::LLAMA_EXT_ISA_NAMESPACE
