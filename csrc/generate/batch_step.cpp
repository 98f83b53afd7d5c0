// One step of all rows: what each runs, the pass, the draws, and what follows from them.
#include <algorithm>
#include <limits>
#include <utility>

#include "core/interrupt.h"
#include "generate/batch.h"
#include "generate/eos.h"

namespace llama_ext {
namespace {

// While rows decode, so many rows a pass are left to prompts: a long prompt must not hold up everybody's next token.
constexpr int64_t kLeastPromptRows = 64;

// Rows of logits that one step checks guesses with, at most: their memory is V floats each.
constexpr int64_t kMostCheckedRows = 128;

}  // namespace

void Batch::step(std::vector<GenerationEvent>& events) {
  if (tell_held(events)) return;
  if (step_ahead(events)) return;
  admit();
  if (can_go_ahead()) {
    start_ahead();
    if (step_ahead(events)) return;
  }
  std::vector<Work> works = plan();
  try {
    run(works);
    draw(works);
    for (Work& work : works) {
      copy_to_twins(work);
      if (work.row->session == request_.continued) hold_back(work);
    }
    commit(works, events);
  } catch (...) {
    undo(works);
    throw;
  }
}

/// A caller may use the continued session between two steps; what was generated would no longer follow from it.
void Batch::check_continued(const Row& row, int64_t ran) const {
  if (row.session != request_.continued) return;
  const std::vector<int32_t>& tokens = request_.continued->tokens();
  bool same = tokens.size() == static_cast<size_t>(ran);
  for (int64_t i = 0; same && i < ran; ++i) same = tokens[static_cast<size_t>(i)] == row.token(i);
  require(same, ErrorKind::kOption, "generate: the session was changed while a generation continues it");
}

/// The next token of a continued session, when an earlier step has drawn it already.
bool Batch::tell_held(std::vector<GenerationEvent>& events) {
  if (request_.continued == nullptr || running_.empty()) return false;
  Row& row = *running_.front();
  if (row.held.empty()) return false;
  check_continued(row, row.decoded_length());
  if (row.session->writes() != row.held_writes) {
    // Somebody went on with the session and came back: keys and values beyond its end are another text's.
    row.held.clear();
    return false;
  }
  const GenerationEvent event = row.held.front();
  events.push_back(event);
  row.session->readmit(row.output.back());
  row.held.pop_front();
  row.output.push_back(event.token);
  if (event.finish != Finish::kNone) end(row, event.finish);
  forget_ended();
  return true;
}

std::vector<Batch::Work> Batch::plan() {
  int64_t decoding = 0;
  for (Row* row : running_) {
    if (row->twin != nullptr && (!row->twin->is_running() || !row->twin->is_reading_prompt())) row->twin = nullptr;
    if (!row->is_reading_prompt()) ++decoding;
  }
  guess();
  std::vector<Work> works;
  works.reserve(running_.size());
  const int64_t pass_rows = request_.model->backend().pass_rows();
  int64_t room = decoding == 0 ? std::numeric_limits<int64_t>::max() : std::max(pass_rows - decoding, kLeastPromptRows);
  for (Row* row : running_) {
    if (row->twin != nullptr) {
      // Begun right after the row that it waits for, or after others that do: whose logits come now, if any do, is last.
      if (!works.empty() && works.back().row == row->twin && works.back().logits == LogitsRows::kLast) {
        works.back().twins.push_back(row);
      }
      continue;
    }
    Work work;
    work.row = row;
    work.length_before = row->session->length();
    work.output_before = row->output.size();
    if (row->is_reading_prompt()) {
      const int64_t missing = row->prompt_length() - work.length_before;
      const int64_t count = std::min(missing, room);
      check_continued(*row, request_.continued_length);
      if (count == 0) continue;
      room -= count;
      const auto begin = row->prompt->begin() + work.length_before;
      work.tokens.assign(begin, begin + count);
      work.logits = count == missing ? LogitsRows::kLast : LogitsRows::kNone;
    } else {
      check_continued(*row, row->decoded_length());
      work.tokens.reserve(row->draft.size() + 1);
      work.tokens.push_back(row->output.back());
      work.tokens.insert(work.tokens.end(), row->draft.begin(), row->draft.end());
      work.logits = LogitsRows::kAll;
    }
    works.push_back(std::move(work));
  }
  return works;
}

/// Fills the drafts of the rows that decode.
void Batch::guess() {
  if (request_.options.speculation.tokens == 0) return;
  std::vector<Row*> rows;
  for (Row* row : running_) {
    row->draft.clear();
    if (!row->is_reading_prompt()) rows.push_back(row);
  }
  if (rows.empty()) return;
  const int64_t most = kMostCheckedRows / static_cast<int64_t>(rows.size()) - 1;
  std::vector<int64_t> wanted;
  for (Row* row : rows) {
    wanted.push_back(
        std::clamp<int64_t>(std::min(row->pace.next(), row->remaining() - 1), 0, std::max<int64_t>(most, 0)));
  }
  if (draft_model_) {
    counts_.draft_tokens_run += draft_model_->draft(rows, wanted, request_.options);
    return;
  }
  for (size_t i = 0; i < rows.size(); ++i) {
    if (wanted[i] > 0) rows[i]->draft = look_up_draft(*rows[i], wanted[i]);
  }
}

void Batch::run(std::vector<Work>& works) {
  std::vector<SessionChunk> chunks;
  std::vector<Row*> read;
  size_t logits_rows = 0;
  int64_t tokens = 0;
  for (Work& work : works) {
    const int64_t count = static_cast<int64_t>(work.tokens.size());
    chunks.push_back(
        {.session = work.row->session, .tokens = work.tokens.data(), .count = count, .logits = work.logits});
    work.first_logits = logits_rows;
    if (work.logits == LogitsRows::kAll) logits_rows += work.tokens.size();
    if (work.logits == LogitsRows::kLast) {
      logits_rows += 1;
      read.push_back(work.row);
    }
    tokens += count;
  }
  const size_t floats = logits_rows * static_cast<size_t>(vocabulary());
  if (logits_.size() < floats) logits_.resize(floats);
  if (!chunks.empty()) ++counts_.passes;
  counts_.tokens_run += tokens;
  Session::append_batch(chunks, logits_.data());
  if (draft_model_) counts_.draft_tokens_run += draft_model_->read_prompts(read);
}

SampleArgs Batch::sample_args(const Row& row, size_t logits_row) const {
  SampleArgs args;
  args.logits =
      TensorView(logits_.data() + logits_row * static_cast<size_t>(vocabulary()), DType::kF32, {vocabulary()});
  args.options = &request_.options.sampling;
  args.prompt = row.prompt;
  args.output = &row.output;
  args.key = {.seed = request_.options.seed,
              .stream = static_cast<uint64_t>(row.index),
              .counter = static_cast<uint64_t>(row.output.size())};
  return args;
}

GenerationEvent Batch::take(Row& row, const SampleResult& sampled) const {
  row.output.push_back(sampled.token);
  Finish finish = Finish::kNone;
  if (contains(request_.options.eos, sampled.token)) {
    finish = Finish::kEos;
  } else if (row.remaining() == 0) {
    finish = Finish::kLength;
  }
  return {.row = row.index, .token = sampled.token, .logprob = sampled.logprob, .finish = finish};
}

/// Draws as plain decoding would, token by token, for as long as the guesses are what is drawn: each time the next token of all
/// rows at once.
void Batch::draw(std::vector<Work>& works) {
  std::vector<Work*> drawing;
  for (Work& work : works) {
    if (work.logits != LogitsRows::kNone) drawing.push_back(&work);
  }
  std::vector<SampleArgs> args;
  std::vector<SampleResult> results;
  for (size_t position = 0; !drawing.empty(); ++position) {
    throw_if_interrupted();
    args.clear();
    for (const Work* work : drawing) {
      args.push_back(sample_args(*work->row, work->first_logits + position));
      // Those that have twins draw once.
      for (const Row* twin : work->twins) args.push_back(sample_args(*twin, work->first_logits));
    }
    results.resize(args.size());
    request_.model->backend().sample(args, results);
    auto result = results.begin();
    for (Work* work : drawing) {
      work->events.push_back(take(*work->row, *result++));
      work->accepted = static_cast<int64_t>(position);
      for (Row* twin : work->twins) work->events.push_back(take(*twin, *result++));
    }
    std::erase_if(drawing, [position](const Work* work) {
      const GenerationEvent& last = work->events.back();
      return position + 1 == work->tokens.size() || work->logits != LogitsRows::kAll || last.finish != Finish::kNone ||
             last.token != work->tokens[position + 1];
    });
  }
}

/// The keys and values of the prompt, for those that go on, or that the next row may take a beginning from.
void Batch::copy_to_twins(const Work& work) const {
  for (size_t i = 0; i < work.twins.size(); ++i) {
    Row& twin = *work.twins[i];
    const GenerationEvent& event = work.events[work.events.size() - work.twins.size() + i];
    if (event.finish == Finish::kNone || (&twin == latest_ && next_ < order_.size())) {
      twin.session->copy_from(*work.row->session, twin.prompt_length());
      if (draft_model_) draft_model_->copy(twin, *work.row);
    }
  }
}

/// A continued session is told one token a step: only then does it hold at any moment what its owner knows of.
void Batch::hold_back(Work& work) const {
  Row& row = *work.row;
  row.held.assign(work.events.begin() + 1, work.events.end());
  row.held_writes = row.session->writes();
  work.events.resize(1);
  row.output.resize(work.output_before + 1);
}

void Batch::undo(const std::vector<Work>& works) {
  for (const Work& work : works) {
    work.row->held.clear();
    work.row->output.resize(work.output_before);
    if (work.row->session->length() > work.length_before) work.row->session->rewind(work.length_before);
    for (Row* twin : work.twins) {
      twin->output.clear();
      twin->session->rewind(0);
    }
  }
}

/// Nothing in here can fail, but for the first reservation.
void Batch::commit(std::vector<Work>& works, std::vector<GenerationEvent>& events) {
  size_t most = events.size() + without_tokens_.size();
  for (const Work& work : works) most += work.events.size();
  if (events.capacity() < most) events.reserve(std::max(most, 2 * events.capacity()));

  for (size_t index : without_tokens_) {
    end(rows_[index], Finish::kLength);
    events.push_back({.row = static_cast<int64_t>(index), .token = -1, .logprob = 0, .finish = Finish::kLength});
  }
  without_tokens_.clear();
  for (Work& work : works) {
    Row& row = *work.row;
    const int64_t ran = static_cast<int64_t>(work.tokens.size());
    if (work.output_before == 0) {
      row.counts.prompt_run += ran;
    } else if (ran > 1) {
      row.counts.drafted += ran - 1;
      row.counts.accepted += work.accepted;
      row.pace.record(ran - 1, work.accepted);
    }
    for (Row* twin : work.twins) {
      twin->twin = nullptr;
      twin->counts.prompt_shared = twin->prompt_length();
    }
    for (const GenerationEvent& event : work.events) {
      Row& told = rows_[static_cast<size_t>(event.row)];
      events.push_back(event);
      if (event.finish != Finish::kNone) {
        // A session that is kept holds all but the last token, whatever was guessed beyond it.
        if (told.session == request_.continued) told.session->rewind(told.decoded_length());
        end(told, event.finish);
      }
    }
    if (row.is_running() && !row.output.empty()) row.session->rewind(row.decoded_length());
  }
  forget_ended();
}

}  // namespace llama_ext
