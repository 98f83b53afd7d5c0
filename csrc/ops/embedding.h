#pragma once

#include "core/tensor_view.h"
#include "ops/matrix.h"

namespace llama_ext {

/// y[t] = table[ids[t]]
/// ids: (T) i32 in host memory, each in [0, V); with `live_ids` in the device's memory, unchecked, as sample_next writes them.
/// table: Matrix (V, C), any dtype. y: (T, C) f32, contiguous, must not overlap ids.
/// Throws ShapeError, DTypeError, TokenIdError.
struct EmbeddingArgs {
  TensorView ids;
  const Matrix* table = nullptr;
  TensorView y;
  bool live_ids = false;
};

void check(const EmbeddingArgs& args);

/// d_table[ids[t]] += d_y[t], for t in ascending order.
/// ids: as embedding. d_y: (T, C) f32, contiguous. d_table: Matrix (V, C) f32. Throws ShapeError, DTypeError, TokenIdError.
struct EmbeddingBackwardArgs {
  TensorView ids;
  TensorView d_y;
  Matrix* d_table = nullptr;
};

void check(const EmbeddingBackwardArgs& args);

/// Throws TokenIdError, naming the first offender and its place, unless every id is in [0, vocabulary).
void check_token_ids(const int32_t* ids, int64_t count, int64_t vocabulary);

}  // namespace llama_ext
