// One model in training: gradients of ragged batches, and steps of an optimiser.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "train/block_training.h"
#include "train/optimizer.h"
#include "train/pass_parts.h"

namespace llama_ext {

struct TrainerOptions {
  OptimizerOptions optimizer;
  Trainable trainable;
  Compute compute = Compute::kExact;    // or kBF16
  bool checkpoint_activations = false;  // keep only what enters a block, and compute the rest once more in backward
  DropoutRates dropout;
};

/// Sequences one after another. tokens, labels: as many; labels[t] is what position t is to predict, or kIgnoreLabel: already
/// shifted. lengths: of the sequences, with the number of tokens as their sum. A sequence starts at position 0 and sees only itself.
struct TrainingBatch {
  std::span<const int32_t> tokens;
  std::span<const int32_t> labels;
  std::span<const int64_t> lengths;
};

struct LossSum {
  double loss = 0.0;    // nats, summed over the counted labels
  int64_t counted = 0;  // labels that are not kIgnoreLabel
  int64_t correct = 0;  // of which the most likely one; only evaluate() counts them
};

class TrainingWorkspace;

/// Whoever trains a model must not use it in another thread at that time. The model needs separate gate and up matrices.
class Trainer {
 public:
  /// adapter: is trained, and the model's own weights are not, unless `trainable` names some; none: the weights are.
  /// Throws OptionError, DTypeError, UnsupportedError, OutOfMemoryError.
  Trainer(std::shared_ptr<Model> model, std::shared_ptr<Adapter> adapter, const TrainerOptions& options);
  ~Trainer();

  /// Adds the gradient of scale * (sum of losses). Batches are cut at the ends of sequences into passes of about pass_tokens()
  /// tokens, so memory does not grow with the batch. Deterministic, and the same for any number of threads.
  /// Throws ShapeError, TokenIdError, ContextLengthError, NumericError (a loss that is not finite), Interrupted; after a throw the
  /// gradients are undefined until zero_gradients().
  LossSum accumulate(const TrainingBatch& batch, double scale, uint64_t seed);
  /// The loss alone, without dropout.
  LossSum evaluate(const TrainingBatch& batch);

  double gradient_norm() const { return parameters_.gradient_norm(); }
  /// One step with gradient_scale * gradients, which are zero then, also after a throw. Throws NumericError and Interrupted (with
  /// muon, whose velocities may have moved then) before a weight is changed; OptionError.
  void step(double lr, double gradient_scale);
  void zero_gradients() { parameters_.zero_gradients(); }

  int64_t steps() const { return steps_; }
  void set_steps(int64_t steps);
  Parameters& parameters() { return parameters_; }
  const OptimizerOptions& optimizer() const { return options_.optimizer; }
  /// Of gradients, moments, what the optimiser needs besides, and the activations of the largest pass so far.
  int64_t nbytes() const;

  /// Tokens of a pass, about: a function of the model's shape and of the kind of device, so that the same batch is cut alike.
  int64_t pass_tokens() const;

 private:
  LossSum run(const TrainingBatch& batch, bool trains, double scale, uint64_t seed);
  LossSum run_pass(const TrainingBatch& batch, bool trains, double scale, uint64_t seed);
  void set_angles(const TrainingPass& pass);
  LossSum head(const TrainingPass& pass, const TrainingBatch& batch, const TensorView& x, bool trains, double scale,
               const TensorView& d);
  void read_losses(LossSum& sum, bool has_hits);

  std::shared_ptr<Model> model_;
  std::shared_ptr<Adapter> adapter_;
  TrainerOptions options_;
  Parameters parameters_;
  std::unique_ptr<Muon> muon_;  // for its steps
  bool goes_in_parts_;          // where there are enough (pass_parts.h)
  Transposed transposed_;       // for those: the weights of this batch, once they are
  bool is_transposed_ = false;
  std::unique_ptr<TrainingWorkspace> workspace_;
  // What operations read of a pass until it is over.
  std::vector<int32_t> labels_;
  std::vector<float> cos_;  // of positions from 0 on, (n, D/2); and for the rows of a pass
  std::vector<float> sin_;
  std::vector<float> pass_cos_;
  std::vector<float> pass_sin_;
  int64_t steps_ = 0;
};

}  // namespace llama_ext
