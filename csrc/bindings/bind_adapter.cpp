// Adapter: the LoRA matrices of a model.
#include "bindings/bindings.h"

namespace llama_ext {
namespace {

using AdapterPtr = std::shared_ptr<Adapter>;

AdapterPtr make_adapter(const std::shared_ptr<Model>& model, const py::dict& targets) {
  std::map<std::string, Adapter::Shape> shapes;
  for (const auto& [slot, shape] : targets) {
    const auto [rank, scale] = shape.cast<std::pair<int64_t, double>>();
    shapes[slot.cast<std::string>()] = {.rank = rank, .scale = scale};
  }
  return deleted_without_gil(
      without_gil([&] { return std::make_unique<Adapter>(model->shared_backend(), model->config(), shapes); }));
}

py::list slots(const Adapter& adapter) {
  py::list list;
  for (const Adapter::Entry& each : adapter.entries()) {
    list.append(py::make_tuple(each.slot, each.part->a->rows(), each.part->scale));
  }
  return list;
}

Matrix& matrix(const Adapter& adapter, const std::string& slot, const std::string& which) {
  require(which == "A" || which == "B", ErrorKind::kOption, "adapter: a matrix is 'A' or 'B', got '", which, "'");
  LowRank& part = adapter.find(slot);
  return which == "A" ? *part.a : *part.b;
}

py::array read(const Adapter& adapter, const std::string& slot, const std::string& which) {
  const Matrix& source = matrix(adapter, slot, which);
  py::array values = new_array(DType::kF32, {source.rows(), source.cols()}, "adapter");
  const TensorView target(float_data(values), DType::kF32, {source.rows(), source.cols()});
  without_gil([&] {
    adapter.backend().read_rows(source, {}, target);
    adapter.backend().synchronize();
  });
  return values;
}

void write(Adapter& adapter, const std::string& slot, const std::string& which, const py::object& array) {
  Matrix& target = matrix(adapter, slot, which);
  const TensorView source = read_view(array, DType::kF32, 2, "adapter", slot);
  require_shape(source, {target.rows(), target.cols()}, "adapter", cat(slot, ".lora_", which));
  require(source.is_contiguous(), ErrorKind::kShape, "adapter: '", slot, "' must be contiguous");
  without_gil([&] {
    adapter.backend().write_rows(target, {}, source, {});
    adapter.backend().synchronize();
  });
}

}  // namespace

void bind_adapter(py::module_& module) {
  py::class_<Adapter, AdapterPtr>(module, "Adapter")
      .def(py::init(&make_adapter), py::arg("model"), py::arg("targets"))
      .def("slots", &slots)
      .def("read", &read, py::arg("slot"), py::arg("matrix"))
      .def("write", &write, py::arg("slot"), py::arg("matrix"), py::arg("array"))
      .def_property_readonly("nbytes", &Adapter::nbytes);
}

}  // namespace llama_ext
