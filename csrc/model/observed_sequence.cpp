#include "model/observed_sequence.h"

#include <algorithm>
#include <utility>

#include "core/checked.h"
#include "model/workspace.h"

namespace llama_ext {

ObservedSequence::ObservedSequence(const Model& model, std::vector<int32_t> tokens, const Adapter* adapter,
                                   const std::vector<int64_t>& layers)
    : model_(model),
      tokens_(std::move(tokens)),
      adapter_(adapter),
      inputs_(layers.empty() ? 0 : static_cast<size_t>(model.config().layers)) {
  require(!tokens_.empty(), ErrorKind::kOption, "forward: there is nothing to look at without a token");
  shape_ = model.kv_shape(count(), DType::kF32);
  const int64_t row = checked_mul(count(), model.config().width, "forward");
  for (const int64_t layer : layers) {
    require(layer >= 0 && layer < model.config().layers, ErrorKind::kOption, "forward: runs begin at layers 0 to ",
            model.config().layers - 1, ", not at ", layer);
  }
  // Memory of a layer that is named twice is not worth a thought; layer 0 reads the embedding, which costs nothing to make.
  const int64_t nbytes =
      checked_mul(checked_mul(row, static_cast<int64_t>(layers.size()), "forward"), sizeof(float), "forward");
  if (nbytes == 0) return;
  model.backend().require_memory(nbytes, "forward: what the layers of a text read");
  memory_ = model.backend().allocate(static_cast<size_t>(nbytes));
  float* next = static_cast<float*>(memory_->data());
  for (const int64_t layer : layers) {
    inputs_[static_cast<size_t>(layer)] = TensorView(next, DType::kF32, {count(), model.config().width});
    next += row;
  }
}

void ObservedSequence::run(Observer& observer, LogitsRows rows, float* logits) {
  has_run_ = false;
  require_memory(count(), cache_ == nullptr ? 1 : 0);
  if (cache_ == nullptr) cache_ = model_.backend().create_kv_cache(shape_);
  Observation observation(model_.backend(), observer);
  forward(model_, {chunk(*cache_, 0, rows)}, {.observation = &observation, .inputs = inputs_}, logits);
  has_run_ = true;
}

void ObservedSequence::run_from(int64_t layer, const std::vector<int64_t>& begins, Observer& observer, LogitsRows rows,
                                float* logits) {
  require(has_run_, ErrorKind::kOption, "forward: run the whole text first");
  require(layer >= 0 && layer < static_cast<int64_t>(inputs_.size()) &&
              inputs_[static_cast<size_t>(layer)].data() != nullptr,
          ErrorKind::kOption, "forward: what layer ", layer, " reads was not kept: name it at first");
  int64_t all = 0;
  for (const int64_t begin : begins) {
    require(begin >= 0 && begin < count(), ErrorKind::kOption, "forward: a copy begins at token 0 to ", count() - 1,
            ", not at ", begin);
    all = checked_add(all, count() - begin, "forward");
  }
  const auto copies = static_cast<int64_t>(begins.size());
  require_memory(all, std::max<int64_t>(0, copies - static_cast<int64_t>(copies_.size())));
  std::vector<Chunk> chunks;
  chunks.reserve(begins.size());
  for (size_t i = 0; i < begins.size(); ++i) {
    if (i == copies_.size()) copies_.push_back(model_.backend().create_kv_cache(shape_));
    model_.backend().copy_kv_cache(*copies_[i], *cache_, begins[i]);
    chunks.push_back(chunk(*copies_[i], begins[i], rows));
  }
  Observation observation(model_.backend(), observer);
  forward(model_, chunks,
          {.observation = &observation, .first_layer = layer, .input = inputs_[static_cast<size_t>(layer)]}, logits);
}

Chunk ObservedSequence::chunk(KvCache& cache, int64_t begin, LogitsRows rows) const {
  return {.cache = &cache,
          .position = begin,
          .tokens = tokens_.data() + begin,
          .count = count() - begin,
          .logits = rows,
          .adapter = adapter_};
}

/// Of a pass and new caches at once, as each alone might still seem to fit.
void ObservedSequence::require_memory(int64_t rows, int64_t caches) const {
  const WorkspaceSize size{.rows = rows,
                           .head_rows = std::min(rows, kHeadRows),
                           .angles = rows,
                           .rank = adapter_ == nullptr ? 0 : adapter_->rank(),
                           .is_observed = true};
  model_.backend().require_memory(checked_add(checked_mul(caches, model_.backend().kv_cache_nbytes(shape_), "forward"),
                                              workspace_nbytes(model_, size), "forward"),
                                  "forward: the activations of a text in one pass");
}

}  // namespace llama_ext
