// Steps of rows that all decode, on a device that does not need the host for each token: it is asked for some tokens ahead of the one
// that is told, so that it never waits for us. A step tells one token of each row, as every step does, and what was asked
// for beyond the end of a row is left alone.
#include <algorithm>

#include "core/interrupt.h"
#include "generate/batch.h"

namespace llama_ext {
namespace {

// Tokens in flight: one that runs, one that waits behind it, and two for a host that is busy for a moment. When a row ends early, so
// many have run in vain.
constexpr int64_t kMostAhead = 4;

// A recording takes about as long as a token does when the host takes part in it.
constexpr int64_t kWorthRecording = 4;

}  // namespace

bool Batch::can_go_ahead() const {
  const GenerationOptions& options = request_.options;
  if (running_.empty() || static_cast<int64_t>(running_.size()) > DecodeLoop::kMostSeats) return false;
  if (options.speculation.tokens > 0 || !without_tokens_.empty()) return false;
  if (!SampleState::is_possible(request_.model->backend(), options.sampling)) return false;
  return std::all_of(running_.begin(), running_.end(), [](const Row* row) {
    return !row->is_reading_prompt() && row->twin == nullptr && row->session->adapter() == nullptr &&
           row->remaining() >= kWorthRecording;
  });
}

void Batch::start_ahead() {
  Ahead ahead;
  std::vector<DecodeSeat> seats;
  for (Row* row : running_) {
    check_continued(*row, row->decoded_length());
    const SampleArgs args = sample_args(*row, 0);
    seats.push_back({.cache = &row->session->cache(),
                     .sample = {.token = row->output.back(),
                                .position = row->decoded_length(),
                                .key = args.key,
                                .prompt = args.prompt,
                                .output = args.output}});
    ahead.rows.push_back(row);
    ahead.writes.push_back(row->session->writes());
  }
  ahead.loop = std::make_unique<DecodeLoop>(request_.model, request_.options.sampling, std::move(seats));
  ahead_ = std::move(ahead);
}

/// Whether the caches still hold what the loop has left there: somebody may have gone on with a session and come back.
bool Batch::is_ahead_valid() const {
  for (size_t i = 0; i < ahead_.rows.size(); ++i) {
    const Row& row = *ahead_.rows[i];
    if (row.is_running() && row.session->writes() != ahead_.writes[i]) return false;
  }
  return true;
}

/// Tells the next token of each row, if a loop has it. On a throw no row has advanced.
bool Batch::step_ahead(std::vector<GenerationEvent>& events) {
  if (ahead_.loop == nullptr) return false;
  DecodeLoop& loop = *ahead_.loop;
  int64_t shortest = kMostAhead;
  bool has_ended = false;
  for (const Row* row : ahead_.rows) {
    if (!row->is_running()) {
      has_ended = true;
      continue;
    }
    check_continued(*row, row->decoded_length());
    shortest = std::min(shortest, row->remaining());
  }
  // Nothing may be asked for any more once a row's cache is gone; what is in flight is still told to the others.
  if (running_.empty() || !is_ahead_valid() || (has_ended && loop.in_flight() == 0)) {
    ahead_ = {};
    return false;
  }
  throw_if_interrupted();
  while (!has_ended && loop.in_flight() < std::min(shortest, ahead_.told + 1)) loop.push();
  const std::span<const DecodeResult> results = loop.fetch();
  std::vector<Work> works;
  for (size_t i = 0; i < results.size(); ++i) {
    Row* row = ahead_.rows[i];
    if (!row->is_running()) continue;
    if (results[i].is_valid == 0) {
      // The same token, step by step, says what is wrong.
      ahead_ = {};
      return false;
    }
    Work work;
    work.row = row;
    work.tokens.push_back(row->output.back());
    work.length_before = row->session->length();
    work.output_before = row->output.size();
    work.events.reserve(1);
    works.push_back(std::move(work));
  }
  try {
    size_t next = 0;
    for (size_t i = 0; i < results.size(); ++i) {
      if (!ahead_.rows[i]->is_running()) continue;
      Work& work = works[next++];
      work.row->session->record_run(work.tokens.front());
      ahead_.writes[i] = work.row->session->writes();
      work.events.push_back(take(*work.row, {results[i].token, results[i].logprob}));
    }
    ++counts_.passes;
    counts_.tokens_run += static_cast<int64_t>(works.size());
    commit(works, events);
    ++ahead_.told;
  } catch (...) {
    undo(works);
    ahead_ = {};  // its next token would be the one after
    throw;
  }
  if (running_.empty()) ahead_ = {};
  return true;
}

}  // namespace llama_ext
