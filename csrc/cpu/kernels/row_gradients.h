// Gradients of the operations on rows, and sums over rows. Bound: reading and writing the row.
#pragma once

#include "cpu/kernel_table.h"
#include "cpu/kernels/math.h"
#include "cpu/kernels/rows.h"
#include "cpu/kernels/vectors.h"

namespace llama_ext::LLAMA_EXT_ISA_NAMESPACE {

static void swiglu(const float* gate, const float* up, int64_t size, float* y) {
  for_each_vector(size, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    put(y + i, vmul(silu(take(gate + i, n)), take(up + i, n)), n);
  });
}

template <bool kWantsY>
static inline void swiglu_gradients(const float* gate, const float* up, const float* d_y, int64_t size, float* d_gate,
                                    float* d_up, float* y) {
  const vf one = vset1(1.0f);
  for_each_vector(size, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    const vf g = take(gate + i, n);
    const vf u = take(up + i, n);
    const vf d = take(d_y + i, n);
    const vf s = vdiv(one, vadd(one, vexp(vsub(vzero(), g))));
    const vf gs = vmul(g, s);  // silu
    // s (1 + g (1 - s)), without the product of g and s twice: where e^-g overflows, s and gs are 0.
    const vf slope = vfma(gs, vsub(one, s), s);
    put(d_gate + i, vmul(vmul(d, u), slope), n);
    put(d_up + i, vmul(d, gs), n);
    if constexpr (kWantsY) put(y + i, vmul(gs, u), n);
  });
}

static void swiglu_backward(const float* gate, const float* up, const float* d_y, int64_t size, float* d_gate,
                            float* d_up, float* y) {
  if (y == nullptr) {
    swiglu_gradients<false>(gate, up, d_y, size, d_gate, d_up, y);
  } else {
    swiglu_gradients<true>(gate, up, d_y, size, d_gate, d_up, y);
  }
}

static void rms_norm_backward(const RmsNormGradientRow& row) {
  vf squares = vzero();
  vf products = vzero();
  for_each_vector(row.size, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    const vf x = take(row.x + i, n);
    squares = vfma(x, x, squares);
    products = vfma(vmul(take(row.weight + i, n), take(row.d_y + i, n)), x, products);
  });
  const float size = static_cast<float>(row.size);
  const float scale = 1.0f / __builtin_sqrtf(reduce_add(squares) / size + row.eps);
  const vf factor = vset1(scale);
  const vf share = vset1(reduce_add(products) / size * scale * scale);
  for_each_vector(row.size, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    const vf x = take(row.x + i, n);
    const vf d = take(row.d_y + i, n);
    vf gradient = vmul(factor, vsub(vmul(take(row.weight + i, n), d), vmul(x, share)));
    if (row.accumulate) gradient = vadd(take(row.d_x + i, n), gradient);
    if (row.d_weight != nullptr) put(row.d_weight + i, vfma(vmul(d, x), factor, take(row.d_weight + i, n)), n);
    put(row.d_x + i, gradient, n);
  });
}

static double softmax_gradient(float* logits, int64_t size, double scale) {
  const float highest = row_max(logits, size);
  const vf shift = vset1(highest);
  double total = 0.0;
  // As log_sum_exp.
  for (int64_t begin = 0; begin < size; begin += 1024) {
    const int64_t count = size - begin < 1024 ? size - begin : 1024;
    vf sum = vzero();
    for_each_vector(count, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
      const vf e = vexp(vsub(take(logits + begin + i, n, -__builtin_inff()), shift));
      sum = vadd(sum, e);
      put(logits + begin + i, e, n);
    });
    total += static_cast<double>(reduce_add(sum));
  }
  const vf factor = vset1(static_cast<float>(scale / total));
  for_each_vector(size, [&](int64_t i, int64_t n)
                            __attribute__((always_inline)) { put(logits + i, vmul(take(logits + i, n), factor), n); });
  return static_cast<double>(highest) + __builtin_log(total);
}

static float dot(const float* a, const float* b, int64_t size) {
  vf sum = vzero();
  for_each_vector(size, [&](int64_t i, int64_t n)
                            __attribute__((always_inline)) { sum = vfma(take(a + i, n), take(b + i, n), sum); });
  return reduce_add(sum);
}

static void scale(const float* x, int64_t size, float factor, float* y) {
  const vf factors = vset1(factor);
  for_each_vector(
      size, [&](int64_t i, int64_t n) __attribute__((always_inline)) { put(y + i, vmul(take(x + i, n), factors), n); });
}

static void add(const float* x, int64_t size, float* y) {
  for_each_vector(size, [&](int64_t i, int64_t n)
                            __attribute__((always_inline)) { put(y + i, vadd(take(y + i, n), take(x + i, n)), n); });
}

static void add_rows(const float* x, int64_t stride, int64_t rows, int64_t columns, float* sums) {
  // Sums of 64 rows by themselves: one chain over all of them would lose digits.
  for_each_vector(columns, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    vf total = take(sums + i, n);
    for (int64_t begin = 0; begin < rows; begin += 64) {
      const int64_t end = rows - begin < 64 ? rows : begin + 64;
      vf sum = vzero();
      for (int64_t r = begin; r < end; ++r) sum = vadd(sum, take(x + r * stride + i, n));
      total = vadd(total, sum);
    }
    put(sums + i, total, n);
  });
}

}  // namespace llama_ext::LLAMA_EXT_ISA_NAMESPACE
