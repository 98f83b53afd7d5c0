// DeviceArray, and DLPack both ways. Errors of the protocol's own methods are BufferError, as the protocol says.
#include <algorithm>
#include <utility>

#include "bindings/bindings.h"
#include "bindings/device_array.h"
#include "bindings/dlpack.h"

namespace llama_ext {
namespace {

using Extents = DeviceArray::Extents;

// Out.

/// What a consumer gets, with what keeps its memory; the deleter is the end of it.
template <typename Managed>
struct Exported {
  Managed managed{};
  Extents shape;
  Extents strides;
  std::shared_ptr<void> owner;
};

template <typename Managed>
void delete_exported(Managed* managed) {
  delete static_cast<Exported<Managed>*>(managed->context);
}

/// Of a capsule that nobody has consumed: one that was has another name.
template <typename Managed>
void delete_capsule(PyObject* capsule, const char* name) {
  if (PyCapsule_IsValid(capsule, name) == 0) return;
  auto* managed = static_cast<Managed*>(PyCapsule_GetPointer(capsule, name));
  managed->deleter(managed);
}

struct Handed {
  const DeviceArray* array;
  std::shared_ptr<void> owner;
  void* data;
  dlpack::Device device;
  Extents strides;
};

template <typename Managed>
std::unique_ptr<Exported<Managed>> exported(Handed handed) {
  auto kept = std::make_unique<Exported<Managed>>();
  kept->shape = handed.array->shape();
  kept->strides = std::move(handed.strides);
  kept->owner = std::move(handed.owner);
  dlpack::Tensor& tensor = kept->managed.tensor;
  tensor.data = handed.array->size() == 0 ? nullptr : handed.data;
  tensor.device = handed.device;
  tensor.rank = static_cast<int32_t>(kept->shape.size());
  const dlpack::ElementType& type = handed.array->type();
  tensor.dtype = {type.code, static_cast<uint8_t>(8 * type.size), 1};
  tensor.shape = kept->shape.data();
  tensor.strides = kept->strides.data();
  tensor.byte_offset = 0;
  kept->managed.context = kept.get();
  kept->managed.deleter = &delete_exported<Managed>;
  return kept;
}

template <typename Managed>
py::object capsule_of(std::unique_ptr<Exported<Managed>> kept, const char* name, PyCapsule_Destructor destructor) {
  PyObject* capsule = PyCapsule_New(&kept->managed, name, destructor);
  if (capsule == nullptr) throw py::error_already_set();
  kept.release();  // NOLINT(bugprone-unused-return-value): the capsule's now
  return py::reinterpret_steal<py::object>(capsule);
}

/// A pair of whole numbers, or nothing.
std::optional<std::pair<int64_t, int64_t>> pair_of(const py::object& object, const char* what) {
  if (object.is_none()) return std::nullopt;
  try {
    const auto pair = object.cast<std::pair<int64_t, int64_t>>();
    return pair;
  } catch (const py::cast_error&) {
    throw py::buffer_error(
        cat("__dlpack__: ", what, " must be a pair of whole numbers, got ", std::string(py::repr(object))));
  }
}

py::object to_dlpack(const DeviceArray& self, const py::object& stream, const py::object& max_version,
                     const py::object& dl_device, const py::object& copy) {
  const auto version = pair_of(max_version, "max_version");
  const auto device = pair_of(dl_device, "dl_device").value_or(std::pair<int64_t, int64_t>{dlpack::kCuda, self.gpu()});
  const bool to_host = device == std::pair<int64_t, int64_t>{dlpack::kCpu, 0};
  if (!to_host && device != std::pair<int64_t, int64_t>{dlpack::kCuda, self.gpu()}) {
    throw py::buffer_error(cat("__dlpack__: an array on cuda:", self.gpu(), " can be given as (2, ", self.gpu(),
                               "), where it is, or copied to (1, 0), the CPU; dl_device is (", device.first, ", ",
                               device.second, ")"));
  }
  const bool may_copy = copy.is_none() || copy.cast<bool>();
  const bool must_copy = !copy.is_none() && copy.cast<bool>();
  if (to_host && !may_copy)
    throw py::buffer_error("__dlpack__: copy=False, but an array of a GPU has to be copied to the CPU");

  int64_t number = 0;
  if (!stream.is_none()) {
    try {
      number = stream.cast<int64_t>();
    } catch (const py::cast_error&) {
      throw py::buffer_error(
          cat("__dlpack__: stream must be a whole number or None, got ", std::string(py::repr(stream))));
    }
    if (number == 0 || number < -1) {
      throw py::buffer_error(
          cat("__dlpack__: stream ", number,
              " is none of CUDA's: 1 or None is the legacy default stream, 2 the one of each thread, -1 asks "
              "for no order at all, and more is a cudaStream_t"));
    }
  }
  // Whichever stream the consumer works with, what this array is made of is done when it gets it.
  if (number != -1) without_gil([&] { self.backend()->synchronize(); });

  const bool is_versioned = version.has_value() && version->first >= 1;
  Handed handed{&self, self.owner(), self.data(), {dlpack::kCuda, self.gpu()}, self.strides()};
  std::optional<DeviceArray> copied;
  bool is_copied = false;
  if (to_host) {
    auto host = std::make_shared<std::vector<std::byte>>(static_cast<size_t>(self.size()) * self.type().size);
    without_gil([&] { self.read(host->data()); });
    handed.data = host->data();
    handed.owner = host;
    handed.device = {dlpack::kCpu, 0};
    handed.strides = contiguous_strides(self.shape());
    is_copied = true;
  } else if (must_copy) {
    without_gil([&] { copied.emplace(self.copy()); });
    copied->share();
    handed = {&*copied, copied->owner(), copied->data(), {dlpack::kCuda, self.gpu()}, copied->strides()};
    is_copied = true;
  } else {
    self.share();
  }
  const bool is_read_only = !is_copied && !self.is_writable();
  if (!is_versioned) {
    if (is_read_only) {
      throw py::buffer_error(
          "__dlpack__: a read-only array can only be given to who asks for max_version=(1, 0) or later");
    }
    return capsule_of(exported<dlpack::ManagedTensor>(std::move(handed)), dlpack::kName,
                      [](PyObject* capsule) { delete_capsule<dlpack::ManagedTensor>(capsule, dlpack::kName); });
  }
  auto kept = exported<dlpack::VersionedTensor>(std::move(handed));
  kept->managed.version = dlpack::kVersion;
  kept->managed.flags = (is_read_only ? dlpack::kReadOnly : 0) | (is_copied ? dlpack::kIsCopied : 0);
  return capsule_of(std::move(kept), dlpack::kVersionedName, [](PyObject* capsule) {
    delete_capsule<dlpack::VersionedTensor>(capsule, dlpack::kVersionedName);
  });
}

// In.

/// A capsule's tensor; nothing is owned yet.
struct Offered {
  const dlpack::Tensor* tensor;
  bool is_writable;
  const dlpack::ElementType* type;
  Extents shape;
  Extents strides;
  void* data;
};

bool is_on_host(const dlpack::Tensor& tensor) {
  return tensor.device.type == dlpack::kCpu || tensor.device.type == dlpack::kCudaHost;
}

const dlpack::ElementType& type_of(const dlpack::DataType& dtype, std::string_view what) {
  for (const dlpack::ElementType& type : dlpack::kElementTypes) {
    if (type.code == dtype.code && 8 * type.size == dtype.bits && dtype.lanes == 1) return type;
  }
  fail(ErrorKind::kDType, what, " has elements of DLPack's type code ", static_cast<int>(dtype.code), " with ",
       static_cast<int>(dtype.bits), " bits and ", dtype.lanes,
       " lanes; it may be float32, float16, bfloat16, float64, int32, int64, int8 or uint8");
}

Offered read_tensor(const dlpack::Tensor& tensor, bool is_writable, std::string_view what) {
  require(tensor.rank >= 0 && tensor.rank <= 32, ErrorKind::kShape, what, " has ", tensor.rank,
          " dimensions, more than NumPy has");
  const auto rank = static_cast<size_t>(tensor.rank);
  require(rank == 0 || tensor.shape != nullptr, ErrorKind::kShape, what, ": its capsule has no shape");
  Offered offered{&tensor, is_writable, &type_of(tensor.dtype, what), Extents(rank), Extents(rank), nullptr};
  int64_t size = 1;
  for (size_t axis = 0; axis < rank; ++axis) {
    offered.shape[axis] = tensor.shape[axis];
    require(tensor.shape[axis] >= 0, ErrorKind::kShape, what, " has a negative extent, ", tensor.shape[axis]);
    size = checked_mul(size, tensor.shape[axis], what);
  }
  if (tensor.strides == nullptr) {
    offered.strides = contiguous_strides(offered.shape);
  } else {
    offered.strides.assign(tensor.strides, tensor.strides + rank);
  }
  for (const int64_t stride : offered.strides) {
    require(stride >= 0 || is_on_host(tensor), ErrorKind::kShape, what,
            " has a negative stride. Call contiguous() on it");
  }
  require(size == 0 || tensor.data != nullptr, ErrorKind::kShape, what, ": its capsule has elements, but no memory");
  offered.data = size == 0 ? nullptr : static_cast<std::byte*>(tensor.data) + tensor.byte_offset;
  require(reinterpret_cast<uintptr_t>(offered.data) % offered.type->size == 0, ErrorKind::kShape, what,
          " must be aligned to its elements of ", static_cast<int>(offered.type->size), " bytes. Pass a copy");
  return offered;
}

/// The tensor of a capsule that has been consumed.
template <typename Managed>
struct Consumed {
  Managed* managed = nullptr;

