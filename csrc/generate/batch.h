// Continuous batching: which rows run, and one step of all of them.
#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "generate/draft.h"
#include "generate/row.h"
#include "model/decode_loop.h"

namespace llama_ext {

/// What is to be generated. Checked, and unchanged from then on.
struct GenerationRequest {
  std::shared_ptr<const Model> model;
  // All that precedes a prompt's outputs: for a continued session its tokens, then the prompt.
  std::vector<std::vector<int32_t>> prompts;
  GenerationOptions options;
  Session* continued = nullptr;
  int64_t continued_length = 0;
};

/// The rows of one request, which must stay where it is. See Generation for what a step promises.
class Batch {
 public:
  /// Throws OutOfMemoryError when a row by itself needs more memory than there is.
  explicit Batch(const GenerationRequest& request);

  size_t rows() const { return rows_.size(); }
  bool done() const { return unfinished_ == 0; }
  /// Appends the step's events. On a throw nothing was appended and no row has advanced.
  void step(std::vector<GenerationEvent>& events);
  void stop(size_t row);
  const RowCounts& row_counts(size_t row) const { return rows_[row].counts; }
  const GenerationCounts& counts() const { return counts_; }

 private:
  /// What one row runs in a step, and what came of it.
  struct Work {
    Row* row = nullptr;
    std::vector<int32_t> tokens;
    LogitsRows logits = LogitsRows::kLast;
    size_t first_logits = 0;    // where its rows of logits begin
    int64_t length_before = 0;  // of its session
    size_t output_before = 0;   // tokens
    int64_t accepted = 0;       // guesses that were right
    std::vector<Row*> twins;    // draw from the same logits
    std::vector<GenerationEvent> events;
  };

  // Beginning rows.
  void admit();
  bool begin(Row& row);
  bool should_wait(const Row& row, int64_t shared) const;
  int64_t nbytes(const Row& row) const;
  void require_room(const Row& row) const;

  // One step.
  bool tell_held(std::vector<GenerationEvent>& events);
  std::vector<Work> plan();
  void guess();
  void run(std::vector<Work>& works);
  void draw(std::vector<Work>& works);
  SampleArgs sample_args(const Row& row, size_t logits_row) const;
  GenerationEvent take(Row& row, const SampleResult& sampled) const;
  void copy_to_twins(const Work& work) const;
  void hold_back(Work& work) const;
  void undo(const std::vector<Work>& works);
  void commit(std::vector<Work>& works, std::vector<GenerationEvent>& events);
  void check_continued(const Row& row, int64_t ran) const;

  // Steps that a device takes ahead of the host (batch_ahead.cpp).
  bool step_ahead(std::vector<GenerationEvent>& events);
  bool can_go_ahead() const;
  void start_ahead();
  bool is_ahead_valid() const;

  void end(Row& row, Finish reason);
  void forget_ended();
  int64_t vocabulary() const { return request_.model->config().vocabulary; }
  KvCacheShape kv_shape(int64_t capacity) const;

  const GenerationRequest& request_;
  std::optional<DraftModel> draft_model_;
  std::vector<Row> rows_;
  size_t unfinished_ = 0;
  std::vector<size_t> without_tokens_;  // rows to generate nothing for, until that was told

  std::vector<size_t> order_;  // in which rows are begun
  size_t next_ = 0;            // of order_
  std::vector<Row*> running_;  // in the order of their beginning
  int64_t reserved_ = 0;       // bytes of their caches when they are full
  size_t full_at_ = 0;         // so many rows had filled the memory; 0: not known

  // The row begun last, while it runs; then what the next row shares with it, if that is worth keeping.
  Row* latest_ = nullptr;
  std::unique_ptr<Session> base_;
  std::unique_ptr<Session> draft_base_;

  /// Rows that decode on a device by itself, from the moment on that they all do until one ends.
  struct Ahead {
    std::unique_ptr<DecodeLoop> loop;
    std::vector<Row*> rows;        // of its seats
    std::vector<uint64_t> writes;  // of their sessions, as the loop left them
    int64_t told = 0;              // tokens of each
  };
  Ahead ahead_;

  std::vector<float> logits_;
  GenerationCounts counts_;
};

}  // namespace llama_ext
