// Muon: momentum whose directions are made orthogonal, for the matrices of the blocks.
#pragma once

#include <vector>

#include "train/optimizer.h"

namespace llama_ext {

/// Steps every matrix of a block, tensor by tensor of the checkpoint, and says which parameters those were:
///   velocity = momentum velocity + g;   direction = g + momentum velocity (with nesterov) or velocity
///   W = (1 - lr decay) W - 0.2 sqrt(max(rows, columns)) lr orthogonal(direction)
/// orthogonal: five steps of a Newton-Schulz iteration in float32, X <- 3.4445 X + (-4.775 A + 2.0315 A A) X with A = X X^T. The factor
/// gives an update the size that AdamW's have, so that both go by one learning rate.
/// Sources: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024; Liu et al., "Muon is Scalable for LLM
/// Training", 2025.
std::vector<bool> muon_step(Backend& backend, const OptimizerOptions& options, Parameters& parameters, double lr,
                            double gradient_scale);

}  // namespace llama_ext
