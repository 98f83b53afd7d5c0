// Choosing the next tokens of sequences that decode on a device, where their logits are, so that nobody waits for the host.
#pragma once

#include <cstdint>

#include "core/tensor_view.h"
#include "ops/sample.h"

namespace llama_ext {

/// What a device keeps of a sequence that decodes there. sample_next moves it on by a token.
struct DecodeRow {
  RandomKey key;          // of the token that is drawn next
  int32_t slot = 0;       // of `results`, where that token goes
  uint32_t arrivals = 0;  // a device's own; 0 between two operations
};

/// A token as sample_next writes it.
struct DecodeResult {
  int32_t token = 0;
  float logprob = 0;
  /// False where a logit is not finite or none is left to choose from: the token means nothing then.
  int32_t is_valid = 0;
  int32_t unused = 0;
};

/// The token that `sample` chooses from each row of logits, written to results[slot, row] with its log probability, and to
/// tokens[row]; then positions[row] += 1, rows[row].key.counter += 1, rows[row].slot = (slot + 1) % slots, and occurrences[row, token] += 1.
/// Sums are made in another order than on the host, of weights rounded to a share 2^-62 V of the likeliest: a token differs from
/// `sample`'s only where a draw or top_p falls that near to a boundary, a log probability by a unit in the last place.
/// logits: (R, V) f32, contiguous; a row whose logits are not all finite is not valid. tokens, positions: (R) i32.
/// rows: R of them. bias: (V) f32, logit_bias by token, or none. occurrences: (R, V) i32: how often each token is in the output,
/// plus kInPrompt where it is in the prompt, or none; needed for penalties. All of these are the device's memory; results:
/// (slots, R), of Recorder::allocate_visible. Throws OptionError, ShapeError.
struct SampleNextArgs {
  TensorView logits;
  const SamplingOptions* options = nullptr;
  TensorView tokens;
  TensorView positions;
  DecodeRow* rows = nullptr;
  DecodeResult* results = nullptr;
  int64_t slots = 0;
  TensorView bias = {};
  TensorView occurrences = {};
};

inline constexpr int32_t kInPrompt = int32_t{1} << 30;

void check(const SampleNextArgs& args);

/// Whether `sample` reads the tokens so far.
bool has_penalties(const SamplingOptions& options);

}  // namespace llama_ext
