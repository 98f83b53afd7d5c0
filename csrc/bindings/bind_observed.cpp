// A forward pass that a Python function looks at and may change.
#include <algorithm>
#include <set>
#include <utility>

#include "bindings/bindings.h"
#include "model/observer.h"
#include "model/read_out.h"

namespace llama_ext {
namespace {

/// Calls see(site, layer, values) at the places that are named, with the GIL.
class PythonObserver : public Observer {
 public:
  PythonObserver(const std::vector<std::pair<std::string, int64_t>>& places, int64_t layers, py::object see)
      : see_(std::move(see)) {
    for (const auto& [name, layer] : places) {
      const Site site = site_from_name(name);
      const int64_t count = is_of_a_layer(site) ? layers : 1;
      require(layer >= 0 && layer < count, ErrorKind::kOption, "forward: ", name, " is shown of layers 0 to ",
              count - 1, ", not of ", layer);
      places_.emplace(site, layer);
    }
  }

  bool wants(Site site, int64_t layer) const override { return places_.contains({site, layer}); }

  bool show(Site site, int64_t layer, const TensorView& values) override {
    const py::gil_scoped_acquire acquire;
    py::array shown = new_array(DType::kF32, {values.rows(), values.inner_size()}, name_of(site));
    std::copy_n(values.f32(), values.size(), float_data(shown));
    const py::object answer = see_(std::string(name_of(site)), layer, shown);
    if (answer.is_none()) return false;
    const TensorView changed = read_view(answer, DType::kF32, 2, "forward", name_of(site));
    require_shape(changed, {values.rows(), values.inner_size()}, "forward", name_of(site));
    require(changed.is_contiguous(), ErrorKind::kShape, "forward: ", name_of(site), " must be contiguous");
    std::copy_n(changed.f32(), changed.size(), values.f32());
    return true;
  }

 private:
  std::set<std::pair<Site, int64_t>> places_;
  py::object see_;
};

py::array observed_logits(const Model& model, const py::object& tokens,
                          const std::vector<std::pair<std::string, int64_t>>& places, const py::object& see,
                          const std::shared_ptr<Adapter>& adapter) {
  const std::vector<int32_t> ids = token_ids(tokens, "forward", "tokens");
  PythonObserver observer(places, model.config().layers, see);
  py::array logits = new_array(DType::kF32, {static_cast<int64_t>(ids.size()), model.config().outputs()}, "the logits");
  float* data = float_data(logits);
  without_gil([&] { forward_observed(model, ids, adapter.get(), observer, data); });
  return logits;
}

py::array read_out_rows(const Model& model, const py::object& x) {
  const TensorView states = read_view(x, DType::kF32, 2, "read_out", "x");
  require_shape(states, {states.dim(0), model.config().width}, "read_out", "x");
  require(states.is_contiguous(), ErrorKind::kShape, "read_out: x must be contiguous");
  py::array logits = new_array(DType::kF32, {states.dim(0), model.config().outputs()}, "the logits");
  float* data = float_data(logits);
  without_gil([&] { read_out(model, states.f32(), states.dim(0), data); });
  return logits;
}

}  // namespace

void bind_observed(py::class_<Model, std::shared_ptr<Model>>& model) {
  model.def("observed_logits", &observed_logits, py::arg("tokens"), py::arg("places"), py::arg("see"),
            py::arg("adapter") = py::none());
  model.def("read_out", &read_out_rows, py::arg("x"));
}

}  // namespace llama_ext
