// Copies, multiples and sums of activations.
#pragma once

#include "backend/backend.h"

namespace llama_ext {

/// y = scale x. x, y: (M, N) f32, rows may be strided; y may be x itself.
inline void set_scaled(Backend& backend, const TensorView& x, const TensorView& y, double scale = 1.0) {
  backend.dropout({.x = x, .y = y, .scale = scale});  // which keeps everything
}

/// y += scale x. x, y: (M, N) f32, rows may be strided, disjoint.
inline void add_scaled(Backend& backend, const TensorView& x, const TensorView& y, double scale = 1.0) {
  backend.dropout({.x = x, .y = y, .accumulate = true, .scale = scale});
}

}  // namespace llama_ext
