// Operands of the products of training, in the layouts that products read: transposed tiles, panels, other precisions.
#pragma once

#include "cpu/kernel_table.h"
#include "cpu/kernels/bf16.h"
#include "cpu/kernels/gemm.h"

namespace llama_ext::LLAMA_EXT_ISA_NAMESPACE {

/// Blocks of 4 x 4, in 128-bit vectors on every ISA. Bound: shuffles, two elements a cycle.
static void transpose(const float* from, int64_t from_stride, int64_t rows, int64_t columns, float* to,
                      int64_t to_stride) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) {
    const float* source = from + r * from_stride;
    float* target = to + r;
    int64_t c = 0;
    for (; c + 4 <= columns; c += 4) {
      __m128 a = _mm_loadu_ps(source + c);
      __m128 b = _mm_loadu_ps(source + from_stride + c);
      __m128 d = _mm_loadu_ps(source + 2 * from_stride + c);
      __m128 e = _mm_loadu_ps(source + 3 * from_stride + c);
      _MM_TRANSPOSE4_PS(a, b, d, e);
      _mm_storeu_ps(target + c * to_stride, a);
      _mm_storeu_ps(target + (c + 1) * to_stride, b);
      _mm_storeu_ps(target + (c + 2) * to_stride, d);
      _mm_storeu_ps(target + (c + 3) * to_stride, e);
    }
    for (; c < columns; ++c) {
      for (int64_t i = 0; i < 4; ++i) target[c * to_stride + i] = source[i * from_stride + c];
    }
  }
  for (; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) to[c * to_stride + r] = from[r * from_stride + c];
  }
}

static inline void prefetch_row(const float* x, int64_t columns) {
  for (int64_t i = 0; i < columns; i += 16) __builtin_prefetch(x + i);
}

static void pack_columns(const float* x, int64_t stride, int64_t rows, int64_t columns, float* tiles) {
  // A few rows at a time, so that the lines of x which two tiles share stay in the L1 cache.
  constexpr int64_t kRows = 16;
  for (int64_t r0 = 0; r0 < rows; r0 += kRows) {
    const int64_t end = rows - r0 < kRows ? rows : r0 + kRows;
    // The next ones come from far away, a stride apart, meanwhile.
    for (int64_t r = end; r < rows && r < end + kRows; ++r) prefetch_row(x + r * stride, columns);
    int64_t c = 0;
    for (; c + kTileRows <= columns; c += kTileRows) {
      float* to = tiles + c * rows + r0 * kTileRows;
      for (int64_t r = r0; r < end; ++r, to += kTileRows) __builtin_memcpy(to, x + r * stride + c, 4 * kTileRows);
    }
    const int64_t rest = columns - c;
    float* to = tiles + c * rows + r0 * rest;
    for (int64_t r = r0; r < end; ++r, to += rest) {
      for (int64_t i = 0; i < rest; ++i) to[i] = x[r * stride + c + i];
    }
  }
}

static void pack_panel(const float* x, int64_t stride, int64_t rows, int64_t columns, float* panel) {
  for (int64_t r = 0; r < rows; ++r, x += stride, panel += kPanel) {
    prefetch_row(x + rows * stride, columns);  // as many rows again are packed next, if there are
    if (columns == kPanel) {
#pragma GCC unroll 8
      for (int64_t i = 0; i < kPanel; i += kWidth) vstore(panel + i, vload(x + i));
    } else {
      for (int64_t i = 0; i < kPanel; ++i) panel[i] = i < columns ? x[i] : 0.0f;
    }
  }
}

static void round_panel(const float* panel, int64_t rows, int64_t depth, uint16_t* pairs) {
  for (int64_t r = 0; r < depth; r += 2, pairs += 2 * kPanel) {
    for (int64_t odd = 0; odd < 2; ++odd) {
      const float* from = panel + (r + odd) * kPanel;
      for (int64_t i = 0; i < kPanel; ++i) pairs[2 * i + odd] = r + odd < rows ? round_to_bf16(from[i]) : uint16_t{0};
    }
  }
}

static void widen_f16(const uint16_t* panel, int64_t depth, float* out) {
  for (int64_t i = 0; i < depth * kPanel; i += kWidth) vstore(out + i, vload_f16(panel + i));
}

static void widen_bf16(const uint16_t* panel, int64_t depth, float* out) {
  for (int64_t r = 0; r < depth; r += 2, panel += 2 * kPanel, out += 2 * kPanel) {
    for (int64_t i = 0; i < kPanel; i += kWidth) {
      vstore(out + i, vload_pair_low(panel + 2 * i));
      vstore(out + kPanel + i, vload_pair_high(panel + 2 * i));
    }
  }
}

}  // namespace llama_ext::LLAMA_EXT_ISA_NAMESPACE
