#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "core/tensor_view.h"
#include "ops/logits_loops.h"

namespace llama_ext {

/// How to choose the next token from logits. The steps run in this order, as in transformers and vLLM: logit_bias,
/// repetition, presence and frequency penalties, temperature, top_k, top_p, min_p, draw.
struct SamplingOptions {
  double temperature = 0.0;         // >= 0; 0 is greedy: the largest processed logit, the lowest id among equals
  int64_t top_k = 0;                // keep the k largest; 0 keeps all
  double top_p = 1.0;               // (0, 1]: keep the smallest set of the most likely whose probability reaches it
  double min_p = 0.0;               // [0, 1): keep what is at least this share of the most likely
  double repetition_penalty = 1.0;  // > 0, on prompt and output: a positive logit is divided, a negative multiplied
  double presence_penalty = 0.0;    // subtracted once from every token of the output
  double frequency_penalty = 0.0;   // subtracted per occurrence in the output
  std::vector<std::pair<int32_t, float>> logit_bias;  // added to a token's logit; -inf forbids it
};

/// A random stream that depends on nothing but these numbers: not on the batch, threads or what was drawn before.
struct RandomKey {
  uint64_t seed = 0;
  uint64_t stream = 0;   // which sequence of a request
  uint64_t counter = 0;  // which token of the sequence
};

/// A uniform float64 in [0, 1), 53 bits. Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011
/// (Philox 4x32, 10 rounds), keyed by seed, counter block (counter, stream).
double random_uniform(const RandomKey& key);

/// Chooses a token from one row of logits.
/// logits: (V) f32 in host memory, unchanged. prompt, output: the ids so far (for the penalties).
/// Throws OptionError (check), NumericError when a logit is NaN, +inf, or all are -inf (also after logit_bias).
struct SampleArgs {
  TensorView logits;
  const SamplingOptions* options = nullptr;
  const std::vector<int32_t>* prompt = nullptr;
  const std::vector<int32_t>* output = nullptr;
  RandomKey key;
};

struct SampleResult {
  int32_t token = 0;
  float logprob = 0;  // log p of the token under softmax(logits), before any processing
};

void check(const SamplingOptions& options, int64_t vocabulary);
void check(const SampleArgs& args);

/// The one implementation for logits in host memory; backends without a sampler of their own call it.
SampleResult sample_on_host(const SampleArgs& args, const LogitsLoops& loops = kPlainLogitsLoops);

}  // namespace llama_ext
