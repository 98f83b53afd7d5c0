// A forward pass that a Python function looks at and may change.
#include <algorithm>
#include <memory>
#include <set>
#include <utility>

#include "bindings/bindings.h"
#include "model/observed_sequence.h"
#include "model/observer.h"
#include "model/read_out.h"

namespace llama_ext {
namespace {

/// (site, layer)
using Places = std::vector<std::pair<std::string, int64_t>>;

/// Calls see(site, layer, values) at the places that are named, with the GIL.
class PythonObserver : public Observer {
 public:
  /// first: the layer where the pass begins.
  PythonObserver(const Places& places, int64_t first, int64_t layers, py::object see) : see_(std::move(see)) {
    for (const auto& [name, layer] : places) {
      const Site site = site_from_name(name);
      const int64_t count = is_of_a_layer(site) ? layers : 1;
      require(layer >= 0 && layer < count, ErrorKind::kOption, "forward: ", name, " is shown of layers 0 to ",
              count - 1, ", not of ", layer);
      require(layer >= first || site == Site::kFinalNorm, ErrorKind::kOption, "forward: a pass that begins at layer ",
              first, " does not come by ", name, " of layer ", layer);
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

/// A sequence as Python holds it, and what it refers to.
struct PyObservedSequence {
  std::shared_ptr<Model> model;
  std::shared_ptr<Adapter> adapter;
  std::shared_ptr<ObservedSequence> sequence;
  Busy busy;
};

std::unique_ptr<PyObservedSequence> make_sequence(const std::shared_ptr<Model>& model, const py::object& tokens,
                                                  const std::vector<int64_t>& layers,
                                                  const std::shared_ptr<Adapter>& adapter) {
  auto made = std::make_unique<PyObservedSequence>();
  made->model = model;
  made->adapter = adapter;
  made->sequence = deleted_without_gil(
      std::make_unique<ObservedSequence>(*model, token_ids(tokens, "forward", "tokens"), adapter.get(), layers));
  return made;
}

/// Calls pass(observer, rows, logits) and gives the logits: of all_rows, or of the last one of each copy.
template <typename Pass>
py::array observed_logits(PyObservedSequence& self, int64_t first, const Places& places, const py::object& see,
                          const std::string& which, int64_t copies, int64_t all_rows, const Pass& pass) {
  const BusyScope busy(self.busy, "ObservedSequence");
  const LogitsRows rows = logits_rows_from_name(which, "forward");
  const ModelConfig& config = self.model->config();
  PythonObserver observer(places, first, config.layers, see);
  py::array logits =
      new_array(DType::kF32, {rows == LogitsRows::kAll ? all_rows : copies, config.outputs()}, "the logits");
  float* data = float_data(logits);
  without_gil([&] { pass(observer, rows, data); });
  return logits;
}

py::array run(PyObservedSequence& self, const Places& places, const py::object& see, const std::string& which) {
  ObservedSequence& sequence = *self.sequence;
  return observed_logits(
      self, 0, places, see, which, 1, sequence.count(),
      [&](Observer& observer, LogitsRows rows, float* logits) { sequence.run(observer, rows, logits); });
}

py::array run_from(PyObservedSequence& self, int64_t layer, const std::vector<int64_t>& begins, const Places& places,
                   const py::object& see, const std::string& which) {
  ObservedSequence& sequence = *self.sequence;
  int64_t all_rows = 0;
  for (const int64_t begin : begins) {
    // What is out of range, the call refuses.
    all_rows += begin >= 0 && begin < sequence.count() ? sequence.count() - begin : 0;
  }
  return observed_logits(self, layer, places, see, which, static_cast<int64_t>(begins.size()), all_rows,
                         [&](Observer& observer, LogitsRows rows, float* logits) {
                           sequence.run_from(layer, begins, observer, rows, logits);
                         });
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

void bind_observed(py::module_& module, py::class_<Model, std::shared_ptr<Model>>& model) {
  model.def("read_out", &read_out_rows, py::arg("x"));
  py::class_<PyObservedSequence>(module, "ObservedSequence")
      .def(py::init(&make_sequence), py::arg("model").none(false), py::arg("tokens"),
           py::arg("layers") = std::vector<int64_t>{}, py::arg("adapter") = py::none())
      .def_property_readonly("copy_nbytes", [](const PyObservedSequence& self) { return self.sequence->copy_nbytes(); })
      .def("run", &run, py::arg("places"), py::arg("see"), py::arg("rows") = "all")
      .def("run_from", &run_from, py::arg("layer"), py::arg("begins"), py::arg("places"), py::arg("see"),
           py::arg("rows") = "all");
}

}  // namespace llama_ext
