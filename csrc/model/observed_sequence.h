// A sequence that is looked at, once or many times.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "model/observer.h"
#include "model/transformer.h"

namespace llama_ext {

/// Runs a sequence whole, and then again from inside: from a layer and a token on, before which nothing that an observer changes there can
/// reach. On a CPU the bits are forward()'s, wherever a run begins; on a GPU, whose kernels depend on a pass's rows, those of a run with as
/// many rows, of up to pass_rows(). Not for use by two threads at once.
class ObservedSequence {
 public:
  /// tokens: at least one. adapter: none, or one of the model's shapes. layers: where later runs are to begin, each in [0, the model's).
  /// The model and the adapter outlive it. Throws OptionError, ContextLengthError, OutOfMemoryError.
  ObservedSequence(const Model& model, std::vector<int32_t> tokens, const Adapter* adapter,
                   const std::vector<int64_t>& layers);

  const Model& model() const { return model_; }
  int64_t count() const { return static_cast<int64_t>(tokens_.size()); }

  /// Everything, with the observer. What it leaves is what later runs begin with.
  /// logits: (rows asked for, V; a classifier's labels). Throws as forward(), OutOfMemoryError, and what the observer throws.
  void run(Observer& observer, LogitsRows rows, float* logits);

  /// Copies of the sequence side by side, each from its own token of `begins` on, from `layer` on: it was named when this was made. A site
  /// shows the copies' rows one after the other, count() - begin of each; kFinalNorm those whose logits are asked for. They end as in run().
  /// begins: in [0, count()). Throws as run(), and OptionError for a layer that was not named or before there was a run.
  void run_from(int64_t layer, const std::vector<int64_t>& begins, Observer& observer, LogitsRows rows, float* logits);

 private:
  Chunk chunk(KvCache& cache, int64_t begin, LogitsRows rows) const;
  void require_memory(int64_t rows, int64_t caches) const;

  const Model& model_;
  std::vector<int32_t> tokens_;
  const Adapter* adapter_;
  KvCacheShape shape_;
  std::unique_ptr<Buffer> memory_;  // of inputs_
  std::vector<TensorView> inputs_;  // by layer: (count, C) of those that were named
  std::unique_ptr<KvCache> cache_;  // as run() left it
  bool has_run_ = false;
  std::vector<std::unique_ptr<KvCache>> copies_;
};

}  // namespace llama_ext
