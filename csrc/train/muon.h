// Muon: momentum whose directions are made orthogonal, for the matrices of the blocks.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <vector>

#include "train/parameters.h"

namespace llama_ext {

struct OptimizerOptions;

/// Where every matrix of a block goes, tensor by tensor of the checkpoint:
///   velocity = momentum velocity + g;   direction = g + momentum velocity (with nesterov) or velocity
///   W = (1 - lr decay) W - lr 0.2 sqrt(max(rows, columns)) orthogonal(direction)
/// orthogonal: five steps of a Newton-Schulz iteration, X <- 3.4445 X + X (-4.775 A + 2.0315 A A) with A = X^T X, of the direction, or its
/// transpose where it is wider than high, divided by its norm; its products as `compute` says. The factor gives an update the size that
/// AdamW's have, so that both go by one learning rate.
/// Sources: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024; Liu et al., "Muon is Scalable for LLM
/// Training", 2025.
class Muon {
 public:
  /// With memory for the largest of these tensors, which is kept. Throws OutOfMemoryError, LimitError.
  Muon(Backend& backend, const Parameters& parameters, Compute compute);

  /// Velocities follow gradient_scale * gradients, and what a weight is to lose at lr 1, decay aside, takes its gradient's place. Says of
  /// which parameters that is so. Throws NumericError for a direction that is not finite, Interrupted; gradients and velocities are
  /// undefined then.
  std::vector<bool> set_directions(const OptimizerOptions& options, Parameters& parameters, double gradient_scale);

  int64_t nbytes() const;

 private:
  /// What one tensor at a time needs.
  struct Scratch {
    std::unique_ptr<Buffer> memory;
    std::map<int64_t, std::unique_ptr<Matrix>> products;  // (n, n), by n
  };
  /// A tensor (longer, shorter side), and memory for the next one.
  struct Direction {
    TensorView x;
    TensorView next;
  };

  TensorView view(const Scratch& scratch, int64_t at, int64_t rows, int64_t cols) const;
  void set_direction(const OptimizerOptions& options, Parameter& parameter, const ParameterSlot& slot,
                     double gradient_scale, const Scratch& scratch) const;
  void orthogonalize(Direction& direction, double scale, const Scratch& scratch) const;

  Backend& backend_;
  Compute compute_;
  // Where in a scratch's memory, in floats, the second of two tensors and two of their products lie.
  int64_t next_at_ = 0;
  int64_t gram_at_ = 0;
  int64_t square_at_ = 0;
  std::vector<Scratch> scratch_;  // one; or one for each worker, who then take a tensor each
};

}  // namespace llama_ext
