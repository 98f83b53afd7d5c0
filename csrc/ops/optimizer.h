// Steps of optimisers over flat tensors: the elements of a matrix in its backend's own layout (Backend::values), or of a vector.
#pragma once

#include <cstdint>

#include "core/tensor_view.h"

namespace llama_ext {

/// With g = gradient_scale * gradient:
///   first = beta1 first + (1 - beta1) g;   second = beta2 second + (1 - beta2) g^2
///   parameter -= lr (first / (1 - beta1^step)) / (sqrt(second / (1 - beta2^step)) + eps)
/// decoupled: first parameter *= 1 - lr decay (AdamW); else g += decay * parameter before everything (Adam with L2).
/// parameter, gradient, first, second: (n) f32, contiguous, disjoint. step: counts from 1. Throws ShapeError, DTypeError,
/// OptionError. Source: Kingma & Ba 2015; Loshchilov & Hutter, "Decoupled Weight Decay Regularization", 2019.
struct AdamArgs {
  TensorView parameter;
  TensorView gradient;
  TensorView first;
  TensorView second;
  double gradient_scale = 1.0;
  double lr = 1e-3;
  double beta1 = 0.9;
  double beta2 = 0.999;
  double eps = 1e-8;
  double decay = 0.0;
  bool decoupled = true;
  int64_t step = 1;
};

/// With g = gradient_scale * gradient + decay * parameter:  velocity = momentum velocity + g;  parameter -= lr velocity
/// (with nesterov: parameter -= lr (g + momentum velocity)). parameter, gradient, velocity: (n) f32, contiguous, disjoint;
/// velocity may be absent when momentum is 0. Throws ShapeError, DTypeError, OptionError. Source: Sutskever et al. 2013, in the
/// form of torch.optim.SGD without dampening.
struct SgdArgs {
  TensorView parameter;
  TensorView gradient;
  TensorView velocity = {};
  double gradient_scale = 1.0;
  double lr = 1e-3;
  double momentum = 0.0;
  double decay = 0.0;
  bool nesterov = false;
};

void check(const AdamArgs& args);
void check(const SgdArgs& args);

}  // namespace llama_ext
