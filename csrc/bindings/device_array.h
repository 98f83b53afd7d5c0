// An array in a GPU's memory, as Python holds it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "backend/backend.h"
#include "bindings/dlpack.h"

namespace llama_ext {

/// Every operation waits for its results, so nothing that a stream still has to do concerns one of these.
class DeviceArray {
 public:
  using Extents = std::vector<int64_t>;

  /// Zeros. Throws OutOfMemoryError, ShapeError, DTypeError.
  static DeviceArray zeros(const std::shared_ptr<Backend>& backend, const Extents& shape, std::string_view dtype);
  /// Memory of somebody else's, which `owner` keeps. Strides are in elements.
  DeviceArray(std::shared_ptr<Backend> backend, std::shared_ptr<void> owner, void* data,
              const dlpack::ElementType& type, Extents shape, Extents strides, bool is_writable);

  const std::shared_ptr<Backend>& backend() const { return backend_; }
  const std::shared_ptr<void>& owner() const { return owner_; }
  /// Of the GPU, as CUDA counts.
  int gpu() const { return gpu_; }
  void* data() const { return data_; }
  const dlpack::ElementType& type() const { return *type_; }
  const Extents& shape() const { return shape_; }
  const Extents& strides() const { return strides_; }
  bool is_writable() const { return is_writable_; }
  int64_t size() const;
  bool is_contiguous() const { return is_rows(static_cast<int>(shape_.size())); }
  /// Whether the last `inner` axes together are contiguous, and the others one axis with one stride: rows that operations take.
  bool is_rows(int inner) const;
  /// The same memory in another shape, which keeps rows whole. Throws ShapeError where that cannot be.
  DeviceArray reshape(const Extents& shape) const;
  /// A copy, or the array itself. Throws ShapeError unless its last axis is contiguous.
  DeviceArray contiguous() const;
  DeviceArray copy() const;
  /// A new array of its rows, so many times one after another. Throws ShapeError unless it is contiguous, with an axis.
  DeviceArray repeated(int64_t times) const;
  /// this = source. Throws ShapeError, DTypeError, DeviceError, OptionError.
  void assign(const DeviceArray& source) const;
  bool overlaps(const DeviceArray& other) const;
  /// Before others get it: see Buffer::share.
  void share() const;
  /// The elements in C order, in host memory.
  void read(std::byte* host) const;
  void write(const std::byte* host) const;

  /// As an operation takes it. Throws ShapeError, DTypeError that name `op` and `what`.
  TensorView view(DType dtype, int rank, std::string_view op, std::string_view what) const;
  std::string shape_text() const;

 private:
  /// (rows, inner): all elements. Throws ShapeError where is_rows(inner axes) does not hold.
  TensorView rows_view(int inner) const;
  size_t span_bytes() const;

  std::shared_ptr<Backend> backend_;
  std::shared_ptr<void> owner_;
  Buffer* buffer_ = nullptr;  // when it is our own
  int gpu_;
  void* data_;
  const dlpack::ElementType* type_;
  Extents shape_;
  Extents strides_;
  bool is_writable_;
};

/// Strides, in elements, of an array in C order.
DeviceArray::Extents contiguous_strides(const DeviceArray::Extents& shape);

/// The type of this name. Throws DTypeError.
const dlpack::ElementType& element_type(std::string_view name);

}  // namespace llama_ext
