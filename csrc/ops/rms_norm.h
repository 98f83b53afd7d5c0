#pragma once

#include "core/tensor_view.h"

namespace llama_ext {

/// y = x * rsqrt(mean(x^2, last axis) + eps) * weight
/// x, y: (rows, C) f32, rows may be strided. weight: (C) f32. eps > 0. The mean accumulates in f32.
/// Saves inv_rms: (rows) f32, when given. Backward overwrites d_x and adds to d_weight.
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
