#pragma once

#include "core/tensor_view.h"

namespace llama_ext {

/// y = exp(x - max(x)) / sum(exp(x - max(x))) over the last axis
/// x, y: (rows, N) f32, rows may be strided; y may be x. An entry of -inf gets probability 0; a row of nothing but -inf,
/// and a row with a NaN or +inf, gives NaN. Saves y. Backward: d_x = y (d_y - sum(d_y y)). Throws ShapeError, DTypeError.
struct SoftmaxArgs {
  TensorView x;
  TensorView y;
};

void check(const SoftmaxArgs& args);

}  // namespace llama_ext
