// A non-owning view of a tensor: what every operation takes.
#pragma once

#include <array>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <string_view>

#include "core/checked.h"
#include "core/dtype.h"

namespace llama_ext {

/// Up to four dimensions. The first dimension may have a stride of its own (a slice of wider rows); the others are
/// contiguous. `data` is a host or a device pointer: only the backend that owns it may follow it.
class TensorView {
 public:
  static constexpr int kMaxRank = 4;

  TensorView() = default;
  TensorView(void* data, DType dtype, std::initializer_list<int64_t> shape, int64_t row_stride = -1)
      : data_(data), dtype_(dtype), rank_(static_cast<int>(shape.size())) {
    int axis = 0;
    for (int64_t extent : shape) shape_[static_cast<size_t>(axis++)] = extent;
    row_stride_ = row_stride >= 0 ? row_stride : inner_size();
  }
  TensorView(const void* data, DType dtype, std::initializer_list<int64_t> shape, int64_t row_stride = -1)
      : TensorView(const_cast<void*>(data), dtype, shape, row_stride) {}

  void* data() const { return data_; }
  /// The same shape of other memory.
  void set_data(void* data) { data_ = data; }
  /// The index of the GPU whose memory this is, when a caller passed an array of a GPU; -1 otherwise. Operations do not ask.
  int gpu() const { return gpu_; }
  void set_gpu(int index) { gpu_ = static_cast<int16_t>(index); }
  DType dtype() const { return dtype_; }
  int rank() const { return rank_; }
  int64_t dim(int axis) const { return shape_[static_cast<size_t>(axis)]; }
  int64_t rows() const { return shape_[0]; }
  /// Elements between the starts of two consecutive rows.
  int64_t row_stride() const { return row_stride_; }
  /// Elements of one row.
  int64_t inner_size() const {
    int64_t size = 1;
    for (int axis = 1; axis < rank_; ++axis) size *= dim(axis);
    return size;
  }
  int64_t size() const { return rank_ == 0 ? 0 : rows() * inner_size(); }
  bool is_contiguous() const { return rows() <= 1 || row_stride_ == inner_size(); }
  explicit operator bool() const { return data_ != nullptr; }

  template <typename T>
  T* row(int64_t index) const {
    return static_cast<T*>(data_) + index * row_stride_;
  }
  float* f32() const { return static_cast<float*>(data_); }

  /// Rows [begin, begin + count).
  TensorView slice_rows(int64_t begin, int64_t count) const {
    TensorView slice = *this;
    slice.data_ = static_cast<char*>(data_) + begin * row_stride_ * static_cast<int64_t>(size_of(dtype_));
    slice.shape_[0] = count;
    return slice;
  }

  std::string shape_text() const {
    std::string text = "(";
    for (int axis = 0; axis < rank_; ++axis) {
      text += (axis == 0 ? "" : ", ") + std::to_string(dim(axis));
    }
    return text + (rank_ == 1 ? ",)" : ")");
  }

 private:
  void* data_ = nullptr;
  DType dtype_ = DType::kF32;
  int16_t gpu_ = -1;
  int rank_ = 0;
  std::array<int64_t, kMaxRank> shape_{};
  int64_t row_stride_ = 0;
};

inline std::string shape_text(std::initializer_list<int64_t> shape) {
  return TensorView(static_cast<void*>(nullptr), DType::kF32, shape).shape_text();
}

/// Throws ShapeError unless `view` has exactly this shape; -1 accepts any extent.
inline void require_shape(const TensorView& view, std::initializer_list<int64_t> shape, std::string_view op,
                          std::string_view what) {
  bool same = view.rank() == static_cast<int>(shape.size());
  int axis = 0;
  for (int64_t extent : shape) {
    if (same && extent >= 0) same = view.dim(axis) == extent;
    ++axis;
  }
  if (same) return;
  std::string expected = "(";
  axis = 0;
  for (int64_t extent : shape) {
    expected += (axis++ == 0 ? "" : ", ") + (extent < 0 ? std::string("any") : std::to_string(extent));
  }
  expected += shape.size() == 1 ? ",)" : ")";
  fail(ErrorKind::kShape, op, ": ", what, " must have shape ", expected, ", got ", view.shape_text());
}

/// Throws DTypeError unless `view` holds `dtype`.
inline void require_dtype(const TensorView& view, DType dtype, std::string_view op, std::string_view what) {
  require(view.dtype() == dtype, ErrorKind::kDType, op, ": ", what, " must be ", name_of(dtype), ", got ",
          name_of(view.dtype()));
}

}  // namespace llama_ext
