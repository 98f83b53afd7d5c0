// Strict conversion of NumPy arrays to views and back.
#include <bit>

#include "bindings/bindings.h"
#include "bindings/device_array.h"

namespace llama_ext {
namespace {

static_assert(std::endian::native == std::endian::little, "byte orders are told apart for little-endian machines");

struct NumpyType {
  char kind;
  py::ssize_t size;
  const char* name;
};

/// How NumPy holds a dtype: it has no bfloat16, so that comes as its bits.
NumpyType numpy_type(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return {'f', 4, "float32"};
    case DType::kF64:
      return {'f', 8, "float64"};
    case DType::kF16:
      return {'f', 2, "float16"};
    case DType::kBF16:
      return {'u', 2, "uint16"};
    case DType::kI32:
      return {'i', 4, "int32"};
    case DType::kI8:
      return {'i', 1, "int8"};
  }
  fail(ErrorKind::kInternal, "an unknown dtype");
}

bool holds(const py::array& array, DType dtype) {
  const NumpyType type = numpy_type(dtype);
  const py::dtype found = array.dtype();
  return found.kind() == type.kind && found.itemsize() == type.size && found.byteorder() != '>';
}

std::string type_text(const py::handle& object) { return py::str(py::type::of(object).attr("__name__")); }
std::string dtype_text(const py::array& array) { return py::str(array.dtype()); }
std::string shape_text_of(const py::array& array) { return py::str(array.attr("shape")); }

// The messages below are put together by the caller of fail() only, as text from Python is not free.

py::array as_array(const py::handle& object, std::string_view expected, std::string_view op, std::string_view what) {
  if (!py::isinstance<py::array>(object)) {
    fail(ErrorKind::kDType, op, ": ", what, " must be a NumPy array of ", expected, ", got ", type_text(object));
  }
  return py::reinterpret_borrow<py::array>(object);
}

TensorView make_view(const py::array& array, void* data, DType dtype, int rank, std::string_view op,
                     std::string_view what) {
  if (rank < 0) {
    if (array.ndim() < 1 || array.ndim() > TensorView::kMaxRank) {
      fail(ErrorKind::kShape, op, ": ", what, " must have 1 to 4 dimensions, got shape ", shape_text_of(array));
    }
    rank = static_cast<int>(array.ndim());
  }
  if (array.ndim() != rank) {
    fail(ErrorKind::kShape, op, ": ", what, " must have ", rank, rank == 1 ? " dimension" : " dimensions",
         ", got shape ", shape_text_of(array));
  }

  const py::ssize_t item = array.itemsize();
  require(reinterpret_cast<uintptr_t>(data) % static_cast<uintptr_t>(item) == 0, ErrorKind::kShape, op, ": ", what,
          " must be aligned to its elements. Pass a copy");
  bool is_contiguous = true;
  py::ssize_t expected = item;
  for (int axis = rank - 1; axis >= 1; --axis) {
    // The stride of an axis with one element or none says nothing.
    if (array.shape(axis) > 1) is_contiguous &= array.strides(axis) == expected;
    expected *= array.shape(axis);
  }
  const bool is_strided = array.size() > 0 && array.shape(0) > 1;
  if (is_strided) is_contiguous &= array.strides(0) >= expected && array.strides(0) % item == 0;
  require(array.size() == 0 || is_contiguous, ErrorKind::kShape, op, ": ", what,
          " must be C-contiguous but for the stride of its first axis. Pass numpy.ascontiguousarray of it");

  const int64_t row_stride = is_strided ? array.strides(0) / item : -1;
  switch (rank) {
    case 1:
      return {data, dtype, {array.shape(0)}, row_stride};
    case 2:
      return {data, dtype, {array.shape(0), array.shape(1)}, row_stride};
    case 3:
      return {data, dtype, {array.shape(0), array.shape(1), array.shape(2)}, row_stride};
    default:
      return {data, dtype, {array.shape(0), array.shape(1), array.shape(2), array.shape(3)}, row_stride};
  }
}

void require_holds(const py::array& array, DType dtype, std::string_view op, std::string_view what) {
  if (!holds(array, dtype)) {
    fail(ErrorKind::kDType, op, ": ", what, " must be ", numpy_type(dtype).name, ", got ", dtype_text(array));
  }
}

}  // namespace

TensorView read_view(const py::handle& object, DType dtype, int rank, std::string_view op, std::string_view what) {
  const py::array array = as_array(object, numpy_type(dtype).name, op, what);
  require_holds(array, dtype, op, what);
  TensorView view = make_view(array, const_cast<void*>(array.data()), dtype, rank, op, what);
  // A vector has no inner axis, so no operation looks at its stride.
  require(rank != 1 || view.is_contiguous(), ErrorKind::kShape, op, ": ", what,
          " must be contiguous. Pass numpy.ascontiguousarray of it");
  return view;
}

