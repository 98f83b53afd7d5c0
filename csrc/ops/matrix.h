// Weights as operations see them: a matrix in whatever layout its backend likes best.
#pragma once

#include <algorithm>
#include <cstdint>

#include "quant/weight_type.h"

namespace llama_ext {

/// A weight matrix W of shape (rows, cols) = (output features, input features), owned by the backend that made it, in a
/// layout only that backend knows. Immutable once its rows are written, so threads may share it.
class Matrix {
 public:
  virtual ~Matrix() = default;
  int64_t rows() const { return rows_; }
  int64_t cols() const { return cols_; }
  WeightType type() const { return type_; }
  /// Memory it occupies, padding included.
  virtual int64_t nbytes() const = 0;

 protected:
  Matrix(int64_t rows, int64_t cols, WeightType type) : rows_(rows), cols_(cols), type_(type) {}

 private:
  int64_t rows_;
  int64_t cols_;
  WeightType type_;
};

/// Which rows of a Matrix a tensor's rows go to: row i goes to begin + (i / group) * stride + i % group.
/// One tensor alone: {}. Q, K, V as one matrix: {.begin = ...}. Gate and up interleaved: see feed_forward.h.
struct RowMap {
  int64_t begin = 0;
  int64_t group = INT64_MAX;
  int64_t stride = 0;

  int64_t operator()(int64_t i) const {
    return group == INT64_MAX ? begin + i : begin + (i / group) * stride + i % group;
  }
};

/// Throws ShapeError, which names `op`, unless `rows` rows have places in the matrix, no two the same.
void check_map(const Matrix& matrix, const RowMap& map, int64_t rows, const char* op);

/// Calls move(first row of the tensor, its place in the matrix, how many) for each run of rows that stays together.
template <typename Move>
void for_each_run(const RowMap& rows, int64_t count, Move&& move) {
  for (int64_t i = 0; i < count;) {
    const int64_t run = std::min(count - i, rows.group - i % rows.group);
    move(i, rows(i), run);
    i += run;
  }
}

/// The arithmetic of a product. kAuto: the fastest of the ISA for the weights as they are stored, which may round the
/// activations to the weights' precision: to bfloat16, or, with quantised weights, to int8 with a scale for 128 of a row.
/// kExact: float32 products of the stored weights. kBF16 (training): float32 weights are rounded to bfloat16 on the way, and, where the
/// ISA multiplies bfloat16, the other operand as well; sums in float32. Quantised weights: kExact on a CPU, kAuto on a GPU; others: kAuto.
/// A GPU's kAuto rounds activations to bfloat16 where they are more than few, and quantised weights too where rows are many.
enum class Compute : uint8_t { kAuto, kExact, kBF16 };

}  // namespace llama_ext
