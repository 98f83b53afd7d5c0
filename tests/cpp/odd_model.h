// A small model of awkward sizes, and an adapter for it.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "model/adapter.h"
#include "model/transformer.h"
#include "training_inputs.h"

namespace llama_ext::test {

inline ModelConfig odd_config(int64_t labels) {
  ModelConfig config;
  config.vocabulary = 43;
  config.width = 36;
  config.ffn_width = 50;
  config.layers = 2;
  config.heads = 6;
  config.kv_heads = 2;
  config.head_dim = 10;
  config.context = 70;
  config.tied_head = labels == 0;
  config.attention_bias = true;
  config.ffn_bias = true;
  config.labels = labels;
  config.rope.head_dim = 10;
  return config;
}

inline std::shared_ptr<Model> make_model(std::shared_ptr<Backend> backend, int64_t labels,
                                         bool separate_gate_up = true) {
  WeightPlan plan{.others = WeightType{Encoding::kF32}, .by_slot = {}, .separate_gate_up = separate_gate_up};
  auto model = std::make_shared<Model>(std::move(backend), odd_config(labels), plan, PackedWeights(), Compute::kAuto);
  uint64_t seed = 0;
  for (const Weights::Slot& slot : model->weights().slots()) {
    int64_t size = 1;
    for (const int64_t extent : slot.shape) size *= extent;
    std::vector<float> values = Numbers(++seed).vector(size);
    if (!slot.is_matrix && slot.name.find("norm") != std::string::npos) {
      for (float& value : values) value = 1.0f + value / 10.0f;
    }
    const TensorView view = slot.shape.size() == 1
                                ? TensorView(values.data(), DType::kF32, {slot.shape[0]})
                                : TensorView(values.data(), DType::kF32, {slot.shape[0], slot.shape[1]});
    model->weights().load(slot.name, view, {});
  }
  return model;
}

inline std::shared_ptr<Adapter> make_adapter(const Model& model) {
  auto adapter = std::make_shared<Adapter>(model.shared_backend(), model.config(),
                                           std::map<std::string, Adapter::Shape>{{"layers.0.q", {3, 0.5}},
                                                                                 {"layers.0.down", {2, 2.0}},
                                                                                 {"layers.1.v", {4, 1.0}},
                                                                                 {"layers.1.gate", {1, 1.0}}});
  uint64_t seed = 100;
  for (const Adapter::Entry& entry : adapter->entries()) {
    for (Matrix* matrix : {entry.part->a.get(), entry.part->b.get()}) {
      std::vector<float> values = Numbers(++seed).vector(matrix->rows() * matrix->cols());
      model.backend().write_rows(*matrix, {}, {values.data(), DType::kF32, {matrix->rows(), matrix->cols()}}, {});
    }
  }
  return adapter;
}

}  // namespace llama_ext::test
