#include "train/workspace.h"

#include <algorithm>

#include "core/checked.h"

namespace llama_ext {
namespace {

// Logits are made for so many rows at a time that they take 64 MiB at most, but never for fewer than these. A device with memory of
// its own has more of it, and reads the head's weights for each of those parts: 1 GiB, in whole tiles of a product.
constexpr int64_t kLogitsHeld = int64_t{1} << 24;
constexpr int64_t kLogitsHeldOnDevice = int64_t{1} << 28;
constexpr int64_t kLeastLogitsRows = 64;
constexpr int64_t kLogitsTile = 128;

int64_t logits_rows_of(const Backend& backend, int64_t head_rows, int64_t outputs) {
  const int64_t held = backend.shares_host_memory() ? kLogitsHeld : kLogitsHeldOnDevice;
  int64_t rows = std::max(held / outputs, kLeastLogitsRows);
  if (!backend.shares_host_memory() && rows > kLogitsTile) rows -= rows % kLogitsTile;
  return std::min(head_rows, rows);
}

constexpr int64_t kRegionFloats = 64;

}  // namespace

TrainingWorkspace::TrainingWorkspace(Backend& backend, const Model& model, const Adapter* adapter,
                                     const TrainerOptions& options, const Size& size)
    : size_(size) {
  const ModelConfig& config = model.config();
  const int64_t rows = size.rows;
  const bool keeps_all = size.trains && !options.checkpoint_activations;
  saved_.resize(static_cast<size_t>(config.layers));
  const bool drops = size.trains && options.dropout.residual > 0.0;
  const bool drops_inputs = size.trains && adapter != nullptr && options.dropout.adapter > 0.0;
  const int64_t rank = adapter == nullptr ? 0 : adapter->rank();
  const int64_t widest = std::max({config.width, config.ffn_width, config.q_size()});
  logits_rows_ = logits_rows_of(backend, size.head_rows, config.outputs());

  add(x_out_, rows, config.width);
  for (size_t i = 0; i < saved_.size(); ++i) {
    Saved& saved = saved_[i];
    if (i == 0 || size.trains) add(saved.x, rows, config.width);
    if (i > 0 && !keeps_all) continue;
    add(saved.qkv, rows, config.qkv_size());
    add(saved.log_sums, rows, config.heads);
    add(saved.attended, rows, config.q_size());
    add(saved.middle, rows, config.width);
    add(saved.gate, rows, config.ffn_width);
    add(saved.up, rows, config.ffn_width);
  }
  const int64_t backward_rows = size.trains ? rows : 0;
  add(scratch_.normed, rows, config.width);
  add(scratch_.wide, rows, config.ffn_width);
  add(scratch_.d_normed, backward_rows, config.width);
  add(scratch_.d_wide, backward_rows, config.ffn_width);
  add(scratch_.d_heads, backward_rows, config.q_size());
  add(scratch_.branch, drops ? rows : 0, config.width);
  add(scratch_.low_rank, rank > 0 ? rows : 0, rank);
  add(scratch_.d_low_rank, rank > 0 ? backward_rows : 0, rank);
  add(scratch_.dropped, drops_inputs ? rows : 0, widest);
  add(scratch_.d_dropped, drops_inputs ? rows : 0, widest);
  add(d_, backward_rows, config.width);
  const int64_t deferred_rows = size.parts > 0 ? backward_rows : 0;
  for (TensorView* each : {&deferred_.d_out, &deferred_.d_middle, &deferred_.attention_normed, &deferred_.ffn_normed}) {
    add(*each, deferred_rows, config.width);
  }
  add(deferred_.wide, deferred_rows, config.ffn_width);
  add(deferred_.d_attention_norm, size.parts, config.width);
  add(deferred_.d_ffn_norm, size.parts, config.width);
  add(cos_, rows, config.head_dim / 2);
  add(sin_, rows, config.head_dim / 2);
  add(head_x_, size.head_rows, config.width);
  add(d_head_x_, size.trains ? logits_rows_ : 0, config.width);
  add(logits_, logits_rows_, config.outputs());
  add(losses_, size.head_rows, 1);
  add(hits_, size.head_rows, 1);

  backend.require_memory(checked_mul(floats_, sizeof(float), "train"), "train: the activations of a pass");
  memory_ = backend.allocate(static_cast<size_t>(checked_mul(floats_, sizeof(float), "train")));
  auto* base = static_cast<float*>(memory_->data());
  for (const auto& [view, offset, shape] : regions_) {
    *view = TensorView(base + offset, DType::kF32, {shape.first, shape.second});
  }
  for (size_t i = 1; i < saved_.size(); ++i) {
    if (keeps_all) break;
    const TensorView x = size.trains ? saved_[i].x : saved_[0].x;
    saved_[i] = saved_[0];
    saved_[i].x = x;
  }
}

void TrainingWorkspace::add(TensorView& view, int64_t rows, int64_t width) {
  regions_.push_back({&view, floats_, {rows, width}});
  floats_ = checked_add(floats_, round_up(checked_mul(rows, width, "train"), kRegionFloats), "train");
}

}  // namespace llama_ext
