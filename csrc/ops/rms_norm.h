#pragma once

#include "core/tensor_view.h"

namespace llama_ext {

/// y = x * rsqrt(mean(x^2, last axis) + eps) * weight
/// x, y: (rows, C) f32, rows may be strided. weight: (C) f32. eps > 0. The mean accumulates in f32.
/// Writes inv_rms: (rows) f32, when given.
/// Aliasing: y may be x only when no backward follows. Throws ShapeError, DTypeError, OptionError.
/// Source: Zhang & Sennrich, "Root Mean Square Layer Normalization", 2019.
struct RmsNormArgs {
  TensorView x;
  TensorView weight;
  double eps = 1e-6;
  TensorView y;
  TensorView inv_rms;
};

void check(const RmsNormArgs& args);

/// The gradients of rms_norm, inv_rms = rsqrt(mean(x^2) + eps) computed once more:
///   d_x = inv_rms (weight d_y - x inv_rms^2 mean(weight d_y x)), or d_x += ... with `accumulate`
///   d_weight += sum over rows of d_y x inv_rms, when given
/// x, d_y, d_x: (rows, C) f32, rows may be strided; d_x may be d_y itself unless it accumulates. weight, d_weight: (C) f32.
/// The sum over rows runs in an order that does not depend on threads. Throws ShapeError, DTypeError, OptionError.
struct RmsNormBackwardArgs {
  TensorView x;
  TensorView weight;
  double eps = 1e-6;
  TensorView d_y;
  TensorView d_x;
  bool accumulate = false;
  TensorView d_weight = {};
};

void check(const RmsNormBackwardArgs& args);

/// What a product applies to the rows of its x first, so that they are read and written once less: rms_norm(x) with this weight,
/// (K) f32; none: x as it is. The same bits as rms_norm by itself.
struct InputNorm {
  TensorView weight;
  double eps = 1e-6;

  explicit operator bool() const { return static_cast<bool>(weight); }
};

/// x: of the product `op`. Throws ShapeError, DTypeError, OptionError.
void check(const InputNorm& norm, const TensorView& x, const char* op);

}  // namespace llama_ext
