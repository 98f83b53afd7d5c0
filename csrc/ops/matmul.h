#pragma once

#include <span>

#include "core/tensor_view.h"
#include "ops/matrix.h"
#include "ops/rms_norm.h"

namespace llama_ext {

/// y = x W^T + bias, or y += x W^T + bias with `accumulate` (a residual connection); with `norm`, of rms_norm(x) instead of x
/// x: (M, K) f32, rows may be strided. weight: Matrix (N, K), f32 | bf16. bias: (N) f32 or none. y: (M, N) f32, rows
/// may be strided, must not overlap x or bias. Every sum runs in f32 over k in one fixed order that depends on nothing but the
/// ISA, the weights' dtype and `compute`: not on M, N or threads (on a GPU also on whether M is few or, with quantised weights, many:
/// cuda/kernels.h). K = 0 gives the bias alone.
/// Saves nothing. Backward: d_x = d_y W; d_weight += d_y^T x; d_bias += column sums of d_y.
/// Throws ShapeError, DTypeError.
struct MatmulArgs {
  TensorView x;
  const Matrix* weight = nullptr;
  TensorView bias;
  TensorView y;
  bool accumulate = false;
  Compute compute = Compute::kAuto;
  InputNorm norm = {};
};

void check(const MatmulArgs& args);

/// The gradients of y = x W^T + bias, as many as are given; d_y is read only:
///   d_x = d_y W, or d_x += d_y W with `accumulate`;   d_weight += d_y^T x;   d_bias += the sum of d_y's rows
/// d_y: (M, N) f32, rows may be strided. weight: Matrix (N, K) of any type, for d_x: gradients pass through frozen quantised
/// weights, as float32 numbers (rounded to bfloat16, as d_y, by a GPU with kBF16). x: (M, K) f32, rows may be strided, for
/// d_weight. d_x: (M, K) f32, rows may be strided, must not overlap d_y. d_weight: Matrix (N, K) f32. d_bias: (N) f32. Sums run in one fixed order that does not depend on threads.
/// Throws ShapeError, DTypeError.
struct MatmulBackwardArgs {
  TensorView d_y;
  const Matrix* weight = nullptr;
  TensorView x = {};
  TensorView d_x = {};
  bool accumulate = false;
  Matrix* d_weight = nullptr;
  TensorView d_bias = {};
  Compute compute = Compute::kExact;
};

void check(const MatmulBackwardArgs& args);
/// Of Backend::weights_backward: each by itself, and that none has a d_x or the target of another.
void check(std::span<const MatmulBackwardArgs> all);

}  // namespace llama_ext
