// How rows come to a matrix and leave it: the argument checks of the methods of Backend of the same names, which every backend shares.
// Errors name `op`.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/tensor_view.h"
#include "ops/matrix.h"
#include "quant/ggml_blocks.h"

namespace llama_ext {

/// write_rows: `source` (n, K) f32 | f16 | bf16 | f64, contiguous, each of whose rows has a place; `importance` (K) or none.
/// Throws ShapeError, DTypeError, NumericError.
void check_write_rows(const Matrix& matrix, const RowMap& map, const TensorView& source, const TensorView& importance);
/// write_blocks: returns the bytes of a row. Throws DTypeError, ShapeError.
int64_t check_write_blocks(const Matrix& matrix, const RowMap& map, const GgmlType& ggml, int64_t rows, size_t nbytes);
/// read_rows: `target` (n, K) f32 or, where the weights have one, their own dtype, contiguous. Throws ShapeError, DTypeError.
void check_read_rows(const Matrix& matrix, const RowMap& map, const TensorView& target);
/// read_codes. Throws DTypeError for a matrix of floats, ShapeError.
void check_read_codes(const Matrix& matrix, const RowMap& map, int64_t rows);
/// copy_rows. Throws DTypeError, ShapeError.
void check_copy_rows(const Matrix& target, const RowMap& to, const Matrix& source, const RowMap& from, int64_t rows);
/// transpose. Throws DTypeError, ShapeError.
void check_transpose(const Matrix& target, const Matrix& source);
/// load_rows and store_rows; returns how many rows of the matrix the tensor has. Throws DTypeError, ShapeError.
int64_t check_tensor_rows(const Matrix& matrix, const RowMap& map, const TensorView& tensor, bool transposes,
                          const char* op);
/// values, and whatever else changes elements in place. Throws DTypeError unless they are float32.
void check_values(const Matrix& matrix, const char* op);

}  // namespace llama_ext
