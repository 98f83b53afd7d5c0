#include "ops/matrix_rows.h"

#include "core/checked.h"
#include "ops/argument_checks.h"
#include "quant/quantized_row.h"

namespace llama_ext {
namespace {

/// `rows` is (n, K), contiguous, and `map` sends each of its rows into the matrix.
void check_rows(const Matrix& matrix, const RowMap& map, const TensorView& rows, const char* op, const char* name) {
  require_shape(rows, {-1, matrix.cols()}, op, name);
  require(rows.is_contiguous(), ErrorKind::kShape, op, ": ", name, " must be contiguous");
  require(rows.size() == 0 || rows.data() != nullptr, ErrorKind::kInternal, op, ": ", name, " has no memory");
  check_map(matrix, map, rows.rows(), op);
}

}  // namespace

void check_write_rows(const Matrix& matrix, const RowMap& map, const TensorView& source, const TensorView& importance) {
  require(source.dtype() != DType::kI32 && source.dtype() != DType::kI8, ErrorKind::kDType,
          "write_rows: source must be float32, float16, bfloat16 or float64, got ", name_of(source.dtype()));
  check_rows(matrix, map, source, "write_rows", "source");
  check_importance(importance, matrix.cols());
}

int64_t check_write_blocks(const Matrix& matrix, const RowMap& map, const GgmlType& ggml, int64_t rows, size_t nbytes) {
  require(matrix.type() == ggml.type, ErrorKind::kDType, "write_blocks: ", ggml.name, " blocks are kept as ",
          ggml.type.text(), ", and this matrix as ", matrix.type().text());
  check_map(matrix, map, rows, "write_blocks");
  const int64_t row_bytes = ggml_row_bytes(ggml, matrix.cols());
  const int64_t expected = checked_mul(rows, row_bytes, "write_blocks");
  require(static_cast<int64_t>(nbytes) == expected, ErrorKind::kShape, "write_blocks: ", rows, " rows of ", ggml.name,
          " blocks with ", matrix.cols(), " weights each take ", expected, " bytes, got ", nbytes);
  return row_bytes;
}

void check_read_rows(const Matrix& matrix, const RowMap& map, const TensorView& target) {
  const bool is_own_dtype = !matrix.type().is_quantized() && target.dtype() == matrix.type().dtype();
  require(target.dtype() == DType::kF32 || is_own_dtype, ErrorKind::kDType,
          "read_rows: target must be float32 or, where the weights have one, their own dtype; they are ",
          matrix.type().text(), ", got ", name_of(target.dtype()));
  check_rows(matrix, map, target, "read_rows", "target");
}

void check_read_codes(const Matrix& matrix, const RowMap& map, int64_t rows) {
  require(matrix.type().is_quantized(), ErrorKind::kDType, "read_codes: weights kept as ", matrix.type().text(),
          " have no codes");
  check_map(matrix, map, rows, "read_codes");
}

void check_copy_rows(const Matrix& target, const RowMap& to, const Matrix& source, const RowMap& from, int64_t rows) {
  require(target.type() == source.type(), ErrorKind::kDType, "copy_rows: rows kept as ", source.type().text(),
          " cannot be copied to a matrix of ", target.type().text());
  require(target.cols() == source.cols(), ErrorKind::kShape, "copy_rows: rows of ", source.cols(),
          " columns cannot be copied to a matrix of ", target.cols());
  require(rows >= 0, ErrorKind::kShape, "copy_rows: cannot copy ", rows, " rows");
  check_map(target, to, rows, "copy_rows");
  check_map(source, from, rows, "copy_rows");
}

void check_transpose(const Matrix& target, const Matrix& source) {
  const WeightType f32{Encoding::kF32};
  require(target.type() == f32 && source.type() == f32, ErrorKind::kDType,
          "transpose: both matrices must be float32, got ", target.type().text(), " and ", source.type().text());
  require_matrix_shape(target, source.cols(), source.rows(), "transpose", "target");
  require(&target != &source, ErrorKind::kShape, "transpose: target must be another matrix than source");
}

int64_t check_tensor_rows(const Matrix& matrix, const RowMap& map, const TensorView& tensor, bool transposes,
                          const char* op) {
  check_values(matrix, op);
  if (transposes) {
    require_tensor(tensor, DType::kF32, {matrix.cols(), -1}, Rows::kStrided, op, "the transposed tensor");
  } else {
    require_tensor(tensor, DType::kF32, {-1, matrix.cols()}, Rows::kStrided, op, "the tensor");
  }
  const int64_t rows = tensor.dim(transposes ? 1 : 0);
  check_map(matrix, map, rows, op);
  return rows;
}

void check_values(const Matrix& matrix, const char* op) {
  require(matrix.type() == WeightType{Encoding::kF32}, ErrorKind::kDType, op, ": the matrix must be float32, got ",
          matrix.type().text());
}

}  // namespace llama_ext
