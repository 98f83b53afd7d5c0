// input_gradients and embed_tokens: a model read through its embeddings.
#include "train/input_gradients.h"

#include <cstring>

#include "bindings/bindings.h"

namespace llama_ext {
namespace {

/// A contiguous array of int64, (n), copied: they are counted on while other threads of Python may write to the array.
std::vector<int64_t> whole_numbers(const py::object& array, std::string_view what) {
  if (!py::isinstance<py::array_t<int64_t, py::array::c_style>>(array)) {
    fail(ErrorKind::kDType, "input_gradients: ", what, " must be a contiguous array of int64");
  }
  const auto numbers = py::reinterpret_borrow<py::array>(array);
  require(numbers.ndim() == 1, ErrorKind::kShape, "input_gradients: ", what, " must have one dimension, got ",
          numbers.ndim());
  std::vector<int64_t> copy(static_cast<size_t>(numbers.size()));
  if (!copy.empty()) std::memcpy(copy.data(), numbers.data(), copy.size() * sizeof(int64_t));  // aligned or not
  return copy;
}

py::tuple gradients(const Model& model, const py::object& embeddings, const py::object& lengths, const py::object& rows,
                    const py::object& outputs, const py::object& weights, bool logprobs,
                    const std::shared_ptr<Adapter>& adapter, bool differentiate) {
  const std::vector<int64_t> term_rows = whole_numbers(rows, "rows");
  const std::vector<int32_t> term_outputs = token_ids(outputs, "input_gradients", "outputs");
  const TensorView term_weights = read_view(weights, DType::kF64, 1, "input_gradients", "weights");
  require(term_outputs.size() == term_rows.size() && term_weights.size() == static_cast<int64_t>(term_rows.size()),
          ErrorKind::kShape, "input_gradients: rows, outputs and weights must be as many, got ", term_rows.size(), ", ",
          term_outputs.size(), " and ", term_weights.size());
  std::vector<OutputTerm> terms;
  for (size_t i = 0; i < term_rows.size(); ++i) {
    terms.push_back(
        {.row = term_rows[i], .output = term_outputs[i], .weight = static_cast<const double*>(term_weights.data())[i]});
  }
  const std::vector<int64_t> sequence_lengths = whole_numbers(lengths, "lengths");
  const EmbeddedBatch batch{.embeddings = read_view(embeddings, DType::kF32, 2, "input_gradients", "embeddings"),
                            .lengths = sequence_lengths,
                            .terms = terms,
                            .logprobs = logprobs};
  py::array_t<double> values(static_cast<py::ssize_t>(terms.size()));
  const std::span<double> found(values.mutable_data(), terms.size());
  py::object d = py::none();
  TensorView target;
  if (differentiate) {
    const std::vector<int64_t> shape{batch.embeddings.dim(0), batch.embeddings.dim(1)};
    py::array array = new_array(DType::kF32, shape, "input_gradients");
    target = TensorView(float_data(array), DType::kF32, {shape[0], shape[1]});
    d = array;
  }
  without_gil([&] { input_gradients(model, adapter.get(), batch, found, target); });
  return py::make_tuple(values, d);
}

py::array embed(const Model& model, const py::object& ids) {
  const std::vector<int32_t> tokens = token_ids(ids, "embed_tokens", "ids");
  const int64_t count = static_cast<int64_t>(tokens.size());
  py::array array = new_array(DType::kF32, {count, model.config().width}, "embed_tokens");
  const TensorView target(float_data(array), DType::kF32, {count, model.config().width});
  without_gil([&] { embed_tokens(model, tokens, target); });
  return array;
}

}  // namespace

void bind_input_gradients(py::module_& module) {
  module.def("input_gradients", &gradients, py::arg("model"), py::arg("embeddings"), py::arg("lengths"),
             py::arg("rows"), py::arg("outputs"), py::arg("weights"), py::kw_only(), py::arg("logprobs") = false,
             py::arg("adapter") = py::none(), py::arg("differentiate") = true);
  module.def("embed_tokens", &embed, py::arg("model"), py::arg("ids"));
}

}  // namespace llama_ext
