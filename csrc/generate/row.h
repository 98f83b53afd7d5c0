// One sequence of a generation: what the batch knows of it.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <vector>

#include "generate/draft_pace.h"
#include "generate/generation.h"

namespace llama_ext {

struct Row {
  int64_t index = 0;
  const std::vector<int32_t>* prompt = nullptr;  // all that precedes the output
  int64_t max_new_tokens = 0;
  std::shared_ptr<const Adapter> adapter;
  // The row's sequence: its own, or the one being continued. None while the row waits, and once it has ended.
  std::unique_ptr<Session> owned;
  Session* session = nullptr;
  std::vector<int32_t> output;
  Finish finish = Finish::kNone;
  // A row with an equal prompt that is running it: this one waits for its logits, and copies its keys and values.
  const Row* twin = nullptr;

  // Speculation.
  std::unique_ptr<Session> draft_session;
  std::vector<int32_t> draft;  // guesses that this step checks
  DraftPace pace;
  // Drawn but not told yet, and `session->writes()` at that time. Of a continued session only.
  std::deque<GenerationEvent> held;
  uint64_t held_writes = 0;

  RowCounts counts;

  bool is_running() const { return finish == Finish::kNone; }
  bool is_reading_prompt() const { return session != nullptr && output.empty(); }
  int64_t prompt_length() const { return static_cast<int64_t>(prompt->size()); }
  int64_t output_length() const { return static_cast<int64_t>(output.size()); }
  /// What the session holds between two steps of decode: all but the newest token.
  int64_t decoded_length() const { return prompt_length() + output_length() - 1; }
  int64_t remaining() const { return max_new_tokens - output_length(); }
  /// Positions that the row ever needs: the last token never runs.
  int64_t capacity() const { return prompt_length() + max_new_tokens - 1; }
  int32_t token(int64_t position) const {
    const int64_t generated = position - prompt_length();
    return generated < 0 ? (*prompt)[static_cast<size_t>(position)] : output[static_cast<size_t>(generated)];
  }
};

}  // namespace llama_ext
