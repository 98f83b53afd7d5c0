// A sequence that is looked at, once or many times.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "model/observer.h"
#include "model/transformer.h"

namespace llama_ext {

/// Runs a sequence whole, and then again from inside: from a layer and a token on, before which nothing that an observer changes there can
/// reach. On a CPU a row has forward()'s bits, wherever a run begins and whatever runs beside it. A GPU's kernels depend on how many rows a
/// pass has: there a single copy from token 0 on has the bits of run(). Not for use by two threads at once.
class ObservedSequence {
 public:
  /// tokens: at least one. adapter: none, or one of the model's shapes. layers: where later runs are to begin, each in [0, the model's).
  /// The model and the adapter outlive it. Throws OptionError, ContextLengthError, LimitError.
  ObservedSequence(const Model& model, std::vector<int32_t> tokens, const Adapter* adapter,
                   std::vector<int64_t> layers);

  int64_t count() const { return static_cast<int64_t>(tokens_.size()); }
  /// Bytes of the keys and values of one copy.
  int64_t copy_nbytes() const { return model_.backend().kv_cache_nbytes(shape_); }

  /// Everything, with the observer. What it leaves is what later runs begin with.
  /// logits: (rows asked for, V; a classifier's labels). Throws as forward(), OutOfMemoryError, LimitError, and what the observer throws.
  void run(Observer& observer, LogitsRows rows, float* logits);

  /// Copies of the sequence side by side: one for each of `begins`, from that token in [0, count()) on, and from `layer` on, which was named
  /// at first. A site shows the copies' rows one copy after the other, count() - begin of each; kFinalNorm those whose logits are asked for.
  /// logits: those of the copies, in the same order. Throws as run(), and OptionError for a layer that was not named, or before a run
  /// has ended well.
  void run_from(int64_t layer, const std::vector<int64_t>& begins, Observer& observer, LogitsRows rows, float* logits);

 private:
  Chunk chunk(KvCache& cache, int64_t begin, LogitsRows rows) const;
  void require_memory(int64_t rows, int64_t caches, int64_t floats) const;
  void make_memory();

  const Model& model_;
  std::vector<int32_t> tokens_;
  const Adapter* adapter_;
  std::vector<int64_t> layers_;
  KvCacheShape shape_;
  int64_t input_floats_ = 0;
  std::unique_ptr<Buffer> memory_;  // of inputs_
  // By layer: (count, C) of those that were named. Layer 0 reads the embedding, which is made anew.
  std::vector<TensorView> inputs_;
  std::unique_ptr<KvCache> cache_;  // as run() left it
  bool has_run_ = false;
  std::vector<std::unique_ptr<KvCache>> copies_;
};

}  // namespace llama_ext
