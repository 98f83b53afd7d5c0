// Sums of exponentials over a vocabulary, in float64: float32 would lose digits. What sampling, scoring and beam search divide
// by; losses come from cross_entropy, which is float32.
#pragma once

#include <cstdint>
#include <string_view>

#include "core/tensor_view.h"
#include "ops/logits_loops.h"

namespace llama_ext {

struct LogSumExp {
  int64_t argmax = 0;  // the first of the largest logits
  double value = 0;    // log(sum(exp(logits)))
};

/// out[i] is of row i. logits: (M, V) f32 in host memory, V >= 1, rows may be strided. out: (M).
/// Sampling, scoring and beam search all divide by this one sum, so that the log probability of a token is the same bits.
/// Throws ShapeError, DTypeError, and NumericError when a logit is NaN or +inf, or all of a row are -inf.
struct LogSumExpArgs {
  TensorView logits;
  LogSumExp* out = nullptr;
};

void check(const LogSumExpArgs& args);

/// One row in host memory, with the same errors, in the name of `op`.
LogSumExp log_sum_exp_on_host(const float* logits, int64_t size, std::string_view op,
                              const LogitsLoops& loops = kPlainLogitsLoops);

}  // namespace llama_ext
