#pragma once

#include "core/tensor_view.h"

namespace llama_ext {

/// y = silu(gate) * up, silu(z) = z / (1 + e^-z)
/// gate, up, y: (M, F) f32, rows may be strided. y may be gate or up itself.
/// Throws ShapeError, DTypeError. Source: Shazeer, "GLU Variants Improve Transformer", 2020.
struct SwigluArgs {
  TensorView gate;
  TensorView up;
  TensorView y;
};

void check(const SwigluArgs& args);

/// With s = sigmoid(gate):  d_gate = d_y up s (1 + gate (1 - s));  d_up = d_y gate s;  and y once more, when asked for
/// gate, up, d_y, d_gate, d_up, y: (M, F) f32, rows may be strided. d_gate may be gate itself, d_up may be up itself and y d_y
/// itself, otherwise outputs overlap nothing. Throws ShapeError, DTypeError.
struct SwigluBackwardArgs {
  TensorView gate;
  TensorView up;
  TensorView d_y;
  TensorView d_gate;
  TensorView d_up;
  TensorView y = {};
};

void check(const SwigluBackwardArgs& args);

}  // namespace llama_ext
