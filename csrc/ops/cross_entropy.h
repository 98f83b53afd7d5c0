#pragma once

#include "core/tensor_view.h"

namespace llama_ext {

/// losses[t] = log(sum_v exp(logits[t, v])) - logits[t, labels[t]], or 0 where labels[t] is kIgnoreLabel
/// logits: (T, V) f32, rows may be strided. labels: (T) i32 in host memory, each in [0, V) or kIgnoreLabel.
/// losses: (T) f32. hits, when given: (T) f32, 1 where labels[t] is the first of the largest logits, else 0.
/// The caller divides the sum by the number of counted labels of the whole step, as the mean of means is not the mean.
/// Throws ShapeError, DTypeError, TokenIdError.
struct CrossEntropyArgs {
  TensorView logits;
  TensorView labels;
  TensorView losses;
  TensorView hits = {};
};

inline constexpr int32_t kIgnoreLabel = -100;

void check(const CrossEntropyArgs& args);

/// The losses, as cross_entropy gives them, and the gradient of scale * (their sum) in the logits' place, so that neither is
/// ever stored twice:  logits[t] <- scale (softmax(logits[t]) - onehot(labels[t])), or 0 where labels[t] is kIgnoreLabel
/// logits: (T, V) f32, rows may be strided. labels, losses: as cross_entropy. scale: usually 1 / (counted labels of the whole
/// step). Throws ShapeError, DTypeError, TokenIdError.
struct CrossEntropyBackwardArgs {
  TensorView logits;
  TensorView labels;
  double scale = 1.0;
  TensorView losses;
};

void check(const CrossEntropyBackwardArgs& args);

}  // namespace llama_ext
