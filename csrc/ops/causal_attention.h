#pragma once

#include <cstdint>
#include <vector>

#include "core/tensor_view.h"
#include "ops/matrix.h"

namespace llama_ext {

/// Rows [row, row + tokens) are one sequence.
struct RowRange {
  int64_t row = 0;
  int64_t tokens = 0;
};

/// Causal grouped-query attention of whole sequences without a cache, for training; head h reads key/value head h / (H / K).
/// For each sequence and its token i:
///   p[h, i, j] = softmax_j(scale q[h, i] . k[j]),  j = 0 .. i;   y[h, i] = sum_j drop(p[h, i, j]) v[j]
/// drop: dropout (dropout.h) of element ((row of token i) H + h) 2^20 + j, with `dropout` and `seed`; 0 keeps all.
/// q, y: (M, H, D) f32, k, v: (M, K, D) f32, rows may be strided, H a multiple of K; y must not overlap the others.
/// sequences: disjoint ranges of rows, at most 2^20 tokens each; rows of none are left alone.
/// log_sums: (M, H) f32: log sum_j exp(scale q . k[j]), which the gradient needs.
/// A row's bits depend neither on other sequences nor on threads, nor on later tokens that are finite: what is not may spoil a few
/// rows before it, whose weights for it are multiplied as zeros. Throws ShapeError, DTypeError, OptionError.
/// Source: Vaswani et al. 2017; Ainslie et al., "GQA", 2023.
struct CausalAttentionArgs {
  std::vector<RowRange> sequences;
  TensorView q;
  TensorView k;
  TensorView v;
  double scale = 1.0;
  TensorView y;
  TensorView log_sums;
  double dropout = 0.0;
  uint64_t seed = 0;
  Compute compute = Compute::kExact;
};

void check(const CausalAttentionArgs& args);

/// With p recomputed from log_sums, dp[i, j] = drop(d_y[i] . v[j]) and delta[i] = d_y[i] . y[i]:
///   ds = p (dp - delta);  d_q[i] = scale sum_j ds[i, j] k[j];  d_k[j] = scale sum_i ds[i, j] q[i];  d_v[j] = sum_i drop(p[i, j]) d_y[i]
/// d_k and d_v sum over the H / K heads that share a key/value head. d_q: (M, H, D), d_k, d_v: (M, K, D) f32, rows may be
/// strided, overwritten; they may be q, k and v themselves, otherwise they overlap neither an input nor each other. The rest as causal_attention.
/// Source: Dao et al., "FlashAttention", 2022, appendix B.
struct CausalAttentionBackwardArgs {
  std::vector<RowRange> sequences;
  TensorView q;
  TensorView k;
  TensorView v;
  double scale = 1.0;
  TensorView y;
  TensorView log_sums;
  TensorView d_y;
  TensorView d_q;
  TensorView d_k;
  TensorView d_v;
  double dropout = 0.0;
  uint64_t seed = 0;
  Compute compute = Compute::kExact;
};

void check(const CausalAttentionBackwardArgs& args);

inline constexpr int64_t kMostAttentionTokens = int64_t{1} << 20;

}  // namespace llama_ext
