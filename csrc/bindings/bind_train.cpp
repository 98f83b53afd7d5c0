// Trainer: gradients and steps.
#include "bindings/bindings.h"
#include "train/trainer.h"

namespace llama_ext {
namespace {

/// A Trainer as Python holds it.
struct PyTrainer {
  std::shared_ptr<Trainer> trainer;
  Busy busy;
};

OptimizerOptions optimizer_from_dict(const py::dict& dict) {
  OptimizerOptions options;
  std::string kind = "adamw";
  std::string decay = "matrices";
  Fields fields(dict, "optimizer");
  fields.read("kind", kind);
  fields.read("beta1", options.beta1);
  fields.read("beta2", options.beta2);
  fields.read("eps", options.eps);
  fields.read("momentum", options.momentum);
  fields.read("nesterov", options.nesterov);
  fields.read("weight_decay", options.weight_decay);
  fields.read("decay", decay);
  fields.finish();
  if (kind == "adamw") {
    options.kind = OptimizerKind::kAdamW;
  } else if (kind == "adam") {
    options.kind = OptimizerKind::kAdam;
  } else if (kind == "sgd") {
    options.kind = OptimizerKind::kSgd;
  } else {
    require(kind == "muon", ErrorKind::kOption, "optimizer: kind must be adamw, adam, sgd or muon, got '", kind, "'");
    options.kind = OptimizerKind::kMuon;
  }
  require(decay == "matrices" || decay == "all", ErrorKind::kOption,
          "optimizer: decay must be 'matrices' or 'all', got '", decay, "'");
  options.decay_all = decay == "all";
  return options;
}

std::unique_ptr<PyTrainer> make_trainer(const std::shared_ptr<Model>& model, const py::dict& optimizer,
                                        const std::string& compute, bool checkpoint_activations, double dropout,
                                        double attention_dropout, double adapter_dropout,
                                        const std::shared_ptr<Adapter>& adapter,
                                        const std::optional<std::vector<std::string>>& trainable) {
  TrainerOptions options;
  options.optimizer = optimizer_from_dict(optimizer);
  require(compute == "float32" || compute == "bfloat16", ErrorKind::kOption,
          "trainer: compute must be 'float32' or 'bfloat16', got '", compute, "'");
  options.compute = compute == "float32" ? Compute::kExact : Compute::kBF16;
  options.checkpoint_activations = checkpoint_activations;
  options.dropout = {.residual = dropout, .attention = attention_dropout, .adapter = adapter_dropout};
  if (trainable) options.trainable = {.all = false, .slots = *trainable};
  auto self = std::make_unique<PyTrainer>();
  self->trainer = deleted_without_gil(without_gil([&] { return std::make_unique<Trainer>(model, adapter, options); }));
  return self;
}

/// The arrays of a batch; valid while they are.
TrainingBatch batch_of(const py::object& tokens, const py::object& labels, const py::object& lengths) {
  const TensorView ids = read_view(tokens, DType::kI32, 1, "trainer", "tokens");
  const TensorView targets = read_view(labels, DType::kI32, 1, "trainer", "labels");
  require(ids.is_contiguous() && targets.is_contiguous(), ErrorKind::kShape,
          "trainer: tokens and labels must be contiguous");
  require(py::isinstance<py::array_t<int64_t, py::array::c_style>>(lengths), ErrorKind::kDType,
          "trainer: lengths must be a contiguous array of int64");
  const auto sizes = py::reinterpret_borrow<py::array>(lengths);
  require(sizes.ndim() == 1, ErrorKind::kShape, "trainer: lengths must have one dimension, got ", sizes.ndim());
  return {.tokens = {static_cast<const int32_t*>(ids.data()), static_cast<size_t>(ids.size())},
          .labels = {static_cast<const int32_t*>(targets.data()), static_cast<size_t>(targets.size())},
          .lengths = {static_cast<const int64_t*>(sizes.data()), static_cast<size_t>(sizes.size())}};
}

py::tuple accumulate(PyTrainer& self, const py::object& tokens, const py::object& labels, const py::object& lengths,
                     double scale, uint64_t seed) {
  const BusyScope busy(self.busy, "Trainer");
  const TrainingBatch batch = batch_of(tokens, labels, lengths);
  const LossSum sum = without_gil([&] { return self.trainer->accumulate(batch, scale, seed); });
  return py::make_tuple(sum.loss, sum.counted);
}

py::tuple evaluate(PyTrainer& self, const py::object& tokens, const py::object& labels, const py::object& lengths) {
  const BusyScope busy(self.busy, "Trainer");
  const TrainingBatch batch = batch_of(tokens, labels, lengths);
  const LossSum sum = without_gil([&] { return self.trainer->evaluate(batch); });
  return py::make_tuple(sum.loss, sum.counted, sum.correct);
}

py::list parameters(PyTrainer& self) {
  py::list list;
  for (const ParameterSlot& slot : self.trainer->parameters().slots()) {
    list.append(py::make_tuple(slot.name, py::tuple(py::cast(slot.shape))));
  }
  return list;
}

TensorView slot_view(void* data, const ParameterSlot& slot) {
  return slot.shape.size() == 2 ? TensorView(data, DType::kF32, {slot.shape[0], slot.shape[1]})
                                : TensorView(data, DType::kF32, {slot.shape[0]});
}

/// moment: an index, or -1 for the gradient.
py::array read_tensor(PyTrainer& self, const std::string& name, int moment) {
  const BusyScope busy(self.busy, "Trainer");
  const ParameterSlot& slot = self.trainer->parameters().slot(name);
  py::array values = new_array(DType::kF32, slot.shape, "trainer");
  const TensorView target = slot_view(values.mutable_data(), slot);
  without_gil([&] { self.trainer->parameters().read(slot, moment, target); });
  return values;
}

std::vector<std::string> moments(const PyTrainer& self, const std::string& slot) {
  const Parameters& parameters = self.trainer->parameters();
  return moment_names(self.trainer->optimizer(), parameters.all()[parameters.slot(slot).parameter].is_block_matrix);
}

int moment_index(const PyTrainer& self, const std::string& name, const std::string& slot) {
  const std::vector<std::string> names = moments(self, slot);
  const auto found = std::find(names.begin(), names.end(), name);
  require(found != names.end(), ErrorKind::kCheckpoint, "trainer: this optimiser keeps no '", name, "' of '", slot,
          "'");
  return static_cast<int>(found - names.begin());
}

void write_moment(PyTrainer& self, const std::string& moment, const std::string& name, const py::object& array) {
  const BusyScope busy(self.busy, "Trainer");
  const ParameterSlot& slot = self.trainer->parameters().slot(name);
  const TensorView source = read_view(array, DType::kF32, static_cast<int>(slot.shape.size()), "trainer", name);
  const TensorView expected = slot_view(source.data(), slot);
  require(source.shape_text() == expected.shape_text() && source.is_contiguous(), ErrorKind::kShape, "trainer: '",
          moment, "' of '", name, "' must be contiguous, of shape ", expected.shape_text(), ", got ",
          source.shape_text());
  const int index = moment_index(self, moment, name);
  without_gil([&] { self.trainer->parameters().write_moment(slot, index, source); });
}

}  // namespace

void bind_train(py::module_& module) {
  py::class_<PyTrainer>(module, "Trainer")
      .def(py::init(&make_trainer), py::arg("model"), py::kw_only(), py::arg("optimizer"),
           py::arg("compute") = "float32", py::arg("checkpoint_activations") = false, py::arg("dropout") = 0.0,
           py::arg("attention_dropout") = 0.0, py::arg("adapter_dropout") = 0.0, py::arg("adapter") = py::none(),
           py::arg("trainable") = py::none())
      .def("accumulate", &accumulate, py::arg("tokens"), py::arg("labels"), py::arg("lengths"), py::kw_only(),
           py::arg("scale"), py::arg("seed") = 0)
      .def("evaluate", &evaluate, py::arg("tokens"), py::arg("labels"), py::arg("lengths"))
      .def("gradient_norm",
           [](PyTrainer& self) {
             const BusyScope busy(self.busy, "Trainer");
             return without_gil([&] { return self.trainer->gradient_norm(); });
           })
      .def(
          "step",
          [](PyTrainer& self, double lr, double gradient_scale) {
            const BusyScope busy(self.busy, "Trainer");
            without_gil([&] { self.trainer->step(lr, gradient_scale); });
          },
          py::kw_only(), py::arg("lr"), py::arg("gradient_scale") = 1.0)
      .def("zero_gradients",
           [](PyTrainer& self) {
             const BusyScope busy(self.busy, "Trainer");
             without_gil([&] { self.trainer->zero_gradients(); });
           })
      .def_property(
          "steps",
          [](PyTrainer& self) {
            const BusyScope busy(self.busy, "Trainer");
            return self.trainer->steps();
          },
          [](PyTrainer& self, int64_t steps) {
            const BusyScope busy(self.busy, "Trainer");
            self.trainer->set_steps(steps);
          })
      .def("parameters", &parameters)
      .def(
          "gradient", [](PyTrainer& self, const std::string& name) { return read_tensor(self, name, -1); },
          py::arg("slot"))
      .def("moments", &moments, py::arg("slot"))
      .def(
          "read_moment",
          [](PyTrainer& self, const std::string& moment, const std::string& name) {
            return read_tensor(self, name, moment_index(self, moment, name));
          },
          py::arg("moment"), py::arg("slot"))
      .def("write_moment", &write_moment, py::arg("moment"), py::arg("slot"), py::arg("array"))
      .def_property_readonly("nbytes", [](PyTrainer& self) {
        const BusyScope busy(self.busy, "Trainer");
        return self.trainer->nbytes();
      });
}

}  // namespace llama_ext
