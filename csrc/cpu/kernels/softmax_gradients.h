// Dropout, and the rows of training's attention: softmax and its gradient. Bound: the exponential, and with dropout the
// multiplications of its random bits.
#pragma once

#include "cpu/kernel_table.h"
#include "cpu/kernels/math.h"
#include "cpu/kernels/vectors.h"

namespace llama_ext::LLAMA_EXT_ISA_NAMESPACE {

/// dropout_bits (ops/dropout.h) of neighbouring elements whose indices share their high halves.
struct DropoutMask {
  explicit DropoutMask(const DropoutRow& row)
      : low(iadd(iset1(static_cast<int>(static_cast<uint32_t>(row.index))), ilanes())),
        seed(iset1(static_cast<int>(static_cast<uint32_t>(row.seed)))),
        high(iset1(static_cast<int>(static_cast<uint32_t>(row.seed >> 32) ^ static_cast<uint32_t>(row.index >> 32)))),
        threshold(iset1(static_cast<int>(row.threshold))),
        factor(vset1(row.factor)) {}

  /// The elements from `i` on: value or 0.
  vf keep(int64_t i, vf value) const {
    vi x = ixor(iadd(low, iset1(static_cast<int>(i))), seed);
    x = ixor(x, ishift_right(x, 16));
    x = imul(x, iset1(0x7feb352d));
    x = ixor(x, ixor(ishift_right(x, 15), high));
    x = imul(x, iset1(static_cast<int>(0x846ca68bu)));
    x = ixor(x, ishift_right(x, 16));
    return vkeep(x, threshold, value);
  }
  vf apply(int64_t i, vf value) const { return keep(i, vmul(value, factor)); }

  vi low, seed, high, threshold;
  vf factor;
};

template <bool kAccumulate>
static inline void dropout_span(const float* x, int64_t size, const DropoutRow& row, float* y) {
  const DropoutMask mask(row);
  for_each_vector(size, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    const vf kept = mask.apply(i, take(x + i, n));
    put(y + i, kAccumulate ? vadd(take(y + i, n), kept) : kept, n);
  });
}

static void dropout(const float* x, int64_t size, const DropoutRow& row, bool accumulate, float* y) {
  // Up to where the low half of the index wraps.
  const int64_t until = static_cast<int64_t>((uint64_t{1} << 32) - (row.index & 0xffffffffu));
  const int64_t first = size < until ? size : until;
  DropoutRow rest = row;
  rest.index += static_cast<uint64_t>(first);
  if (accumulate) {
    dropout_span<true>(x, first, row, y);
    dropout_span<true>(x + first, size - first, rest, y + first);
  } else {
    dropout_span<false>(x, first, row, y);
    dropout_span<false>(x + first, size - first, rest, y + first);
  }
}

template <bool kDrops>
static inline float softmax_of(const SoftmaxRow& row) {
  float* s = row.s;
  const vf scale = vset1(row.scale);
  const float lowest = -__builtin_inff();
  // Of scaled scores, as the scale may be negative.
  vf top = vset1(lowest);
  int64_t i = 0;
  for (; i + kWidth <= row.seen; i += kWidth) top = vmax(vmul(vload(s + i), scale), top);
  for (; i < row.seen; ++i) top = vmax(vset1(s[i] * row.scale), top);
  const float highest = reduce_max(top);
  const vf shift = vset1(-highest);
  const DropoutMask mask(row.dropout);
  vf sum = vzero();
  for (i = 0; i + kWidth <= row.seen; i += kWidth) {
    const vf e = vexp(vfma(vload(s + i), scale, shift));
    sum = vadd(sum, e);
    vstore(s + i, kDrops ? mask.keep(i, e) : e);
  }
  if (i < row.seen) {
    const int64_t n = row.seen - i;
    vf e = vexp(vfma(vload_n(s + i, n, 0.0f), scale, shift));
    vstore_n(s + i, e, n);
    e = vload_n(s + i, n, 0.0f);  // zeros beyond the last key
    sum = vadd(sum, e);
    if constexpr (kDrops) vstore_n(s + i, mask.keep(i, e), n);
  }
  for (int64_t j = row.seen; j < row.depth; ++j) s[j] = 0.0f;
  const float total = reduce_add(sum);
  *row.log_sum = highest + static_cast<float>(__builtin_log(static_cast<double>(total)));
  return row.dropout.factor / total;
}

static float attention_softmax(const SoftmaxRow& row) {
  return row.dropout.threshold == 0 ? softmax_of<false>(row) : softmax_of<true>(row);
}

template <bool kDrops>
static inline void gradient_of(const SoftmaxGradientRow& row) {
  const vf scale = vset1(row.scale);
  const vf shift = vset1(-row.log_sum);
  const vf delta = vset1(row.delta);
  const DropoutMask mask(row.dropout);
  for_each_vector(row.seen, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    const vf p = vexp(vfma(take(row.s + i, n), scale, shift));
    vf dp = take(row.dp + i, n);
    vf dropped = p;
    if constexpr (kDrops) {
      dp = mask.apply(i, dp);
      dropped = mask.apply(i, p);
    }
    put(row.s + i, vmul(vmul(p, vsub(dp, delta)), scale), n);
    put(row.dp + i, dropped, n);
  });
  for (int64_t j = row.seen; j < row.depth; ++j) {
    row.s[j] = 0.0f;
    row.dp[j] = 0.0f;
  }
}

static void attention_gradient(const SoftmaxGradientRow& row) {
  if (row.dropout.threshold == 0) {
    gradient_of<false>(row);
  } else {
    gradient_of<true>(row);
  }
}

}  // namespace llama_ext::LLAMA_EXT_ISA_NAMESPACE
