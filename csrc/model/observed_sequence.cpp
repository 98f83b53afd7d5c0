#include "model/observed_sequence.h"

#include <algorithm>
#include <utility>

#include "core/checked.h"
#include "model/workspace.h"

namespace llama_ext {

ObservedSequence::ObservedSequence(const Model& model, std::vector<int32_t> tokens, const Adapter* adapter,
                                   std::vector<int64_t> layers)
    : model_(model), tokens_(std::move(tokens)), adapter_(adapter), layers_(std::move(layers)) {
  require(!tokens_.empty(), ErrorKind::kOption, "forward: there is nothing to look at without a token");
  shape_ = model.kv_shape(count(), DType::kF32);
  for (const int64_t layer : layers_) {
    require(layer >= 0 && layer < model.config().layers, ErrorKind::kOption, "forward: runs begin at layers 0 to ",
            model.config().layers - 1, ", not at ", layer);
  }
  std::sort(layers_.begin(), layers_.end());
  layers_.erase(std::unique(layers_.begin(), layers_.end()), layers_.end());
  const auto kept = static_cast<int64_t>(layers_.size()) - (!layers_.empty() && layers_.front() == 0 ? 1 : 0);
  input_floats_ = checked_mul(checked_mul(count(), model.config().width, "forward"), kept, "forward");
}

void ObservedSequence::run(Observer& observer, LogitsRows rows, float* logits) {
  if (cache_ == nullptr) make_memory();
  has_run_ = false;
  Observation observation(model_.backend(), observer);
  forward(model_, {chunk(*cache_, 0, rows)}, {.observation = &observation, .inputs = inputs_}, logits);
  has_run_ = true;
}

void ObservedSequence::run_from(int64_t layer, const std::vector<int64_t>& begins, Observer& observer, LogitsRows rows,
                                float* logits) {
  require(has_run_, ErrorKind::kOption, "forward: run the whole text first");
  require(std::binary_search(layers_.begin(), layers_.end(), layer), ErrorKind::kOption, "forward: what layer ", layer,
          " reads was not kept: name it at first");
  int64_t all = 0;
  for (const int64_t begin : begins) {
    require(begin >= 0 && begin < count(), ErrorKind::kOption, "forward: a copy begins at token 0 to ", count() - 1,
            ", not at ", begin);
    all = checked_add(all, count() - begin, "forward");
  }
  // Of those that are there a part may be untouched memory, which nobody counts as taken.
  require_memory(all, static_cast<int64_t>(begins.size()), 0);
  std::vector<Chunk> chunks;
  chunks.reserve(begins.size());
  for (size_t i = 0; i < begins.size(); ++i) {
    if (i == copies_.size()) copies_.push_back(model_.backend().create_kv_cache(shape_));
    model_.backend().copy_kv_cache(*copies_[i], *cache_, begins[i]);
    chunks.push_back(chunk(*copies_[i], begins[i], rows));
  }
  Observation observation(model_.backend(), observer);
  ObservedPass pass{.observation = &observation, .first_layer = layer};
  if (layer > 0) pass.input = inputs_[static_cast<size_t>(layer)];
  forward(model_, chunks, pass, logits);
}

/// What every run needs: the cache, and room for what layers read.
void ObservedSequence::make_memory() {
  require_memory(count(), 1, input_floats_);
  std::vector<TensorView> inputs(input_floats_ == 0 ? 0 : static_cast<size_t>(model_.config().layers));
  if (input_floats_ > 0) {
    memory_ = model_.backend().allocate(static_cast<size_t>(input_floats_) * sizeof(float));
    float* next = static_cast<float*>(memory_->data());
    for (const int64_t layer : layers_) {
      if (layer == 0) continue;
      inputs[static_cast<size_t>(layer)] = TensorView(next, DType::kF32, {count(), model_.config().width});
      next += count() * model_.config().width;
    }
  }
  inputs_ = std::move(inputs);
  cache_ = model_.backend().create_kv_cache(shape_);
}

Chunk ObservedSequence::chunk(KvCache& cache, int64_t begin, LogitsRows rows) const {
  return {.cache = &cache,
          .position = begin,
          .tokens = tokens_.data() + begin,
          .count = count() - begin,
          .logits = rows,
          .adapter = adapter_};
}

/// Of a pass, caches and floats at once, as each alone might still seem to fit.
void ObservedSequence::require_memory(int64_t rows, int64_t caches, int64_t floats) const {
  const WorkspaceSize size{.rows = rows,
                           .head_rows = std::min(rows, kHeadRows),
                           .angles = rows,
                           .rank = adapter_ == nullptr ? 0 : adapter_->rank(),
                           .is_observed = true};
  int64_t nbytes = checked_mul(caches, copy_nbytes(), "forward");
  nbytes = checked_add(nbytes, checked_mul(floats, sizeof(float), "forward"), "forward");
  nbytes = checked_add(nbytes, workspace_nbytes(model_, size), "forward");
  model_.backend().require_memory(nbytes, "forward: the activations of a text in one pass");
}

}  // namespace llama_ext
