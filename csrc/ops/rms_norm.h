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

}  // namespace llama_ext