  Consumed() = default;
  Consumed(const Consumed&) = delete;
  Consumed& operator=(const Consumed&) = delete;
  ~Consumed() {
    if (managed != nullptr && managed->deleter != nullptr) managed->deleter(managed);
  }
};

/// From here on the tensor is ours: its deleter runs when the last owner goes, once.
template <typename Managed>
std::shared_ptr<void> consume(const py::object& capsule, Managed* managed, const char* used) {
  // Memory first: nothing may fail once the name is changed, and until then the capsule is its owner.
  auto owner = std::make_shared<Consumed<Managed>>();
  if (PyCapsule_SetName(capsule.ptr(), used) != 0) {
    throw py::error_already_set();  // cannot be: the capsule is valid
  }
  owner->managed = managed;
  return owner;
}

py::object array_of(const Offered& offered, std::shared_ptr<void> owner, const BackendPtr& backend) {
  const dlpack::Tensor& tensor = *offered.tensor;
  if (is_on_host(tensor)) {
    std::vector<py::ssize_t> strides;
    for (const int64_t stride : offered.strides) strides.push_back(stride * offered.type->size);
    auto kept = std::make_unique<std::shared_ptr<void>>(std::move(owner));
    const py::capsule base(kept.get(), [](void* pointer) { delete static_cast<std::shared_ptr<void>*>(pointer); });
    kept.release();  // NOLINT(bugprone-unused-return-value): the capsule's now
    alignas(16) static std::byte nothing[16]{};
    void* data = offered.data == nullptr ? nothing : offered.data;
    py::array array(py::dtype(offered.type->numpy), offered.shape, strides, data, base);
    if (!offered.is_writable) array.attr("setflags")(py::arg("write") = false);
    return array;
  }
  // The producer has put its work in front of this stream; operations of other streams of ours follow.
  without_gil([&] { backend->synchronize(); });
  return py::cast(DeviceArray(backend, std::move(owner), offered.data, *offered.type, offered.shape, offered.strides,
                              offered.is_writable));
}

void require_device(const dlpack::Tensor& tensor, const BackendPtr& backend, std::string_view what) {
  if (is_on_host(tensor)) return;
  require(tensor.device.type == dlpack::kCuda, ErrorKind::kDevice, what,
          " must be in the memory of the CPU or of a GPU (DLPack's device types 1, 2 and 3), got type ",
          tensor.device.type);
  require(backend != nullptr && backend->device() == cat("cuda:", tensor.device.index), ErrorKind::kDevice, what,
          " is on cuda:", tensor.device.index, ", expected ", backend == nullptr ? "cpu" : backend->device());
}

/// The array in a capsule, which is consumed: a NumPy array over memory of the CPU (bfloat16 as uint16), a DeviceArray of
/// `backend`'s GPU; and the name of its dtype. Whatever is wrong with it, the capsule stays as it was, and its owner frees it.
py::tuple from_capsule(const py::object& capsule, const BackendPtr& backend, const std::string& what) {
  if (PyCapsule_IsValid(capsule.ptr(), dlpack::kVersionedName) != 0) {
    auto* managed = static_cast<dlpack::VersionedTensor*>(PyCapsule_GetPointer(capsule.ptr(), dlpack::kVersionedName));
    require(managed->version.major == dlpack::kVersion.major, ErrorKind::kUnsupported, what, " comes as DLPack ",
            managed->version.major, ".", managed->version.minor, ", of which version 1 is known");
    const Offered offered = read_tensor(managed->tensor, (managed->flags & dlpack::kReadOnly) == 0, what);
    require_device(managed->tensor, backend, what);
    return py::make_tuple(array_of(offered, consume(capsule, managed, dlpack::kUsedVersionedName), backend),
                          offered.type->name);
  }
  if (PyCapsule_IsValid(capsule.ptr(), dlpack::kName) != 0) {
    auto* managed = static_cast<dlpack::ManagedTensor*>(PyCapsule_GetPointer(capsule.ptr(), dlpack::kName));
    const Offered offered = read_tensor(managed->tensor, true, what);
    require_device(managed->tensor, backend, what);
    return py::make_tuple(array_of(offered, consume(capsule, managed, dlpack::kUsedName), backend), offered.type->name);
  }
  const bool is_used = PyCapsule_IsValid(capsule.ptr(), dlpack::kUsedName) != 0 ||
                       PyCapsule_IsValid(capsule.ptr(), dlpack::kUsedVersionedName) != 0;
  require(!is_used, ErrorKind::kOption, what, ": this DLPack capsule has been consumed, which can be done once");
  fail(ErrorKind::kDType, what, ": __dlpack__ must return a capsule named dltensor or dltensor_versioned, got ",
       std::string(py::repr(capsule)));
}

py::array to_numpy(const DeviceArray& self) {
  py::array array = py::array(py::dtype(self.type().numpy), self.shape());
  auto* data = static_cast<std::byte*>(array.mutable_data());
  without_gil([&] { self.read(data); });
  return array;
}

DeviceArray to_device(const BackendPtr& backend, const py::array& array, const std::string& dtype) {
  const dlpack::ElementType& type = element_type(dtype);
  require(py::dtype(type.numpy).is(array.dtype()) && (array.flags() & py::array::c_style) != 0, ErrorKind::kDType,
          "device_array: a C-contiguous array of ", type.numpy, " is needed");
  const Extents shape(array.shape(), array.shape() + array.ndim());
  const auto* data = static_cast<const std::byte*>(array.data());
  return without_gil([&] {
    DeviceArray made = DeviceArray::zeros(backend, shape, dtype);
    made.write(data);
    return made;
  });
}

DeviceArray values(const PyMatrix& matrix) {
  const int64_t rows = matrix.matrix->rows();
  const int64_t cols = matrix.matrix->cols();
  const TensorView all = matrix.backend->values(*matrix.matrix);
  const int64_t stride = rows == 0 ? cols : all.size() / rows;
  return {matrix.backend, matrix.matrix, all.data(), element_type("float32"), {rows, cols}, {stride, 1}, true};
}

py::tuple tuple_of(const Extents& numbers) { return py::tuple(py::cast(numbers)); }

}  // namespace

void bind_device_array(py::module_& module, py::class_<Backend, BackendPtr>& backend, py::class_<PyMatrix>& matrix) {
  py::class_<DeviceArray>(
      module, "DeviceArray",
      "An array in the memory of an NVIDIA GPU: what operations of llama_ext.ops give whose arrays lie there.\n\n"
      "shape; strides, in elements; dtype, \"float32\" and so on; device, \"cuda:0\" and so on; writable; "
      "is_contiguous. "
      "Whatever was to write it is done.")
      .def_property_readonly("shape", [](const DeviceArray& self) { return tuple_of(self.shape()); })
      .def_property_readonly("strides", [](const DeviceArray& self) { return tuple_of(self.strides()); })
      .def_property_readonly("dtype", [](const DeviceArray& self) { return std::string(self.type().name); })
      .def_property_readonly("device", [](const DeviceArray& self) { return cat("cuda:", self.gpu()); })
      .def_property_readonly("ndim", [](const DeviceArray& self) { return static_cast<int>(self.shape().size()); })
      .def_property_readonly("size", &DeviceArray::size)
      .def_property_readonly("nbytes", [](const DeviceArray& self) { return self.size() * self.type().size; })
      .def_property_readonly("writable", &DeviceArray::is_writable)
      .def_property_readonly("is_contiguous", &DeviceArray::is_contiguous)
      .def("has_rows", &DeviceArray::is_rows, py::arg("inner"),
           "Whether the last `inner` axes are contiguous, and the others one axis with one stride.")
      .def("overlaps", &DeviceArray::overlaps, py::arg("other"), "Whether the two may share memory.")
      .def("numpy", &to_numpy,
           "A copy in host memory, as a NumPy array of this shape; bfloat16 as the uint16 of its bits.")
      .def(
          "contiguous", [](const DeviceArray& self) { return without_gil([&] { return self.contiguous(); }); },
          "Itself, or a C-contiguous copy on the GPU. Raises ShapeError when neither its last axis is contiguous nor "
          "all others are one axis.")
      .def(
          "copy", [](const DeviceArray& self) { return without_gil([&] { return self.copy(); }); },
          "A C-contiguous copy on the GPU. Raises ShapeError as contiguous().")
      .def(
          "repeated",
          [](const DeviceArray& self, int64_t times) { return without_gil([&] { return self.repeated(times); }); },
          py::arg("times"), "A new array: its rows, so many times one after another.")
      .def("reshape", &DeviceArray::reshape, py::arg("shape"),
           "The same memory in another shape. Raises ShapeError for another number of elements, or where it would have "
           "to be copied.")
      .def(
          "assign",
          [](const DeviceArray& self, const DeviceArray& source) { without_gil([&] { self.assign(source); }); },
          py::arg("source"), "Copies an array of this shape and dtype on this GPU into this one.")
      .def(
          "zeros",
          [](const DeviceArray& self, const Extents& shape, const std::string& dtype) {
            return without_gil([&] { return DeviceArray::zeros(self.backend(), shape, dtype); });
          },
          py::arg("shape"), py::arg("dtype") = "float32", "A new array of zeros on this GPU.")
      .def("__dlpack__", &to_dlpack, py::kw_only(), py::arg("stream") = py::none(), py::arg("max_version") = py::none(),
           py::arg("dl_device") = py::none(), py::arg("copy") = py::none(),
           "A DLPack capsule over its memory, which is kept until the capsule's consumer lets it go.\n\n"
           "Everything that was to write it is done first, unless stream is -1. With max_version=(1, 0) or later the "
           "capsule says whether "
           "it may be written to. dl_device=(1, 0) gives a copy on the CPU, copy=True one on the GPU. Raises "
           "BufferError.")
      .def("__dlpack_device__", [](const DeviceArray& self) { return py::make_tuple(dlpack::kCuda, self.gpu()); })
      .def("__len__",
           [](const DeviceArray& self) {
             require(!self.shape().empty(), ErrorKind::kShape, "an array without axes has no length");
             return self.shape()[0];
           })
      .def("__array__",
           [](const DeviceArray& self, const py::args&, const py::kwargs&) -> py::array {
             fail(ErrorKind::kDevice, "an array on cuda:", self.gpu(),
                  " does not become a NumPy array by itself. Call numpy() on it, which copies it");
           })
      .def("__repr__", [](const DeviceArray& self) {
        return cat("<DeviceArray ", self.shape_text(), " ", self.type().name, " on cuda:", self.gpu(), ">");
      });
  backend.def_property_readonly("stream", &Backend::stream)
      .def("device_array", &to_device, py::arg("array"), py::arg("dtype"));
  matrix.def("values", &values);
  module.def("from_dlpack", &from_capsule, py::arg("capsule"), py::arg("backend").none(true), py::arg("what"));
}

}  // namespace llama_ext
