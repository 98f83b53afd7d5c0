// Generation: the token loop without Python.
#include "bindings/bindings.h"

namespace llama_ext {
namespace {

/// A Generation as Python holds it; it keeps the session that it continues.
struct PyGeneration {
  std::shared_ptr<PySession> session;
  std::shared_ptr<Generation> generation;
  Busy busy;
};

/// Holds the generation, and the session that it continues, for one call.
class GenerationScope {
 public:
  explicit GenerationScope(PyGeneration& self) : generation_(self.busy, "Generation") {
    if (self.session) session_.emplace(self.session->busy, "Session");
  }

 private:
  BusyScope generation_;
  std::optional<BusyScope> session_;
};

const char* finish_name(Finish finish) {
  switch (finish) {
    case Finish::kNone:
      return "";
    case Finish::kEos:
      return "eos";
    case Finish::kLength:
      return "length";
    case Finish::kStopped:
      return "stop";
  }
  return "";
}

std::unique_ptr<PyGeneration> make_generation(const std::shared_ptr<Model>& model, const py::object& prompts,
                                              const py::dict& sampling, const std::vector<int64_t>& max_new_tokens,
                                              const std::vector<int32_t>& eos, uint64_t seed,
                                              const std::string& kv_dtype, int64_t copies,
                                              const std::shared_ptr<PySession>& session, int64_t max_batch_size,
                                              int64_t draft_tokens, const std::shared_ptr<Model>& draft_model,
                                              const std::string& draft_kv_dtype, const Adapters& adapters) {
  GenerationOptions options;
  options.sampling = sampling_from_dict(sampling);
  options.max_new_tokens = max_new_tokens;
  options.eos = eos;
  options.seed = seed;
  options.kv_dtype = kv_dtype_from_name(kv_dtype);
  options.copies = copies;
  options.max_batch_size = max_batch_size;
  options.speculation.tokens = draft_tokens;
  options.speculation.model = draft_model;
  options.speculation.kv_dtype = kv_dtype_from_name(draft_kv_dtype);
  options.adapters = shared(adapters);
  std::vector<std::vector<int32_t>> ids = token_id_lists(prompts, "generate", "prompts");

  auto self = std::make_unique<PyGeneration>();
  self->session = session;
  const GenerationScope scope(*self);
  self->generation = deleted_without_gil(without_gil([&] {
    return std::make_unique<Generation>(model, std::move(ids), std::move(options),
                                        session ? session->session.get() : nullptr);
  }));
  return self;
}

py::dict counts(PyGeneration& self) {
  const BusyScope busy(self.busy, "Generation");
  const GenerationCounts counts = self.generation->counts();
  py::dict dict;
  dict["passes"] = counts.passes;
  dict["tokens_run"] = counts.tokens_run;
  dict["draft_tokens_run"] = counts.draft_tokens_run;
  return dict;
}

py::dict row_counts(PyGeneration& self, int64_t row) {
  const BusyScope busy(self.busy, "Generation");
  const RowCounts counts = self.generation->row_counts(row);
  py::dict dict;
  dict["prompt_run"] = counts.prompt_run;
  dict["prompt_shared"] = counts.prompt_shared;
  dict["drafted"] = counts.drafted;
  dict["accepted"] = counts.accepted;
  return dict;
}

py::list run(PyGeneration& self, int64_t steps) {
  const GenerationScope scope(self);
  const std::vector<GenerationEvent> events = without_gil([&] { return self.generation->run(steps); });
  py::list list;
  for (const GenerationEvent& event : events) {
    list.append(py::make_tuple(event.row, event.token, event.logprob, finish_name(event.finish)));
  }
  return list;
}

}  // namespace

void bind_generation(py::module_& module) {
  py::class_<PyGeneration>(module, "Generation")
      .def(py::init(&make_generation), py::arg("model"), py::arg("prompts"), py::kw_only(), py::arg("sampling"),
           py::arg("max_new_tokens"), py::arg("eos"), py::arg("seed"), py::arg("kv_dtype"), py::arg("copies") = 1,
           py::arg("session") = py::none(), py::arg("max_batch_size") = 16, py::arg("draft_tokens") = 0,
           py::arg("draft_model") = py::none(), py::arg("draft_kv_dtype") = "float32", py::arg("adapters") = Adapters{})
      .def_property_readonly("done",
                             [](PyGeneration& self) {
                               const BusyScope busy(self.busy, "Generation");
                               return self.generation->done();
                             })
      .def_property_readonly("rows", [](const PyGeneration& self) { return self.generation->rows(); })
      .def_property_readonly("counts", &counts)
      .def("row_counts", &row_counts, py::arg("row"))
      .def("step", [](PyGeneration& self) { return run(self, 1); })
      .def("run", &run, py::arg("steps"))
      .def(
          "stop",
          [](PyGeneration& self, int64_t row) {
            const BusyScope busy(self.busy, "Generation");
            self.generation->stop(row);
          },
          py::arg("row"));
}

}  // namespace llama_ext
