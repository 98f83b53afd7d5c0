// Model: weights in and out, and whatever is computed without keeping state.
#include <algorithm>
#include <functional>
#include <utility>

#include "bindings/bindings.h"
#include "generate/beam_search.h"
#include "generate/score.h"

namespace llama_ext {
namespace {

using ModelPtr = std::shared_ptr<Model>;

ModelConfig config_from_dict(const py::dict& dict) {
  ModelConfig config;
  py::dict rope;
  Fields fields(dict, "config");
  fields.read("vocabulary", config.vocabulary);
  fields.read("width", config.width);
  fields.read("ffn_width", config.ffn_width);
  fields.read("layers", config.layers);
  fields.read("heads", config.heads);
  fields.read("kv_heads", config.kv_heads);
  fields.read("head_dim", config.head_dim);
  fields.read("context", config.context);
  fields.read("norm_eps", config.norm_eps);
  fields.read("tied_head", config.tied_head);
  fields.read("attention_bias", config.attention_bias);
  fields.read("ffn_bias", config.ffn_bias);
  fields.read("labels", config.labels);
  fields.read("rope", rope);
  fields.finish();
  config.rope = rope_from_dict(rope, config.head_dim);
  return config;
}

/// {slot: (encoding, group)}; the slot "" stands for all that are not named.
WeightPlan plan_from_dict(const py::dict& types) {
  WeightPlan plan;
  for (const auto& [slot, type] : types) {
    const auto [encoding, group] = type.cast<std::pair<std::string, int64_t>>();
    const WeightType parsed = weight_type(encoding, group, "model");
    const std::string name = slot.cast<std::string>();
    if (name.empty()) {
      plan.others = parsed;
    } else {
      plan.by_slot.emplace(name, parsed);
    }
  }
  return plan;
}

/// Keeps a Python object alive for the core, which may let go of it without the GIL.
std::shared_ptr<const void> keep_alive(const py::handle& object) {
  py::object* kept = new py::object(py::reinterpret_borrow<py::object>(object));
  return {kept, [](py::object* held) {
            const py::gil_scoped_acquire gil;
            delete held;
          }};
}

ModelPtr make_model(const std::shared_ptr<Backend>& backend, const py::dict& config, const py::dict& types,
                    const py::dict& packed, const std::string& compute) {
  const ModelConfig parsed = config_from_dict(config);
  const WeightPlan plan = plan_from_dict(types);
  PackedWeights bytes;
  for (const auto& [name, array] : packed) {
    const std::string matrix = name.cast<std::string>();
    bytes.emplace(matrix, PackedBytes{byte_view(array, "model", matrix), keep_alive(array)});
  }
  const Compute arithmetic = compute_from_name(compute);
  return deleted_without_gil(
      without_gil([&] { return std::make_unique<Model>(backend, parsed, plan, bytes, arithmetic); }));
}

ModelPtr converted(const Model& model, const py::dict& types, bool separate_gate_up) {
  WeightPlan plan = plan_from_dict(types);
  plan.separate_gate_up = separate_gate_up;
  return deleted_without_gil(without_gil([&] { return convert(model, plan); }));
}

py::tuple type_tuple(const WeightType& type) { return py::make_tuple(info_of(type.encoding).name, type.group); }

py::list slots(const Model& model) {
  py::list list;
  for (const Weights::Slot& slot : model.weights().slots()) {
    list.append(py::make_tuple(slot.name, py::tuple(py::cast(slot.shape)), slot.is_matrix));
  }
  return list;
}

py::dict types(const Model& model) {
  py::dict all;
  all[""] = type_tuple(model.weights().type());
  for (const Weights::Slot& slot : model.weights().slots()) {
    if (slot.is_matrix) all[py::str(slot.name)] = type_tuple(slot.type);
  }
  return all;
}

/// A view of a matrix's memory, which the array keeps alive: the model's, or a copy where the model has it in two.
py::array packed(const ModelPtr& model, const std::string& name) {
  const PackedBytes found = without_gil([&] { return model->weights().packed(name); });
  py::object owner = py::cast(model);
  if (found.owner != nullptr) {
    using Kept = std::pair<ModelPtr, std::shared_ptr<const void>>;
    owner = py::capsule(new Kept(model, found.owner), [](void* kept) { delete static_cast<Kept*>(kept); });
  }
  py::array array(py::dtype::of<uint8_t>(), {static_cast<py::ssize_t>(found.bytes.size())}, {1}, found.bytes.data(),
                  owner);
  array.attr("setflags")(py::arg("write") = false);
  return array;
}

void load(Model& model, const std::string& slot, const py::object& source, const std::string& dtype,
          const py::object& importance) {
  const TensorView view = weight_view(source, "load", slot);
  const DType named = dtype_from_name(dtype, "load");
  require(view.dtype() == named, ErrorKind::kDType, "load: '", slot, "' was said to be ", dtype,
          ", but the array holds ",
          view.dtype() == DType::kBF16 ? "uint16 (the bits of bfloat16)" : name_of(view.dtype()));
  const TensorView weights = optional_view(importance, 1, "load", "importance");
  without_gil([&] { model.weights().load(slot, view, weights); });
}

void load_blocks(Model& model, const std::string& slot, const py::object& blocks, const std::string& ggml_name) {
  const GgmlType& ggml = ggml_type(ggml_name);
  const std::span<const std::byte> bytes = byte_view(blocks, "load_blocks", slot);
  without_gil([&] { model.weights().load_blocks(slot, ggml, bytes); });
}

/// An array of halves of what `codes` say, (N, groups).
const uint16_t* halves(const py::object& array, int64_t rows, int64_t groups, const std::string& slot,
                       const char* what) {
  const TensorView view = read_view(array, DType::kF16, 2, "load_codes", what);
  require_shape(view, {rows, groups}, "load_codes", slot);
  require(view.is_contiguous(), ErrorKind::kShape, "load_codes: ", what, " of '", slot, "' must be contiguous");
  return static_cast<const uint16_t*>(view.data());
}

/// Codes, scales and minima as `quantize` gives them.
void load_codes(Model& model, const std::string& slot, const py::array& codes, const py::object& scales,
                const py::object& mins) {
  const auto& slots = model.weights().slots();
  const auto found =
      std::find_if(slots.begin(), slots.end(), [&](const Weights::Slot& each) { return each.name == slot; });
  require(found != slots.end(), ErrorKind::kCheckpoint, "load_codes: there is no slot '", slot, "' in this model");
  require(found->is_matrix && found->type.is_quantized(), ErrorKind::kDType, "load_codes: '", slot,
          "' is not kept as codes");
  const EncodingInfo& info = info_of(found->type.encoding);
  const bool is_signed = py::isinstance<py::array_t<int8_t, py::array::c_style>>(codes);
  require(is_signed != info.has_min && (is_signed || py::isinstance<py::array_t<uint8_t, py::array::c_style>>(codes)),
          ErrorKind::kDType, "load_codes: codes of '", slot, "' must be a contiguous array of ",
          info.has_min ? "uint8" : "int8");
  require(codes.ndim() == 2 && codes.shape(0) == found->shape[0] && codes.shape(1) == found->shape[1],
          ErrorKind::kShape, "load_codes: codes of '", slot, "' must have shape ",
          shape_text({found->shape[0], found->shape[1]}));
  require(mins.is_none() != info.has_min, ErrorKind::kOption, "load_codes: '", slot, "' has ",
          info.has_min ? "minima" : "no minima");
  const int64_t rows = codes.shape(0);
  const int64_t groups = ceil_div(codes.shape(1), found->type.group);
  const auto* from = static_cast<const uint8_t*>(codes.data());
  // As they are kept: from 0 on.
  std::vector<uint8_t> unsigned_codes(from, from + codes.size());
  for (uint8_t& code : unsigned_codes) code = static_cast<uint8_t>(code + info.zero);
  const CodeRows source{.rows = rows,
                        .codes = unsigned_codes.data(),
                        .scales = halves(scales, rows, groups, slot, "scales"),
                        .mins = info.has_min ? halves(mins, rows, groups, slot, "mins") : nullptr};
  without_gil([&] { model.weights().load_codes(slot, source); });
}

/// The type of weights that keeps blocks of a ggml type.
py::tuple type_of_blocks(const std::string& ggml_name) { return type_tuple(ggml_type(ggml_name).type); }

/// The type in the core's own spelling; throws for one that no weights are kept as.
py::tuple checked_type(const std::string& encoding, int64_t group) {
  return type_tuple(weight_type(encoding, group, "weight type"));
}

py::array read(const Model& model, const std::string& name) {
  const std::vector<Weights::Slot>& slots = model.weights().slots();
  const auto slot = std::find_if(slots.begin(), slots.end(), [&](const Weights::Slot& s) { return s.name == name; });
  require(slot != slots.end(), ErrorKind::kCheckpoint, "read: there is no slot '", name, "' in this model");
  const DType dtype = slot->is_matrix && !slot->type.is_quantized() ? slot->type.dtype() : DType::kF32;
  py::array values = new_array(dtype, slot->shape, "read");
  void* data = values.mutable_data();
  const TensorView target = slot->shape.size() == 2 ? TensorView(data, dtype, {slot->shape[0], slot->shape[1]})
                                                    : TensorView(data, dtype, {slot->shape[0]});
  without_gil([&] { model.weights().read(name, target); });
  return values;
}

py::tuple read_codes(const Model& model, const std::string& name) {
  const std::vector<Weights::Slot>& slots = model.weights().slots();
  const auto slot = std::find_if(slots.begin(), slots.end(), [&](const Weights::Slot& s) { return s.name == name; });
  require(slot != slots.end(), ErrorKind::kCheckpoint, "read_codes: there is no slot '", name, "' in this model");
  require(slot->is_matrix && slot->type.is_quantized(), ErrorKind::kDType, "read_codes: '", name, "' is not quantised");
  CodeArrays arrays(slot->type, slot->shape[0], slot->shape[1]);
  without_gil([&] {
    model.weights().read_codes(name, [&](int64_t row, const QuantizedRow& codes) { arrays.store(row, codes); });
  });
  return arrays.tuple();
}

py::list logits(const Model& model, const py::object& sequences, const Adapters& adapters, const std::string& which) {
  const std::vector<std::vector<int32_t>> tokens = token_id_lists(sequences, "logits", "sequences");
  const LogitsRows asked = logits_rows_from_name(which, "logits");
  const auto rows_of = [&](const std::vector<int32_t>& sequence) {
    return std::min(static_cast<int64_t>(sequence.size()), asked == LogitsRows::kAll ? INT64_MAX : 1);
  };
  int64_t rows = 0;
  for (const std::vector<int32_t>& sequence : tokens) rows += rows_of(sequence);
  py::array all = new_array(DType::kF32, {rows, model.config().outputs()}, "logits");
  float* data = float_data(all);
  without_gil([&] { sequence_logits(model, tokens, shared(adapters), asked, data); });

  py::list result;  // slices of one array, in the order of the sequences
  int64_t begin = 0;
  for (const std::vector<int32_t>& sequence : tokens) {
    const int64_t end = begin + rows_of(sequence);
    result.append(all[py::slice(begin, end, 1)]);
    begin = end;
  }
  return result;
}

py::tuple score_tokens(const ModelPtr& model, const py::object& tokens, int64_t first, const py::object& advance,
                       const std::shared_ptr<Adapter>& adapter, const std::string& kv_dtype) {
  const std::vector<int32_t> ids = token_ids(tokens, "score", "tokens");
  const DType kept = kv_dtype_from_name(kv_dtype);
  std::function<void(int64_t)> tell;
  if (!advance.is_none()) {
    tell = [&](int64_t scored) {
      const py::gil_scoped_acquire acquire;
      advance(scored);
    };
  }
  const std::vector<Score> scores = without_gil([&] { return score(model, ids, first, tell, adapter, kept); });
  const py::ssize_t count = static_cast<py::ssize_t>(scores.size());
  py::array_t<float> logprobs(count);
  py::array_t<bool> greedy(count);
  for (py::ssize_t i = 0; i < count; ++i) {
    logprobs.mutable_at(i) = scores[static_cast<size_t>(i)].logprob;
    greedy.mutable_at(i) = scores[static_cast<size_t>(i)].is_greedy;
  }
  return py::make_tuple(logprobs, greedy);
}

py::list search(const ModelPtr& model, const py::object& prompt, int64_t beams, int64_t returned,
                int64_t max_new_tokens, double length_penalty, bool early_stopping, const std::vector<int32_t>& eos,
                const std::string& kv_dtype, const std::shared_ptr<Adapter>& adapter) {
  const std::vector<int32_t> ids = token_ids(prompt, "beam_search", "prompt");
  const BeamSearchOptions options{.beams = beams,
                                  .returned = returned,
                                  .max_new_tokens = max_new_tokens,
                                  .length_penalty = length_penalty,
                                  .early_stopping = early_stopping,
                                  .eos = eos,
                                  .kv_dtype = kv_dtype_from_name(kv_dtype),
                                  .adapter = adapter};
  const std::vector<BeamHypothesis> found = without_gil([&] { return beam_search(model, ids, options); });
  py::list list;
  for (const BeamHypothesis& hypothesis : found) {
    list.append(py::make_tuple(hypothesis.tokens, hypothesis.score, hypothesis.finished));
  }
  return list;
}

}  // namespace

LogitsRows logits_rows_from_name(const std::string& rows, std::string_view op) {
  require(rows == "all" || rows == "last", ErrorKind::kOption, op, ": rows must be 'all' or 'last', got '", rows, "'");
  return rows == "all" ? LogitsRows::kAll : LogitsRows::kLast;
}

void bind_model(py::module_& module) {
  py::class_<Model, ModelPtr> cls(module, "Model");
  bind_adapter(module);  // each names the other in its signatures
  bind_observed(module, cls);
  cls.def(py::init(&make_model), py::arg("backend"), py::arg("config"), py::arg("types"),
          py::arg("packed") = py::dict(), py::arg("compute") = "auto")
      .def_property_readonly("backend", &Model::shared_backend)
      .def_property_readonly("dtype",
                             [](const Model& m) { return std::string(info_of(m.weights().type().encoding).name); })
      .def_property_readonly("nbytes", [](const Model& m) { return m.weights().nbytes(); })
      .def_property_readonly("separate_gate_up", [](const Model& m) { return m.weights().has_separate_gate_up(); })
      .def("converted", &converted, py::arg("types"), py::arg("separate_gate_up"))
      .def("slots", &slots)
      .def("types", &types)
      .def("missing", [](const Model& m) { return m.weights().missing(); })
      .def(
          "copy_from",
          [](Model& m, const Model& source, const std::string& slot) {
            without_gil([&] { m.weights().copy_from(source.weights(), slot); });
          },
          py::arg("source"), py::arg("slot"))
      .def("load", &load, py::arg("slot"), py::arg("source"), py::arg("dtype"), py::arg("importance") = py::none())
      .def("load_blocks", &load_blocks, py::arg("slot"), py::arg("blocks"), py::arg("ggml_type"))
      .def("load_codes", &load_codes, py::arg("slot"), py::arg("codes"), py::arg("scales"),
           py::arg("mins") = py::none())
      .def("matrices", [](const Model& m) { return m.weights().packed_names(); })
      .def("packed", &packed, py::arg("name"))
      .def("read", &read, py::arg("slot"))
      .def("read_codes", &read_codes, py::arg("slot"))
      .def("logits", &logits, py::arg("sequences"), py::arg("adapters") = Adapters{}, py::arg("rows") = "all")
      .def("score", &score_tokens, py::arg("tokens"), py::arg("first"), py::arg("advance") = py::none(),
           py::arg("adapter") = py::none(), py::arg("kv_dtype") = "float32")
      .def("beam_search", &search, py::arg("prompt"), py::kw_only(), py::arg("beams"), py::arg("returned"),
           py::arg("max_new_tokens"), py::arg("length_penalty"), py::arg("early_stopping"), py::arg("eos"),
           py::arg("kv_dtype"), py::arg("adapter") = py::none());

  module.def("type_of_blocks", &type_of_blocks, py::arg("ggml_type"));
  module.def("weight_type", &checked_type, py::arg("encoding"), py::arg("group"));
}

}  // namespace llama_ext
