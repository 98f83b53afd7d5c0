// Guessing the next tokens of a row: from its own text, or with a smaller model. What is guessed decides how many
// tokens a step yields, never which.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "generate/row.h"

namespace llama_ext {

/// What followed the last time that the row's text ended as it ends now: up to `count` tokens, or none when no two
/// tokens are found again. The longest matching end counts, up to a few tokens; of equally long ones the latest. A
/// match may overlap with the end itself, so a text with a short period is continued as long as it is asked for.
/// Source: Saxena, "Prompt Lookup Decoding", 2023.
std::vector<int32_t> look_up_draft(const Row& row, int64_t count);

/// A second model with the same vocabulary that runs ahead of rows. It draws with the row's own options and random
/// numbers, so it guesses right wherever both models are nearly of one opinion, under sampling too.
/// Source: Leviathan et al., "Fast Inference from Transformers via Speculative Decoding", 2023; here a guess counts
/// only when it is the very token that the row would have drawn.
class DraftModel {
 public:
  DraftModel(std::shared_ptr<const Model> model, DType kv_dtype) : model_(std::move(model)), kv_dtype_(kv_dtype) {}

  const Model& model() const { return *model_; }
  /// Positions of a draft session of `row`.
  int64_t capacity(const Row& row) const { return std::min(row.capacity(), model_->config().context); }
  int64_t nbytes(const Row& row) const;
  /// An empty session for `row`, or the part of `source`'s that is the beginning of its prompt. source: may be nullptr.
  std::unique_ptr<Session> create_session(const Row& row, const Session* source) const;
  /// Gives `row` what the draft session of `other` has run, a row with an equal prompt.
  void copy(const Row& row, const Row& other) const;
  /// Runs the prompts of `rows` as far as they have not run. Returns the tokens that ran.
  int64_t read_prompts(const std::vector<Row*>& rows) const;
  /// Fills `row.draft` of each row with up to wanted[i] guesses. Returns the tokens that ran.
  int64_t draft(const std::vector<Row*>& rows, const std::vector<int64_t>& wanted,
                const GenerationOptions& options) const;

 private:
  std::shared_ptr<const Model> model_;
  DType kv_dtype_;
};

}  // namespace llama_ext
