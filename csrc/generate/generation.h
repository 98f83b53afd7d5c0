// Generation of a batch: prefill, decode and sampling, one step at a time, without Python.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "model/session.h"
#include "ops/sample.h"

namespace llama_ext {

enum class Finish : uint8_t { kNone, kEos, kLength, kStopped };

/// Guessing tokens that one pass of the model then checks together. What is generated does not depend on it, bit for
/// bit: a guess stands only when it is the token that would have been drawn.
struct SpeculationOptions {
  int64_t tokens = 0;                  // guesses a step, at most, in [0, kMostDrafted]; 0 is no speculation
  std::shared_ptr<const Model> model;  // guesses with this one; none: with what followed in the row's own text
  DType kv_dtype = DType::kF32;        // of `model`
};

inline constexpr int64_t kMostDrafted = 64;

struct GenerationOptions {
  SamplingOptions sampling;
  std::vector<int64_t> max_new_tokens;  // one per row, each >= 0
  std::vector<int32_t> eos;             // any of them ends a row; the token itself is reported
  uint64_t seed = 0;
  DType kv_dtype = DType::kF32;
  int64_t copies = 1;           // sequences per prompt (num_return_sequences)
  int64_t max_batch_size = 16;  // rows that run at once, >= 1; fewer when memory does not hold as many
  SpeculationOptions speculation;
  // Of each prompt; or empty. A continued session has its own.
  std::vector<std::shared_ptr<const Adapter>> adapters;
};

struct GenerationEvent {
  int64_t row = 0;
  int32_t token = -1;  // -1: the row ended without a token (max_new_tokens 0)
  float logprob = 0;
  Finish finish = Finish::kNone;
};

/// What one row has cost.
struct RowCounts {
  int64_t prompt_run = 0;     // tokens of its prompt that ran through the model for it
  int64_t prompt_shared = 0;  // those whose keys and values were copied from another row
  int64_t drafted = 0;        // guesses that were checked
  int64_t accepted = 0;       // those that were right
};

/// What a generation has cost so far. Tokens that a device ran in vain, ahead of a row's end, are left out.
struct GenerationCounts {
  int64_t passes = 0;            // calls of forward()
  int64_t tokens_run = 0;        // tokens that ran through the model, guesses that were wrong included
  int64_t draft_tokens_run = 0;  // those that ran through the draft model
};

/// rows = prompts x copies, row = prompt * copies + copy. Row r draws from the random stream (seed, r, token index), so
/// its tokens do not depend on the rest of the batch. Tokens equal those of each row alone, bit for bit.
///
/// At most max_batch_size rows run at once; where one ends the next begins, and its prompt runs together with the next
/// tokens of the others. What a prompt shares with one that has run is copied: rows are begun in the order of
/// prefix_order(), so that prompts with a common beginning follow each other.
class Generation {
 public:
  /// Every prompt has at least one token, and prompt + max_new_tokens fits the context. `continued`, when given, is a
  /// session (one prompt, one copy) whose tokens precede the prompt and that keeps what is generated: used by sessions
  /// and chat. It must outlive the generation and not be changed by others until that is done. At any moment it holds
  /// exactly what has run through the model: the prompt and every generated token but the newest, which only runs when
  /// the next one is asked for. So the next turn of a chat starts with that token, or rewinds to what both transcripts
  /// share.
  /// Throws OptionError, TokenIdError, ContextLengthError, OutOfMemoryError.
  Generation(std::shared_ptr<const Model> model, std::vector<std::vector<int32_t>> prompts, GenerationOptions options,
             Session* continued = nullptr);
  ~Generation();

  int64_t rows() const;
  bool done() const;
  /// One token, or with speculation at least one, for every row that decodes or has read its prompt; those of one row
  /// in order. With a continued session exactly one. Empty when done. On a throw (Interrupted, NumericError,
  /// OutOfMemoryError) no row has advanced, and the call may be repeated.
  std::vector<GenerationEvent> step();
  /// Up to `steps` steps in one call. On a throw the steps before stand, and the next call returns their events first.
  std::vector<GenerationEvent> run(int64_t steps);
  /// Ends a row from outside (a stop string was seen); no effect on a row that has ended.
  void stop(int64_t row);

  RowCounts row_counts(int64_t row) const;
  GenerationCounts counts() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace llama_ext
