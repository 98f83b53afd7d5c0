#include "model/config.h"

#include <cmath>
#include <cstdint>
#include <string_view>

#include "core/errors.h"

namespace llama_ext {
namespace {

// Far above any model there is, and low enough that no product of two of them wraps. A loader may have lower limits.
constexpr int64_t kMaxLayers = 1024;
constexpr int64_t kMaxVocabulary = int64_t{1} << 20;
constexpr int64_t kMaxWidth = 131072;
constexpr int64_t kMaxFfnWidth = int64_t{1} << 20;
constexpr int64_t kMaxProjection = int64_t{1} << 20;
constexpr int64_t kMaxContext = INT32_MAX;

void check_range(std::string_view field, int64_t value, int64_t most) {
  require(value >= 1 && value <= most, ErrorKind::kOption, "config: ", field, " must be in [1, ", most, "], got ",
          value);
}

}  // namespace

void check(const ModelConfig& config) {
  check_range("vocabulary", config.vocabulary, kMaxVocabulary);
  check_range("width", config.width, kMaxWidth);
  check_range("ffn_width", config.ffn_width, kMaxFfnWidth);
  check_range("layers", config.layers, kMaxLayers);
  check_range("heads", config.heads, kMaxWidth);
  check_range("kv_heads", config.kv_heads, config.heads);
  check_range("head_dim", config.head_dim, kMaxWidth);
  check_range("context", config.context, kMaxContext);
  require(config.heads % config.kv_heads == 0, ErrorKind::kOption, "config: heads (", config.heads,
          ") must be a multiple of kv_heads (", config.kv_heads, ")");
  require(config.head_dim % 2 == 0, ErrorKind::kOption,
          "config: head_dim must be even (rotary embeddings turn pairs), got ", config.head_dim);
  require(config.q_size() <= kMaxProjection, ErrorKind::kOption, "config: heads x head_dim must be at most ",
          kMaxProjection, ", got ", config.heads, " x ", config.head_dim);
  require(config.labels >= 0 && config.labels <= kMaxVocabulary, ErrorKind::kOption, "config: labels must be in [0, ",
          kMaxVocabulary, "], got ", config.labels);
  require(config.labels == 0 || !config.tied_head, ErrorKind::kOption,
          "config: a classifier's head cannot be tied to the embedding");
  require(std::isfinite(config.norm_eps) && config.norm_eps > 0, ErrorKind::kOption,
          "config: norm_eps must be positive and finite, got ", config.norm_eps);
  require(config.rope.head_dim == config.head_dim, ErrorKind::kOption, "config: rope.head_dim must be head_dim (",
          config.head_dim, "), got ", config.rope.head_dim);
}

void require_language_model(const ModelConfig& config, std::string_view op) {
  require(config.labels == 0, ErrorKind::kUnsupported, op, ": this model is a classifier of ", config.labels,
          " labels, not a language model");
}

}  // namespace llama_ext
