// Steps of optimisers, element by element. Bound: memory, one pass over each tensor.
#pragma once

#include "cpu/kernel_table.h"
#include "cpu/kernels/vectors.h"
#include "ops/logits_loops.h"

namespace llama_ext::LLAMA_EXT_ISA_NAMESPACE {

static void adam(const AdamStep& step, int64_t size, float* parameter, const float* gradient, float* first,
                 float* second) {
  const vf gradient_scale = vset1(step.gradient_scale);
  const vf gradient_decay = vset1(step.gradient_decay);
  const vf parameter_decay = vset1(-step.parameter_decay);
  const vf beta1 = vset1(step.beta1);
  const vf beta1_rest = vset1(step.beta1_rest);
  const vf beta2 = vset1(step.beta2);
  const vf beta2_rest = vset1(step.beta2_rest);
  const vf step_size = vset1(step.step_size);
  const vf second_scale = vset1(step.second_scale);
  const vf eps = vset1(step.eps);
  for_each_vector(size, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    vf p = take(parameter + i, n);
    const vf g = vfma(gradient_decay, p, vmul(gradient_scale, take(gradient + i, n)));
    // p (1 - lr decay), without rounding 1 - lr decay.
    p = vfma(parameter_decay, p, p);
    const vf m = vfma(beta1_rest, g, vmul(beta1, take(first + i, n)));
    const vf v = vfma(vmul(beta2_rest, g), g, vmul(beta2, take(second + i, n)));
    put(first + i, m, n);
    put(second + i, v, n);
    const vf root = vadd(vsqrt(vmul(v, second_scale)), eps);
    // Padding and weights that never had a gradient: 0 / 0 with eps = 0 would be NaN.
    const vf quotient = vdiv(vmul(step_size, m), vmax(root, vset1(1e-38f)));
    put(parameter + i, vsub(p, quotient), n);
  });
}

template <bool kHasVelocity>
static inline void sgd_step(const SgdStep& step, int64_t size, float* parameter, const float* gradient,
                            float* velocity) {
  const vf gradient_scale = vset1(step.gradient_scale);
  const vf decay = vset1(step.decay);
  const vf momentum = vset1(step.momentum);
  const vf rate = vset1(-step.lr);
  for_each_vector(size, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    const vf p = take(parameter + i, n);
    const vf g = vfma(decay, p, vmul(gradient_scale, take(gradient + i, n)));
    vf change = g;
    if constexpr (kHasVelocity) {
      const vf v = vfma(momentum, take(velocity + i, n), g);
      put(velocity + i, v, n);
      change = step.nesterov ? vfma(momentum, v, g) : v;
    }
    put(parameter + i, vfma(rate, change, p), n);
  });
}

static void sgd(const SgdStep& step, int64_t size, float* parameter, const float* gradient, float* velocity) {
  if (velocity == nullptr) {
    sgd_step<false>(step, size, parameter, gradient, velocity);
  } else {
    sgd_step<true>(step, size, parameter, gradient, velocity);
  }
}

static double sum_of_squares(const float* x, int64_t size) {
  constexpr int kChains = 4;
  Doubles sums[kChains] = {};
  int64_t i = 0;
  for (; i + kChains * kDoubles <= size; i += kChains * kDoubles) {
#pragma GCC unroll 4
    for (int chain = 0; chain < kChains; ++chain) {
      Doubles value;
#pragma GCC unroll 8
      for (int lane = 0; lane < kDoubles; ++lane) value[lane] = static_cast<double>(x[i + chain * kDoubles + lane]);
      sums[chain] += value * value;
    }
  }
  double total = 0.0;
  for (int chain = 0; chain < kChains; ++chain) {
    for (int lane = 0; lane < kDoubles; ++lane) total += sums[chain][lane];
  }
  for (; i < size; ++i) total += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  return total;
}

}  // namespace llama_ext::LLAMA_EXT_ISA_NAMESPACE
