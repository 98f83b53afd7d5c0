#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "model/session.h"

namespace llama_ext {

struct BeamSearchOptions {
  int64_t beams = 4;            // in [1, 1024]
  int64_t returned = 1;         // in [1, beams]
  int64_t max_new_tokens = 0;   // >= 0
  double length_penalty = 1.0;  // score = sum log p / generated tokens ^ length_penalty
  bool early_stopping = false;  // true: stop as soon as `beams` hypotheses are complete
  std::vector<int32_t> eos;
  DType kv_dtype = DType::kF32;
  std::shared_ptr<const Adapter> adapter = nullptr;
};

struct BeamHypothesis {
  std::vector<int32_t> tokens;  // generated ones, eos included when it was reached
  double score = 0;
  bool finished = false;  // reached eos
};

/// The best sequences after `prompt`, best first: `returned` of them, or fewer when there are not as many. With one
/// beam it is greedy search. Deterministic: equal scores are ordered by beam, then token id. Without early_stopping the
/// search ends when the best running beam, at its present length, scores no better than the worst of `beams` complete
/// hypotheses.
/// Throws as Generation does.
/// Source: the algorithm of transformers' beam search (2 x beams candidates a step, so that eos never starves a beam).
std::vector<BeamHypothesis> beam_search(const std::shared_ptr<const Model>& model, const std::vector<int32_t>& prompt,
                                        const BeamSearchOptions& options);

}  // namespace llama_ext
