// What the argument checks of several operations share. For csrc/ops/*.cpp, and for a binding that puts an operation together. A check runs on every call, so
// messages are put together on failure alone.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string_view>

#include "core/errors.h"
#include "core/tensor_view.h"
#include "ops/matrix.h"

namespace llama_ext {

enum class Rows : uint8_t { kStrided, kContiguous };

/// Throws unless `view` has this dtype and shape (-1: any extent) and memory laid out as `rows` says. Tensors without
/// elements are legal and need no memory.
inline void require_tensor(const TensorView& view, DType dtype, std::initializer_list<int64_t> shape, Rows rows,
                           std::string_view op, std::string_view what) {
  require_shape(view, shape, op, what);
  require_dtype(view, dtype, op, what);
  for (int axis = 0; axis < view.rank(); ++axis) {
    if (view.dim(axis) < 0) fail(ErrorKind::kShape, op, ": ", what, " has a negative extent: ", view.shape_text());
  }
  if (view.size() == 0) return;
  require(view.data() != nullptr, ErrorKind::kInternal, op, ": ", what, " has no memory");
  if (rows == Rows::kContiguous) {
    require(view.is_contiguous(), ErrorKind::kShape, op, ": ", what, " must be contiguous, its rows of ",
            view.inner_size(), " elements start ", view.row_stride(), " apart. Pass a contiguous copy.");
  } else {
    require(view.rows() == 1 || view.row_stride() >= view.inner_size(), ErrorKind::kShape, op, ": rows of ", what,
            " have ", view.inner_size(), " elements but start ", view.row_stride(), " apart");
  }
}

/// A weight or bias: (size) f32, contiguous.
inline void require_vector(const TensorView& view, int64_t size, std::string_view op, std::string_view what) {
  if (view.rank() != 1 || view.dim(0) != size) {
    fail(ErrorKind::kShape, op, ": ", what, " must have shape ", shape_text({size}), ", got ", view.shape_text(),
         ". Was it loaded for another model?");
  }
  require_tensor(view, DType::kF32, {size}, Rows::kContiguous, op, what);
}

/// An optional vector is absent when it is a default TensorView.
inline void require_optional_vector(const TensorView& view, int64_t size, std::string_view op, std::string_view what) {
  if (view || view.rank() != 0) require_vector(view, size, op, what);
}

inline const Matrix& require_present(const Matrix* matrix, std::string_view op, std::string_view what) {
  require(matrix != nullptr, ErrorKind::kInternal, op, ": ", what, " is missing");
  return *matrix;
}

inline void require_matrix_shape(const Matrix& matrix, int64_t rows, int64_t cols, std::string_view op,
                                 std::string_view what) {
  if (matrix.rows() == rows && matrix.cols() == cols) return;
  fail(ErrorKind::kShape, op, ": ", what, " must have shape ", shape_text({rows, cols}), ", got ",
       shape_text({matrix.rows(), matrix.cols()}), ". Was it loaded for another model?");
}

/// Both views name the same elements.
inline bool is_same(const TensorView& a, const TensorView& b) {
  return a.data() == b.data() && (a.rows() <= 1 || a.row_stride() == b.row_stride());
}

/// Whether any byte belongs to both. Column slices of one buffer (equal strides) are told apart; other strided views
/// whose ranges of addresses meet count as overlapping.
inline bool overlap(const TensorView& a, const TensorView& b) {
  if (a.size() == 0 || b.size() == 0) return false;
  const auto bytes = [](const TensorView& view, int64_t elements) {
    return static_cast<uintptr_t>(elements) * size_of(view.dtype());
  };
  const auto begin = [](const TensorView& view) { return reinterpret_cast<uintptr_t>(view.data()); };
  const auto extent = [&](const TensorView& view) {
    return bytes(view, (view.rows() - 1) * view.row_stride() + view.inner_size());
  };
  const TensorView& low = begin(a) <= begin(b) ? a : b;
  const TensorView& high = begin(a) <= begin(b) ? b : a;
  const uintptr_t distance = begin(high) - begin(low);
  if (distance >= extent(low)) return false;
  // Only reached with several rows in `low` or with a real overlap.
  const uintptr_t stride = bytes(low, low.row_stride());
  if (low.rows() == 1 || (high.rows() > 1 && bytes(high, high.row_stride()) != stride)) return true;
  const uintptr_t column = distance % stride;
  return column < bytes(low, low.inner_size()) || column + bytes(high, high.inner_size()) > stride;
}

/// Throws ShapeError when `output` shares memory with `input`.
inline void require_disjoint(const TensorView& output, const TensorView& input, std::string_view op,
                             std::string_view output_name, std::string_view input_name) {
  require(!overlap(output, input), ErrorKind::kShape, op, ": ", output_name, " must not overlap ", input_name,
          ". Pass another output.");
}

/// As require_disjoint, but `output` may be exactly `input`.
inline void require_same_or_disjoint(const TensorView& output, const TensorView& input, std::string_view op,
                                     std::string_view output_name, std::string_view input_name) {
  require(is_same(output, input) || !overlap(output, input), ErrorKind::kShape, op, ": ", output_name, " must be ",
          input_name, " itself or not overlap it");
}

}  // namespace llama_ext
