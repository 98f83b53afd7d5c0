// Generation of a batch: prefill, decode and sampling, one step at a time, without Python.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "model/session.h"
#include "ops/sample.h"

namespace llama_ext {

enum class Finish : uint8_t { kNone, kEos, kLength, kStopped };

struct GenerationOptions {
  SamplingOptions sampling;
  std::vector<int64_t> max_new_tokens;  // one per row, each >= 0
  std::vector<int32_t> eos;             // any of them ends a row; the token itself is reported
  uint64_t seed = 0;
  DType kv_dtype = DType::kF32;
  int64_t copies = 1;  // sequences per prompt (num_return_sequences); the prompt is computed once
};

struct GenerationEvent {
  int64_t row = 0;
  int32_t token = -1;  // -1: the row ended without a token (max_new_tokens 0)
  float logprob = 0;
  Finish finish = Finish::kNone;
};

/// rows = prompts x copies, row = prompt * copies + copy. Row r draws from the random stream (seed, r, token index), so
/// its tokens do not depend on the rest of the batch. Tokens equal those of each row alone, bit for bit.
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
  /// One token for every unfinished row (the first call runs the prompts). Empty when done. On a throw (Interrupted,
  /// NumericError) no row has advanced, and the call may be repeated.
  std::vector<GenerationEvent> step();
  /// Up to `steps` steps in one call. On a throw the steps before stand, and the next call returns their events first.
  std::vector<GenerationEvent> run(int64_t steps);
  /// Ends a row from outside (a stop string was seen); no effect on a row that has ended.
  void stop(int64_t row);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace llama_ext
