// Operations on one row: rms_norm, rope, softmax, log_sum_exp, and the epilogue of a product. Bound: reading the row.
#pragma once

#include "cpu/kernel_table.h"
#include "cpu/kernels/math.h"
#include "cpu/kernels/vectors.h"

namespace llama_ext::LLAMA_EXT_ISA_NAMESPACE {

static void rms_norm(const float* x, const float* weight, int64_t size, float eps, float* y, float* inv_rms) {
  vf sum = vzero();
  int64_t i = 0;
  for (; i + kWidth <= size; i += kWidth) {
    const vf value = vload(x + i);
    sum = vfma(value, value, sum);
  }
  if (i < size) {
    const vf value = vload_n(x + i, size - i, 0.0f);
    sum = vfma(value, value, sum);
  }
  const float mean = reduce_add(sum) / static_cast<float>(size);
  const float scale = 1.0f / __builtin_sqrtf(mean + eps);
  if (inv_rms != nullptr) *inv_rms = scale;
  const vf factor = vset1(scale);
  for (i = 0; i + kWidth <= size; i += kWidth) vstore(y + i, vmul(vmul(vload(x + i), factor), vload(weight + i)));
  if (i < size) {
    const int64_t rest = size - i;
    vstore_n(y + i, vmul(vmul(vload_n(x + i, rest, 0.0f), factor), vload_n(weight + i, rest, 0.0f)), rest);
  }
}

static void multiply_row(const float* x, int64_t size, float factor, float* y) {
  for_each_vector(size, [&](int64_t i, int64_t n) { put(y + i, vmul(take(x + i, n), vset1(factor)), n); });
}

static void divide_row(const float* x, int64_t size, float divisor, float* y) {
  for_each_vector(size, [&](int64_t i, int64_t n) { put(y + i, vdiv(take(x + i, n), vset1(divisor)), n); });
}

/// kInverse: by the opposite angle.
template <bool kInverse>
static void rope(float* x, int64_t half, const float* cos, const float* sin) {
  float* y = x + half;
  int64_t i = 0;
  for (; i + kWidth <= half; i += kWidth) {
    const vf a = vload(x + i);
    const vf b = vload(y + i);
    const vf c = vload(cos + i);
    const vf s = kInverse ? vsub(vzero(), vload(sin + i)) : vload(sin + i);
    vstore(x + i, vsub(vmul(a, c), vmul(b, s)));
    vstore(y + i, vfma(b, c, vmul(a, s)));
  }
  if (i < half) {
    const int64_t n = half - i;
    const vf a = vload_n(x + i, n, 0.0f);
    const vf b = vload_n(y + i, n, 0.0f);
    const vf c = vload_n(cos + i, n, 0.0f);
    const vf s = kInverse ? vsub(vzero(), vload_n(sin + i, n, 0.0f)) : vload_n(sin + i, n, 0.0f);
    vstore_n(x + i, vsub(vmul(a, c), vmul(b, s)), n);
    vstore_n(y + i, vfma(b, c, vmul(a, s)), n);
  }
}

static void softmax(const float* x, int64_t size, float* y) {
  const vf shift = vset1(row_max(x, size));
  vf sum = vzero();
  int64_t i = 0;
  for (; i + kWidth <= size; i += kWidth) {
    const vf e = vexp(vsub(vload(x + i), shift));
    sum = vadd(sum, e);
    vstore(y + i, e);
  }
  if (i < size) {
    const vf e = vexp(vsub(vload_n(x + i, size - i, -__builtin_inff()), shift));
    sum = vadd(sum, e);
    vstore_n(y + i, e, size - i);
  }
  const vf total = vset1(reduce_add(sum));
  for (i = 0; i + kWidth <= size; i += kWidth) vstore(y + i, vdiv(vload(y + i), total));
  if (i < size) vstore_n(y + i, vdiv(vload_n(y + i, size - i, 0.0f), total), size - i);
}

static double log_sum_exp(const float* x, int64_t size) {
  const float highest = row_max(x, size);
  const vf shift = vset1(highest);
  // Float32 lanes only over short stretches: a vocabulary of 128k in one chain would cost digits.
  double total = 0.0;
  for (int64_t begin = 0; begin < size; begin += 1024) {
    const int64_t end = size - begin < 1024 ? size : begin + 1024;
    vf sum = vzero();
    int64_t i = begin;
    for (; i + kWidth <= end; i += kWidth) sum = vadd(sum, vexp(vsub(vload(x + i), shift)));
    if (i < end) sum = vadd(sum, vexp(vsub(vload_n(x + i, end - i, -__builtin_inff()), shift)));
    total += static_cast<double>(reduce_add(sum));
  }
  return static_cast<double>(highest) + __builtin_log(total);
}

/// z / (1 + e^-z)
static inline vf silu(vf z) { return vdiv(z, vadd(vset1(1.0f), vexp(vsub(vzero(), z)))); }

/// One vector of a finished row; n < kWidth lanes are wanted when it is the last.
template <EpilogueKind kKind>
static inline void finish(const float* c, const float* bias, float* y, int64_t n) {
  if (n >= kWidth) {
    vf value = vload(c);
    if (bias != nullptr) value = vadd(value, vload(bias));
    if constexpr (kKind == EpilogueKind::kAdd) value = vadd(vload(y), value);
    if constexpr (kKind == EpilogueKind::kSiluGate) value = vmul(silu(vload(y)), value);
    vstore(y, value);
  } else {
    vf value = vload(c);
    if (bias != nullptr) value = vadd(value, vload_n(bias, n, 0.0f));
    if constexpr (kKind == EpilogueKind::kAdd) value = vadd(vload_n(y, n, 0.0f), value);
    if constexpr (kKind == EpilogueKind::kSiluGate) value = vmul(silu(vload_n(y, n, 0.0f)), value);
    vstore_n(y, value, n);
  }
}

template <EpilogueKind kKind>
static void finish_rows(const Epilogue& e, int64_t rows, const float* c, int64_t ldc) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < e.columns; i += kWidth) {
      finish<kKind>(c + r * ldc + i, e.bias == nullptr ? nullptr : e.bias + i, e.y + r * e.ldy + i, e.columns - i);
    }
  }
}

static void epilogue(const Epilogue& e, int64_t rows, const float* c, int64_t ldc) {
  switch (e.kind) {
    case EpilogueKind::kStore:
      finish_rows<EpilogueKind::kStore>(e, rows, c, ldc);
      return;
    case EpilogueKind::kAdd:
      finish_rows<EpilogueKind::kAdd>(e, rows, c, ldc);
      return;
    case EpilogueKind::kSiluGate:
      finish_rows<EpilogueKind::kSiluGate>(e, rows, c, ldc);
      return;
    case EpilogueKind::kSwiGlu:
      break;
  }
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < e.columns; i += kWidth) {
      vf gate = vload(c + r * ldc + i);
      vf up = vload(c + r * ldc + kPanel / 2 + i);
      if (e.bias != nullptr) {
        gate = vadd(gate, vload(e.bias + i));
        up = vadd(up, vload(e.bias + kPanel / 2 + i));
      }
      const vf value = vmul(silu(gate), up);
      if (e.columns - i >= kWidth) {
        vstore(e.y + r * e.ldy + i, value);
      } else {
        vstore_n(e.y + r * e.ldy + i, value, e.columns - i);
      }
    }
  }
}

}  // namespace llama_ext::LLAMA_EXT_ISA_NAMESPACE
