// Training of whole models, for the sanitisers to watch: what it computes is proven from Python (tests/train).
#include <cmath>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "check.h"
#include "core/interrupt.h"
#include "cpu/cpu_backend.h"
#include "odd_model.h"
#include "reference/reference_backend.h"
#include "train/trainer.h"
#include "training_inputs.h"

namespace llama_ext::test {
namespace {

struct Data {
  std::vector<int32_t> tokens;
  std::vector<int32_t> labels;
  std::vector<int64_t> lengths = {13, 1, 64, 7};
  TrainingBatch batch() const { return {.tokens = tokens, .labels = labels, .lengths = lengths}; }
};

Data make_data(int64_t labels) {
  Data data;
  for (const int64_t length : data.lengths) {
    for (int64_t i = 0; i < length; ++i) {
      data.tokens.push_back(static_cast<int32_t>((7 * i + length) % 43));
      const int32_t next = static_cast<int32_t>((7 * (i + 1) + length) % 43);
      const bool counts = labels == 0 ? i % 3 != 1 : i + 1 == length;
      data.labels.push_back(!counts ? kIgnoreLabel : labels == 0 ? next : static_cast<int32_t>(length % labels));
    }
  }
  return data;
}

std::vector<float> gradient(Trainer& trainer, const ParameterSlot& slot) {
  int64_t size = 1;
  for (const int64_t extent : slot.shape) size *= extent;
  std::vector<float> values(static_cast<size_t>(size));
  trainer.parameters().read(slot, -1,
                            slot.shape.size() == 1
                                ? TensorView(values.data(), DType::kF32, {slot.shape[0]})
                                : TensorView(values.data(), DType::kF32, {slot.shape[0], slot.shape[1]}));
  return values;
}

/// Some steps with everything that there is; the gradients of the first against the reference's.
void test_steps(int64_t labels, bool adapts, OptimizerKind kind, bool recomputes) {
  const Data data = make_data(labels);
  TrainerOptions options;
  options.optimizer.kind = kind;
  options.optimizer.momentum = kind == OptimizerKind::kSgd ? 0.9 : 0.0;
  options.optimizer.weight_decay = 0.1;
  options.checkpoint_activations = recomputes;
  options.dropout = {.residual = 0.2, .attention = 0.1, .adapter = adapts ? 0.3 : 0.0};
  const auto train = [&](std::shared_ptr<Backend> backend) {
    const std::shared_ptr<Model> model = make_model(std::move(backend), labels);
    return std::make_unique<Trainer>(model, adapts ? make_adapter(*model) : nullptr, options);
  };
  const std::unique_ptr<Trainer> trainer = train(make_cpu_backend(2));
  const std::unique_ptr<Trainer> oracle = train(make_reference_backend());
  const LossSum loss = trainer->accumulate(data.batch(), 0.1, 5);
  const LossSum expected = oracle->accumulate(data.batch(), 0.1, 5);
  CHECK(loss.counted == expected.counted);
  CHECK_NEAR(loss.loss, expected.loss, 1e-4 * std::fabs(expected.loss));
  for (const ParameterSlot& slot : trainer->parameters().slots()) {
    const std::vector<float> found = gradient(*trainer, slot);
    const std::vector<float> wanted = gradient(*oracle, slot);
    double difference = 0.0;
    double size = 0.0;
    for (size_t i = 0; i < found.size(); ++i) {
      difference += std::pow(static_cast<double>(found[i]) - static_cast<double>(wanted[i]), 2);
      size += std::pow(static_cast<double>(wanted[i]), 2);
    }
    CHECK_NEAR(std::sqrt(difference), 0.0, 1e-4 * std::sqrt(size) + 1e-12);
  }
  double last = loss.loss;
  for (uint64_t step = 0; step < 5; ++step) {
    trainer->step(1e-3, std::min(1.0, 1.0 / trainer->gradient_norm()));
    CHECK(trainer->gradient_norm() == 0.0);
    last = trainer->accumulate(data.batch(), 0.1, 5).loss;
  }
  CHECK(trainer->steps() == 5);
  CHECK(last < loss.loss);
  CHECK(trainer->evaluate(data.batch()).counted == loss.counted);
}

void test_a_larger_batch_after_a_smaller_one() {
  Data data = make_data(0);
  Trainer trainer(make_model(make_cpu_backend(2), 0), nullptr, {});
  const std::vector<int64_t> one = {13};
  CHECK(
      trainer
          .evaluate(
              {.tokens = std::span(data.tokens).first(13), .labels = std::span(data.labels).first(13), .lengths = one})
          .counted > 0);
  CHECK(trainer.accumulate(data.batch(), 1.0, 0).counted > 0);
  CHECK(trainer.accumulate({}, 1.0, 0).counted == 0);
}

/// Asks for an end at the asked-th question.
class Stop final : public InterruptHandler {
 public:
  explicit Stop(int asked) : left_(asked) {}
  bool requested() override { return --left_ == 0; }

 private:
  int left_;
};

std::vector<std::vector<float>> weights_of(Trainer& trainer, const Model& model) {
  std::vector<std::vector<float>> all;
  for (const ParameterSlot& slot : trainer.parameters().slots()) {
    const int64_t cols = slot.shape.size() == 2 ? slot.shape[1] : 1;
    std::vector<float>& values = all.emplace_back(static_cast<size_t>(slot.shape[0] * cols));
    const TensorView view = slot.shape.size() == 2 ? TensorView(values.data(), DType::kF32, {slot.shape[0], cols})
                                                   : TensorView(values.data(), DType::kF32, {slot.shape[0]});
    model.weights().read(slot.name, view);
  }
  return all;
}

/// Directions of Muon take long: all are there before a weight follows.
void test_an_interrupted_step_of_muon_leaves_all_weights() {
  const Data data = make_data(0);
  // One thread: with others, how often it is asked depends on how many of the tensors they take.
  const std::shared_ptr<Model> model = make_model(make_cpu_backend(1), 0);
  TrainerOptions options;
  options.optimizer.kind = OptimizerKind::kMuon;
  Trainer trainer(model, nullptr, options);
  const std::vector<std::vector<float>> before = weights_of(trainer, *model);
  for (const int asked : {1, 2, 14}) {
    trainer.accumulate(data.batch(), 0.1, 0);
    Stop stop(asked);
    const InterruptScope scope(&stop);
    bool is_interrupted = false;
    try {
      trainer.step(0.1, 1.0);
    } catch (const Interrupted&) {
      is_interrupted = true;
    }
    CHECK(is_interrupted);
    CHECK(trainer.steps() == 0);
    CHECK(weights_of(trainer, *model) == before);
    trainer.zero_gradients();
  }
  trainer.accumulate(data.batch(), 0.1, 0);
  trainer.step(0.1, 1.0);
  CHECK(weights_of(trainer, *model) != before);
}

}  // namespace

void test_trainer() {
  test_steps(0, false, OptimizerKind::kAdamW, false);
  test_steps(0, true, OptimizerKind::kAdam, true);
  test_steps(3, false, OptimizerKind::kSgd, true);
  test_steps(3, true, OptimizerKind::kMuon, false);
  test_steps(0, false, OptimizerKind::kMuon, true);
  test_a_larger_batch_after_a_smaller_one();
  test_an_interrupted_step_of_muon_leaves_all_weights();
}

}  // namespace llama_ext::test
