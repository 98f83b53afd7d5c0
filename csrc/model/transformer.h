// Llama, written once against Backend: no device, instruction set or dtype appears here.
#pragma once

#include <memory>
#include <vector>

#include "backend/backend.h"
#include "model/adapter.h"
#include "model/config.h"
#include "model/rope_table.h"
#include "model/weights.h"

namespace llama_ext {

class Observation;

/// Immutable once its weights are loaded, so any number of threads and sessions share one.
class Model {
 public:
  Model(std::shared_ptr<Backend> backend, const ModelConfig& config, const WeightPlan& plan,
        const PackedWeights& packed, Compute compute);

  Backend& backend() const { return *backend_; }
  const std::shared_ptr<Backend>& shared_backend() const { return backend_; }
  const ModelConfig& config() const { return config_; }
  Weights& weights() { return weights_; }
  const Weights& weights() const { return weights_; }
  Compute compute() const { return compute_; }
  const std::vector<double>& inverse_frequencies() const { return angles_.inverse_frequencies(); }
  const RopeTable& angles() const { return angles_; }
  /// The shape of a KV cache for this model. capacity: positions, in [1, context]. Throws ContextLengthError.
  KvCacheShape kv_shape(int64_t capacity, DType dtype) const;

 private:
  std::shared_ptr<Backend> backend_;
  ModelConfig config_;
  Compute compute_;
  RopeTable angles_;
  Weights weights_;
};

/// A copy of a model whose weights are kept as `plan` says. Throws OutOfMemoryError.
std::shared_ptr<Model> convert(const Model& model, const WeightPlan& plan);

/// Which rows of a chunk to compute logits for.
enum class LogitsRows : uint8_t { kNone, kLast, kAll };

/// `count` new tokens of one sequence, at positions [position, position + count) of its cache.
struct Chunk {
  KvCache* cache = nullptr;
  int64_t position = 0;
  const int32_t* tokens = nullptr;
  int64_t count = 0;
  LogitsRows logits = LogitsRows::kLast;
  const Adapter* adapter = nullptr;  // of the model's shapes; needs a model with separate gate and up
};

/// Runs the model over a ragged batch and fills the caches. Chunks must be of different caches.
/// logits: host memory, (rows asked for, V; a classifier's labels) f32 row-major: the chunks' rows in order; may be nullptr when none are
/// asked. A row's bits depend on its own sequence alone. Long batches run in passes of at most the backend's pass_rows().
/// Throws TokenIdError, ContextLengthError, NumericError (a logit that is not finite), Interrupted. After a throw the
/// positions written are undefined, everything before `position` is intact.
void forward(const Model& model, const std::vector<Chunk>& chunks, float* logits);

/// A pass that is looked at (observed_sequence.h), and may begin at a later layer than the first.
struct ObservedPass {
  Observation* observation = nullptr;
  int64_t first_layer = 0;
  /// (positions, C) f32 on the device, by position: what `first_layer` reads. At layer 0 unused: the embedding is.
  TensorView input = {};
  /// By layer, empty or (rows, C) f32 on the device: gets what that layer reads.
  std::vector<TensorView> inputs = {};
};

/// The same as one pass, whatever its length, so that each site shows all rows together: the chunks', in order. kFinalNorm shows those whose
/// logits are asked for.
void forward(const Model& model, const std::vector<Chunk>& chunks, const ObservedPass& observed, float* logits);

/// Rows of logits that `chunks` ask for.
int64_t logits_rows(const std::vector<Chunk>& chunks);

}  // namespace llama_ext