TensorView write_view(const py::handle& object, DType dtype, int rank, std::string_view op, std::string_view what) {
  const TensorView view = read_view(object, dtype, rank, op, what);
  require(py::reinterpret_borrow<py::array>(object).writeable(), ErrorKind::kOption, op, ": ", what, " is read-only");
  return view;
}

TensorView operand(const py::handle& object, DType dtype, int rank, std::string_view op, std::string_view what) {
  if (!py::isinstance<DeviceArray>(object)) return read_view(object, dtype, rank, op, what);
  return object.cast<const DeviceArray&>().view(dtype, rank, op, what);
}

TensorView result(const py::handle& object, DType dtype, int rank, std::string_view op, std::string_view what) {
  if (!py::isinstance<DeviceArray>(object)) return write_view(object, dtype, rank, op, what);
  const auto& array = object.cast<const DeviceArray&>();
  require(array.is_writable(), ErrorKind::kOption, op, ": ", what, " is read-only");
  return array.view(dtype, rank, op, what);
}

TensorView optional_operand(const py::handle& object, int rank, std::string_view op, std::string_view what) {
  return object.is_none() ? TensorView() : operand(object, DType::kF32, rank, op, what);
}

TensorView optional_result(const py::handle& object, int rank, std::string_view op, std::string_view what) {
  return object.is_none() ? TensorView() : result(object, DType::kF32, rank, op, what);
}

TensorView optional_view(const py::handle& object, int rank, std::string_view op, std::string_view what) {
  return object.is_none() ? TensorView() : read_view(object, DType::kF32, rank, op, what);
}

TensorView weight_view(const py::handle& object, std::string_view op, std::string_view what) {
  const py::array array = as_array(object, "float32, float16, float64 or uint16 (bfloat16)", op, what);
  for (DType dtype : {DType::kF32, DType::kF16, DType::kF64, DType::kBF16}) {
    if (!holds(array, dtype)) continue;
    const TensorView view = make_view(array, const_cast<void*>(array.data()), dtype, -1, op, what);
    require(view.is_contiguous(), ErrorKind::kShape, op, ": ", what,
            " must be C-contiguous. Pass numpy.ascontiguousarray of it");
    return view;
  }
  fail(ErrorKind::kDType, op, ": ", what, " must be float32, float16, float64 or uint16 (bfloat16), got ",
       dtype_text(array));
}

std::span<const std::byte> byte_view(const py::handle& object, std::string_view op, std::string_view what) {
  const py::array array = as_array(object, "uint8", op, what);
  require(array.dtype().kind() == 'u' && array.itemsize() == 1, ErrorKind::kDType, op, ": ", what,
          " must be uint8, got ", dtype_text(array));
  require((array.flags() & py::array::c_style) != 0, ErrorKind::kShape, op, ": ", what,
          " must be C-contiguous. Pass numpy.ascontiguousarray of it");
  return {static_cast<const std::byte*>(array.data()), static_cast<size_t>(array.nbytes())};
}

std::vector<int32_t> token_ids(const py::handle& object, std::string_view op, std::string_view what) {
  const TensorView view = read_view(object, DType::kI32, 1, op, what);
  const int32_t* ids = static_cast<const int32_t*>(view.data());
  return {ids, ids + view.size()};
}

std::vector<std::vector<int32_t>> token_id_lists(const py::handle& objects, std::string_view op,
                                                 std::string_view what) {
  if (!py::isinstance<py::sequence>(objects) || py::isinstance<py::str>(objects)) {
    fail(ErrorKind::kDType, op, ": ", what, " must be a sequence of int32 arrays, got ", type_text(objects));
  }
  std::vector<std::vector<int32_t>> lists;
  for (const py::handle& object : objects) {
    lists.push_back(token_ids(object, op, cat(what, "[", lists.size(), "]")));
  }
  return lists;
}

py::array new_array(DType dtype, const std::vector<int64_t>& shape, std::string_view what) {
  int64_t nbytes = static_cast<int64_t>(size_of(dtype));
  for (int64_t extent : shape) nbytes = checked_mul(nbytes, extent, what);
  const NumpyType type = numpy_type(dtype);
  try {
    return py::array(py::dtype(type.name), shape);
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_MemoryError)) throw;
    fail(ErrorKind::kOutOfMemory, what, ": ", nbytes, " bytes cannot be allocated");
  }
}

}  // namespace llama_ext
