#include "bindings/device_array.h"

#include <algorithm>
#include <utility>

#include "bindings/bindings.h"

namespace llama_ext {
namespace {

using Extents = DeviceArray::Extents;

std::string text_of(const Extents& shape) {
  std::string text = "(";
  for (size_t axis = 0; axis < shape.size(); ++axis) text += (axis == 0 ? "" : ", ") + std::to_string(shape[axis]);
  return text + (shape.size() == 1 ? ",)" : ")");
}

int64_t size_of_shape(const Extents& shape) {
  int64_t size = 1;
  for (const int64_t extent : shape) {
    require(extent >= 0, ErrorKind::kShape, "an array on a GPU: shape ", text_of(shape), " has a negative extent");
    size = checked_mul(size, extent, "an array on a GPU");
  }
  return size;
}

/// "cuda:3" -> 3.
int gpu_of(const Backend& backend) {
  const std::string device = backend.device();
  require(device.starts_with("cuda:"), ErrorKind::kDevice, "an array on a GPU cannot be made for device '", device,
          "'. Use 'cuda', or NumPy arrays");
  return std::stoi(device.substr(5));
}

/// What an array without elements points to: something that is not null, and that nobody follows.
void* nothing() {
  static int64_t here = 0;
  return &here;
}

}  // namespace

Extents contiguous_strides(const Extents& shape) {
  Extents strides(shape.size(), 1);
  // Of no elements any strides do, and the product of the other extents may be out of range.
  if (std::ranges::find(shape, 0) != shape.end()) return strides;
  for (size_t axis = shape.size(); axis-- > 1;) strides[axis - 1] = strides[axis] * shape[axis];
  return strides;
}

const dlpack::ElementType& element_type(std::string_view name) {
  for (const dlpack::ElementType& type : dlpack::kElementTypes) {
    if (type.name == name) return type;
  }
  fail(ErrorKind::kDType, "an array on a GPU cannot be ", name,
       "; it may be float32, float16, bfloat16, float64, int32, int64, int8 or uint8");
}

DeviceArray::DeviceArray(std::shared_ptr<Backend> backend, std::shared_ptr<void> owner, void* data,
                         const dlpack::ElementType& type, Extents shape, Extents strides, bool is_writable)
    : backend_(std::move(backend)),
      owner_(std::move(owner)),
      gpu_(gpu_of(*backend_)),
      data_(size_of_shape(shape) == 0 ? nothing() : data),
      type_(&type),
      shape_(std::move(shape)),
      strides_(std::move(strides)),
      is_writable_(is_writable) {}

DeviceArray DeviceArray::zeros(const std::shared_ptr<Backend>& backend, const Extents& shape, std::string_view dtype) {
  const dlpack::ElementType& type = element_type(dtype);
  gpu_of(*backend);
  const int64_t nbytes = checked_mul(size_of_shape(shape), type.size, "an array on a GPU");
  const std::shared_ptr<Buffer> buffer = deleted_without_gil(backend->allocate(static_cast<size_t>(nbytes)));
  backend->synchronize();  // another backend of this GPU may use it
  DeviceArray array(backend, buffer, buffer->data(), type, shape, contiguous_strides(shape), true);
  array.buffer_ = buffer.get();
  return array;
}

int64_t DeviceArray::size() const { return size_of_shape(shape_); }

bool DeviceArray::is_rows(int inner) const {
  if (size() == 0) return true;
  const int rank = static_cast<int>(shape_.size());
  const auto at = [](const Extents& of, int axis) { return of[static_cast<size_t>(axis)]; };
  int64_t step = 1;
  int axis = rank - 1;
  for (; axis >= std::max(rank - inner, 0); --axis) {
    // The stride of an axis of one element says nothing.
    if (at(shape_, axis) > 1 && at(strides_, axis) != step) return false;
    step *= at(shape_, axis);
  }
  int64_t expected = -1;
  for (; axis >= 0; --axis) {
    if (at(shape_, axis) == 1) continue;
    const int64_t stride = at(strides_, axis);
    if (expected < 0 ? stride < step : stride != expected) return false;
    expected = stride * at(shape_, axis);
  }
  return true;
}

TensorView DeviceArray::rows_view(int inner) const {
  const int rank = static_cast<int>(shape_.size());
  const int64_t all = size();
  int64_t width = 1;
  int64_t stride = -1;
  for (int axis = rank - 1; axis >= 0; --axis) {
    const auto at = static_cast<size_t>(axis);
    if (axis >= rank - inner) {
      width *= shape_[at];
    } else if (stride < 0 && shape_[at] != 1) {
      stride = strides_[at];
    }
  }
  const int64_t rows = all == 0 ? 0 : all / width;
  // Any type of this size does: elements are moved, and not looked at.
  DType moved = DType::kI8;
  for (const DType each : {DType::kF64, DType::kF32, DType::kF16}) {
    if (size_of(each) == type_->size) moved = each;
  }
  return {data_, moved, {rows, width}, stride < 0 ? width : stride};
}

DeviceArray DeviceArray::reshape(const Extents& shape) const {
  require(size_of_shape(shape) == size(), ErrorKind::kShape, "an array of shape ", shape_text(), " cannot have shape ",
          text_of(shape));
  DeviceArray array = *this;
  array.shape_ = shape;
  array.strides_ = contiguous_strides(shape);
  if (is_contiguous() || size() == 0) return array;
  // Rows stay whole: the axes behind the first one of `shape` are the elements of a row.
  int64_t width = 1;
  for (size_t axis = 1; axis < shape.size(); ++axis) width *= shape[axis];
  int inner = 0;
  int64_t found = 1;
  while (found < width && inner < static_cast<int>(shape_.size())) {
    found *= shape_[shape_.size() - 1 - static_cast<size_t>(inner++)];
  }
  require(found == width && is_rows(inner), ErrorKind::kShape, "an array of shape ", shape_text(), " and strides ",
          text_of(strides_), " cannot have shape ", text_of(shape), " without being copied. Call contiguous() on it");
  array.strides_[0] = rows_view(inner).row_stride();
  return array;
}

DeviceArray DeviceArray::copy() const {
  require(is_rows(1) || is_rows(0), ErrorKind::kShape, "an array of shape ", shape_text(), " and strides ",
          text_of(strides_), " cannot be copied by llama_ext. Let the library that made it copy it");
  DeviceArray array = zeros(backend_, shape_, type_->name);
  array.assign(*this);
  return array;
}

DeviceArray DeviceArray::contiguous() const { return is_contiguous() ? *this : copy(); }

DeviceArray DeviceArray::repeated(int64_t times) const {
  require(!shape_.empty() && is_contiguous() && times >= 0, ErrorKind::kShape, "an array of shape ", shape_text(),
          " cannot be repeated ", times, " times");
  Extents whole_shape = shape_;
  whole_shape[0] = checked_mul(shape_[0], times, "an array on a GPU");
  DeviceArray whole = zeros(backend_, whole_shape, type_->name);
  Extents each_shape = shape_;
  each_shape.insert(each_shape.begin(), times);
  const TensorView rows = whole.reshape(each_shape).rows_view(static_cast<int>(shape_.size()));
  const TensorView row = reshape({1, size()}).rows_view(1);
  for (int64_t i = 0; i < times && size() > 0; ++i) backend_->copy(rows.slice_rows(i, 1), row);
  backend_->synchronize();
  return whole;
}

void DeviceArray::assign(const DeviceArray& source) const {
  require(is_writable_, ErrorKind::kOption, "an array on a GPU is read-only");
  require(source.shape_ == shape_, ErrorKind::kShape, "arrays of shapes ", source.shape_text(), " and ", shape_text(),
          " cannot be copied to each other");
  require(source.type_ == type_, ErrorKind::kDType, "arrays of ", source.type_->name, " and ", type_->name,
          " cannot be copied to each other");
  require(source.gpu_ == gpu_, ErrorKind::kDevice, "arrays on cuda:", source.gpu_, " and cuda:", gpu_,
          " cannot be copied to each other");
  if (size() == 0) return;
  const int inner = is_rows(1) && source.is_rows(1) ? 1 : 0;
  require(is_rows(inner) && source.is_rows(inner), ErrorKind::kShape, "arrays of strides ", text_of(source.strides_),
          " and ", text_of(strides_), " cannot be copied to each other");
  backend_->copy(rows_view(inner), source.rows_view(inner));
  backend_->synchronize();
}

size_t DeviceArray::span_bytes() const {
  if (size() == 0) return 0;
  int64_t last = 0;
  for (size_t axis = 0; axis < shape_.size(); ++axis) last += (shape_[axis] - 1) * strides_[axis];
  return static_cast<size_t>(last + 1) * type_->size;
}

bool DeviceArray::overlaps(const DeviceArray& other) const {
  if (size() == 0 || other.size() == 0 || gpu_ != other.gpu_) return false;
  const auto* begin = static_cast<const std::byte*>(data_);
  const auto* its = static_cast<const std::byte*>(other.data_);
  return begin < its + other.span_bytes() && its < begin + span_bytes();
}

void DeviceArray::share() const {
  if (buffer_ != nullptr) buffer_->share();
}

void DeviceArray::read(std::byte* host) const {
  const int64_t all = size();
  if (all == 0) return;
  if (is_contiguous()) {
    backend_->copy_to_host(host, data_, static_cast<size_t>(all) * type_->size);
    backend_->synchronize();
    return;
  }
  // Everything from the first element to the last, and then those that count.
  std::vector<std::byte> span(span_bytes());
  backend_->copy_to_host(span.data(), data_, span.size());
  backend_->synchronize();
  Extents index(shape_.size(), 0);
  for (int64_t i = 0; i < all; ++i) {
    int64_t at = 0;
    for (size_t axis = 0; axis < shape_.size(); ++axis) at += index[axis] * strides_[axis];
    std::copy_n(span.data() + at * type_->size, type_->size, host + i * type_->size);
    for (size_t axis = shape_.size(); axis-- > 0 && ++index[axis] == shape_[axis];) index[axis] = 0;
  }
}

void DeviceArray::write(const std::byte* host) const {
  backend_->copy_to_device(size() == 0 ? nullptr : data_, host, static_cast<size_t>(size()) * type_->size);
  backend_->synchronize();
}

TensorView DeviceArray::view(DType dtype, int rank, std::string_view op, std::string_view what) const {
  if (type_->name != name_of(dtype)) {
    fail(ErrorKind::kDType, op, ": ", what, " must be ", name_of(dtype), ", got ", type_->name);
  }
  if (static_cast<int>(shape_.size()) != rank) {
    fail(ErrorKind::kShape, op, ": ", what, " must have ", rank, rank == 1 ? " dimension" : " dimensions",
         ", got shape ", shape_text());
  }
  if (!(rank == 1 ? is_contiguous() : is_rows(rank - 1))) {
    fail(ErrorKind::kShape, op, ": ", what, " must be C-contiguous",
         rank == 1 ? "" : " but for the stride of its first axis", ", got strides ", text_of(strides_), " of shape ",
         shape_text(), ". Call contiguous() on it");
  }
  const auto extent = [this](size_t axis) { return shape_[axis]; };
  const int64_t stride = size() == 0 || extent(0) == 1 || rank == 1 ? -1 : strides_[0];
  TensorView found;
  switch (rank) {
    case 1:
      found = {data_, dtype, {extent(0)}};
      break;
    case 2:
      found = {data_, dtype, {extent(0), extent(1)}, stride};
      break;
    case 3:
      found = {data_, dtype, {extent(0), extent(1), extent(2)}, stride};
      break;
    default:
      found = {data_, dtype, {extent(0), extent(1), extent(2), extent(3)}, stride};
  }
  found.set_gpu(gpu_);
  return found;
}

std::string DeviceArray::shape_text() const { return text_of(shape_); }

}  // namespace llama_ext
