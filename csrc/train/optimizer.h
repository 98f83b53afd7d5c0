// How parameters follow their gradients.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "train/muon.h"
#include "train/parameters.h"

namespace llama_ext {

enum class OptimizerKind : uint8_t { kAdamW, kAdam, kSgd, kMuon };

/// adamw: decay apart from the gradient; adam: as a part of it (L2). muon: for the matrices of the blocks, adamw for the rest.
struct OptimizerOptions {
  OptimizerKind kind = OptimizerKind::kAdamW;
  double beta1 = 0.9;
  double beta2 = 0.95;
  double eps = 1e-8;
  double momentum = 0.0;  // sgd; muon has 0.95 when it is 0
  bool nesterov = false;
  double weight_decay = 0.0;
  bool decay_all = false;  // norms and biases, too
};

/// Throws OptionError.
void check(const OptimizerOptions& options);

/// What it remembers of a matrix of the blocks, or of another parameter, by name.
std::vector<std::string> moment_names(const OptimizerOptions& options, bool is_block_matrix);

/// One step, counted from 1, with gradient_scale * gradients, which are undefined then. muon: what steps of that kind need.
/// Throws OptionError; NumericError (muon.h) and Interrupted, before a weight is changed.
void optimizer_step(Backend& backend, const OptimizerOptions& options, Parameters& parameters, Muon* muon, int64_t step,
                    double lr, double gradient_scale);

}  // namespace llama_ext
