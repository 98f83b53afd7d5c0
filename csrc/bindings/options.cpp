// Words and dicts of options to the core's structs.
#include <algorithm>
#include <map>

#include "bindings/bindings.h"

namespace llama_ext {

Compute compute_from_name(std::string_view name) {
  if (name == "auto") return Compute::kAuto;
  if (name == "exact") return Compute::kExact;
  if (name == "bfloat16") return Compute::kBF16;
  fail(ErrorKind::kOption, "compute must be 'auto', 'exact' or 'bfloat16', got '", name, "'");
}

DType kv_dtype_from_name(std::string_view name) {
  for (const DType dtype : {DType::kF32, DType::kBF16, DType::kI8}) {
    if (name == name_of(dtype)) return dtype;
  }
  fail(ErrorKind::kDType, "KV cache: dtype must be float32, bfloat16 or int8, got '", name, "'");
}

void Fields::finish() const {
  for (const auto& [key, value] : dict_) {
    const std::string name = py::str(key);
    if (std::find(names_.begin(), names_.end(), name) != names_.end()) continue;
    std::string known;
    for (const std::string& each : names_) known += (known.empty() ? "" : ", ") + each;
    fail(ErrorKind::kOption, what_, ": unknown option '", name, "'; known: ", known);
  }
}

SamplingOptions sampling_from_dict(const py::dict& dict) {
  SamplingOptions options;
  Fields fields(dict, "sampling");
  fields.read("temperature", options.temperature);
  fields.read("top_k", options.top_k);
  fields.read("top_p", options.top_p);
  fields.read("min_p", options.min_p);
  fields.read("repetition_penalty", options.repetition_penalty);
  fields.read("presence_penalty", options.presence_penalty);
  fields.read("frequency_penalty", options.frequency_penalty);
  std::map<int32_t, float> logit_bias;
  fields.read("logit_bias", logit_bias);
  options.logit_bias.assign(logit_bias.begin(), logit_bias.end());
  fields.finish();
  return options;
}

RopeConfig rope_from_dict(const py::dict& dict, int64_t default_head_dim) {
  RopeConfig rope;
  rope.head_dim = default_head_dim;
  std::string kind = "default";
  Fields fields(dict, "rope");
  fields.read("kind", kind);
  fields.read("head_dim", rope.head_dim);
  fields.read("theta", rope.theta);
  fields.read("factor", rope.factor);
  fields.read("low_freq_factor", rope.low_freq_factor);
  fields.read("high_freq_factor", rope.high_freq_factor);
  fields.read("original_context", rope.original_context);
  fields.read("attention_factor", rope.attention_factor);
  fields.read("beta_fast", rope.beta_fast);
  fields.read("beta_slow", rope.beta_slow);
  fields.read("truncate", rope.truncate);
  fields.finish();
  if (kind == "default") {
    rope.kind = RopeKind::kDefault;
  } else if (kind == "linear") {
    rope.kind = RopeKind::kLinear;
  } else if (kind == "llama3") {
    rope.kind = RopeKind::kLlama3;
  } else if (kind == "yarn") {
    rope.kind = RopeKind::kYarn;
  } else {
    fail(ErrorKind::kOption, "rope: kind must be default, linear, llama3 or yarn, got '", kind, "'");
  }
  return rope;
}

}  // namespace llama_ext
