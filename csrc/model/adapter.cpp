#include "model/adapter.h"

#include <algorithm>
#include <cmath>
#include <string_view>

#include "model/scaled.h"

namespace llama_ext {
namespace {

constexpr std::array<std::string_view, kTargetCount> kTargetNames = {"q", "k", "v", "o", "gate", "up", "down"};

struct Extents {
  int64_t outputs;
  int64_t inputs;
};

Extents extents(const ModelConfig& config, Target target) {
  switch (target) {
    case Target::kQ:
      return {config.q_size(), config.width};
    case Target::kK:
    case Target::kV:
      return {config.kv_size(), config.width};
    case Target::kO:
      return {config.width, config.q_size()};
    case Target::kGate:
    case Target::kUp:
      return {config.ffn_width, config.width};
    case Target::kDown:
      break;
  }
  return {config.width, config.ffn_width};
}

}  // namespace

Adapter::Adapter(std::shared_ptr<Backend> backend, const ModelConfig& config,
                 const std::map<std::string, Shape>& targets)
    : backend_(std::move(backend)), config_(config) {
  layers_.resize(static_cast<size_t>(config.layers));
  size_t found = 0;
  for (int64_t layer = 0; layer < config.layers; ++layer) {
    for (int index = 0; index < kTargetCount; ++index) {
      const std::string slot = cat("layers.", layer, ".", kTargetNames[static_cast<size_t>(index)]);
      const auto wanted = targets.find(slot);
      if (wanted == targets.end()) continue;
      ++found;
      const auto [outputs, inputs] = extents(config, static_cast<Target>(index));
      const auto [rank, scale] = wanted->second;
      require(rank >= 1 && rank <= std::max(outputs, inputs), ErrorKind::kOption, "adapter: the rank of '", slot,
              "' must be in [1, ", std::max(outputs, inputs), "], got ", rank);
      require(std::isfinite(scale), ErrorKind::kOption, "adapter: the scale of '", slot, "' must be finite, got ",
              scale);
      LowRank& part = layers_[static_cast<size_t>(layer)][static_cast<size_t>(index)];
      part.a = backend_->create_matrix(rank, inputs, WeightType{Encoding::kF32});
      part.b = backend_->create_matrix(outputs, rank, WeightType{Encoding::kF32});
      part.scale = scale;
      rank_ = std::max(rank_, rank);
      entries_.push_back({slot, &part});
    }
  }
  if (found == targets.size()) return;
  for (const auto& [slot, shape] : targets) {
    // By a name of its own: Clang before 16 captures no structured binding.
    const auto is_it = [&name = slot](const Entry& each) { return each.slot == name; };
    require(std::any_of(entries_.begin(), entries_.end(), is_it), ErrorKind::kOption, "adapter: '", slot,
            "' is no matrix of a block of this model. An adapter adds to "
            "layers.{i}.q, k, v, o, gate, up and down");
  }
}

LowRank& Adapter::find(std::string_view slot) const {
  const auto found =
      std::find_if(entries_.begin(), entries_.end(), [&](const Entry& each) { return each.slot == slot; });
  require(found != entries_.end(), ErrorKind::kCheckpoint, "adapter: it adds nothing to '", slot, "'");
  return *found->part;
}

int64_t Adapter::nbytes() const {
  int64_t total = 0;
  for (const Entry& each : entries_) total += each.part->a->nbytes() + each.part->b->nbytes();
  return total;
}

void Adapter::require_fits(const ModelConfig& config) const {
  bool fits = config.layers == config_.layers;
  for (int index = 0; fits && index < kTargetCount; ++index) {
    const Extents mine = extents(config_, static_cast<Target>(index));
    const Extents its = extents(config, static_cast<Target>(index));
    fits = mine.inputs == its.inputs && mine.outputs == its.outputs;
  }
  require(fits, ErrorKind::kShape, "adapter: it was made for a model of other shapes");
}

void add_low_rank(Backend& backend, const LowRank& part, const TensorView& x, const TensorView& y,
                  const TensorView& scratch) {
  const TensorView inner(scratch.data(), DType::kF32, {x.rows(), part.a->rows()});
  backend.matmul({.x = x, .weight = part.a.get(), .bias = {}, .y = inner, .compute = Compute::kExact});
  set_scaled(backend, inner, inner, part.scale);
  backend.matmul(
      {.x = inner, .weight = part.b.get(), .bias = {}, .y = y, .accumulate = true, .compute = Compute::kExact});
}

}  // namespace llama_ext
