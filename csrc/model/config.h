// The numbers that define a Llama. Names of the fields follow the papers; Python maps a checkpoint's config to them.
#pragma once

#include <cstdint>
#include <string_view>

#include "ops/rope.h"

namespace llama_ext {

struct ModelConfig {
  int64_t vocabulary = 0;  // V
  int64_t width = 0;       // C
  int64_t ffn_width = 0;   // F
  int64_t layers = 0;
  int64_t heads = 0;     // H
  int64_t kv_heads = 0;  // K, divides H
  int64_t head_dim = 0;  // D, even
  int64_t context = 0;   // positions the model was made for
  double norm_eps = 1e-6;
  bool tied_head = false;  // the embedding table is also the output head
  bool attention_bias = false;
  bool ffn_bias = false;
  int64_t labels = 0;  // of a sequence classifier; 0: a language model
  RopeConfig rope;

  /// Rows of the head: what there are logits of.
  int64_t outputs() const { return labels > 0 ? labels : vocabulary; }
  int64_t q_size() const { return heads * head_dim; }
  int64_t kv_size() const { return kv_heads * head_dim; }
  int64_t qkv_size() const { return q_size() + 2 * kv_size(); }
};

/// Throws OptionError, naming the field, unless every number is in range and they fit together.
void check(const ModelConfig& config);
/// Throws UnsupportedError for a classifier.
void require_language_model(const ModelConfig& config, std::string_view op);

}  // namespace llama_ext
