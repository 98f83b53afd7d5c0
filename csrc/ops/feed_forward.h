#pragma once

#include "core/tensor_view.h"
#include "ops/matrix.h"
#include "ops/rms_norm.h"

namespace llama_ext {

/// SwiGLU: y = (silu(x G^T + b_g) * (x U^T + b_u)) D^T + b_d, or y += ... with `accumulate`; silu(z) = z / (1 + e^-z);
/// with `norm`, of rms_norm(x) instead of x
/// x: (M, C) f32. gate_up: Matrix (2 F', C), gate and up interleaved as `gate_rows` and `up_rows` say, F' = F rounded up to
/// kGateGroup, the surplus rows zero. gate_up_bias: (2 F') f32 in the same order, or none. down: Matrix (C, F).
/// Or, instead of gate_up, where the two are kept as different types: gate, up: Matrix (F, C); gate_bias, up_bias: (F) or none.
/// down_bias: (C) or none. y: (M, C) f32, x itself (a residual connection)
/// or disjoint from it.
/// Training composes it of products and swiglu (swiglu.h). Throws ShapeError, DTypeError.
/// Source: Shazeer, "GLU Variants Improve Transformer", 2020.
struct FeedForwardArgs {
  TensorView x;
  const Matrix* gate_up = nullptr;
  TensorView gate_up_bias;
  const Matrix* gate = nullptr;
  TensorView gate_bias = {};
  const Matrix* up = nullptr;
  TensorView up_bias = {};
  const Matrix* down = nullptr;
  TensorView down_bias;
  TensorView y;
  bool accumulate = false;
  Compute compute = Compute::kAuto;
  InputNorm norm = {};
};

void check(const FeedForwardArgs& args);

/// 16 gate rows, then the 16 up rows that belong to them: both halves of a product lie in one tile of columns.
inline constexpr int64_t kGateGroup = 16;
inline constexpr RowMap gate_rows() { return {.begin = 0, .group = kGateGroup, .stride = 2 * kGateGroup}; }
inline constexpr RowMap up_rows() { return {.begin = kGateGroup, .group = kGateGroup, .stride = 2 * kGateGroup}; }
/// Rows of the interleaved matrix for a feed-forward width F.
inline constexpr int64_t gate_up_size(int64_t width) { return (width + kGateGroup - 1) / kGateGroup * kGateGroup * 2; }

}  // namespace llama_ext
