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
  PythonObserver(const Places& places, int64_t layers, py::object see) : see_(std::move(see)) {
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

/// A sequence, and what it refers to.
struct PyObservedSequence {
  std::shared_ptr<Model> model;
  std::shared_ptr<Adapter> adapter;
  ObservedSequence sequence;
  Busy busy;

  PyObservedSequence(std::shared_ptr<Model> of, std::vector<int32_t> tokens, std::shared_ptr<Adapter> with,
                     const std::vector<int64_t>& layers)
      : model(std::move(of)), adapter(std::move(with)), sequence(*model, std::move(tokens), adapter.get(), layers) {}
};

std::unique_ptr<PyObservedSequence> make_sequence(const std::shared_ptr<Model>& model, const py::object& tokens,
                                                  const std::vector<int64_t>& layers,
                                                  const std::shared_ptr<Adapter>& adapter) {
  std::vector<int32_t> ids = token_ids(tokens, "forward", "tokens");
  return without_gil([&] { return std::make_unique<PyObservedSequence>(model, std::move(ids), adapter, layers); });
}

/// Calls run(observer, rows, logits) and gives the logits, (rows asked for of each copy, V).
template <typename Run>
py::array observed_logits(PyObservedSequence& self, const Places& places, const py::object& see,
                          const std::string& which, int64_t copies, int64_t all_rows, const Run& run) {
  const BusyScope busy(self.busy, "ObservedSequence");
  require(which == "all" || which == "last", ErrorKind::kOption, "forward: rows must be 'all' or 'last', got '", which,
          "'");
  const ModelConfig& config = self.model->config();
  PythonObserver observer(places, config.layers, see);
  py::array logits = new_array(DType::kF32, {which == "all" ? all_rows : copies, config.outputs()}, "the logits");
  float* data = float_data(logits);
  without_gil([&] { run(observer, which == "all" ? LogitsRows::kAll : LogitsRows::kLast, data); });
  return logits;
}

py::array run(PyObservedSequence& self, const Places& places, const py::object& see, const std::string& which) {
  return observed_logits(
      self, places, see, which, 1, self.sequence.count(),
      [&](Observer& observer, LogitsRows rows, float* logits) { self.sequence.run(observer, rows, logits); });
}

py::array run_from(PyObservedSequence& self, int64_t layer, const std::vector<int64_t>& begins, const Places& places,
                   const py::object& see, const std::string& which) {
  const int64_t count = self.sequence.count();
  int64_t all_rows = 0;
  for (const int64_t begin : begins)
    all_rows += begin >= 0 && begin < count ? count - begin : 0;  // checked by the call
  return observed_logits(self, places, see, which, static_cast<int64_t>(begins.size()), all_rows,
                         [&](Observer& observer, LogitsRows rows, float* logits) {
                           self.sequence.run_from(layer, begins, observer, rows, logits);
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
      .def(py::init(&make_sequence), py::arg("model"), py::arg("tokens"), py::arg("layers") = std::vector<int64_t>{},
           py::arg("adapter") = py::none())
      .def("run", &run, py::arg("places"), py::arg("see"), py::arg("rows") = "all")
      .def("run_from", &run_from, py::arg("layer"), py::arg("begins"), py::arg("places"), py::arg("see"),
           py::arg("rows") = "all");
}

}  // namespace llama_ext
