#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "model/session.h"

namespace llama_ext {

struct Score {
  float logprob = 0;       // log p(token | everything before it)
  bool is_greedy = false;  // the token is the most likely one (the lowest id among equals)
};

/// The score of tokens[i] for each i in [first, count), in one pass over the sequence; 1 <= first <= count <= context.
/// Logits are made and consumed in chunks: memory does not grow with count x V. Throws as forward() does, or what
/// `advance` throws: if there is one, it is told after each chunk how many tokens that scored. kv_dtype: of the keys and values.
std::vector<Score> score(const std::shared_ptr<const Model>& model, const std::vector<int32_t>& tokens, int64_t first,
                         const std::function<void(int64_t)>& advance = nullptr,
                         std::shared_ptr<const Adapter> adapter = nullptr, DType kv_dtype = DType::kF32);

/// Logits of every token, or of the last one, of several sequences; each starts at position 0 and has at most `context` tokens, or
/// none. adapters: of each sequence; or empty. logits: host memory, (all tokens asked for, V) f32 row-major, the sequences' rows in order. Throws as forward() does.
void sequence_logits(const Model& model, const std::vector<std::vector<int32_t>>& sequences,
                     const std::vector<std::shared_ptr<const Adapter>>& adapters, LogitsRows which, float* logits);

}  // namespace llama_ext
