#include "generate/generation.h"

#include <algorithm>
#include <map>
#include <utility>

#include "core/interrupt.h"
#include "generate/eos.h"

namespace llama_ext {
namespace {

struct Row {
  size_t prompt = 0;
  int64_t max_new_tokens = 0;
  // The row's sequence: its own, or the one being continued. None when nothing is to be generated, or no more.
  std::unique_ptr<Session> owned;
  Session* session = nullptr;
  std::vector<int32_t> output;
  Finish finish = Finish::kNone;

  bool is_running() const { return finish == Finish::kNone; }
  void end(Finish reason) {
    finish = reason;
    session = nullptr;
    owned.reset();  // its KV cache is of no more use
  }
};

/// Orders prompts by content without copying them.
struct ByContent {
  bool operator()(const std::vector<int32_t>* a, const std::vector<int32_t>* b) const { return *a < *b; }
};

}  // namespace

struct Generation::State {
  std::shared_ptr<const Model> model;
  // All that precedes a row's output: for a continued session its tokens, then the prompt.
  std::vector<std::vector<int32_t>> prompts;
  GenerationOptions options;
  Session* continued = nullptr;
  int64_t continued_length = 0;
  std::vector<Row> rows;
  bool has_prefilled = false;
  std::vector<float> logits;
  std::vector<GenerationEvent> undelivered;  // of steps that ran before one that threw, in one call of run()

  int64_t vocabulary() const { return model->config().vocabulary; }

  void check_options() const;
  void make_rows();
  std::vector<GenerationEvent> prefill();
  std::vector<GenerationEvent> decode();
  void check_continued(const Row& row, int64_t ran) const;
  void append(const std::vector<Session*>& sessions, const std::vector<std::vector<int32_t>>& tokens);
  GenerationEvent draw(size_t row, size_t logits_row) const;
  void commit(const std::vector<GenerationEvent>& events);
};

void Generation::State::check_options() const {
  check(options.sampling, vocabulary());
  check_eos(options.eos, vocabulary());
  require(options.copies >= 1, ErrorKind::kOption, "generate: copies must be at least 1, got ", options.copies);
  const int64_t count = checked_mul(static_cast<int64_t>(prompts.size()), options.copies, "generate: prompts x copies");
  require(static_cast<int64_t>(options.max_new_tokens.size()) == count, ErrorKind::kOption,
          "generate: max_new_tokens must have one entry for each of ", count, " rows, got ",
          options.max_new_tokens.size());
  if (continued != nullptr) {
    require(count == 1, ErrorKind::kOption, "generate: a session continues with one prompt and one copy, got ", count,
            " rows");
    require(&continued->model() == model.get(), ErrorKind::kOption, "generate: the session belongs to another model");
  }
  for (size_t i = 0; i < prompts.size(); ++i) {
    require(prompts[i].size() > static_cast<size_t>(continued_length), ErrorKind::kOption, "generate: prompt ", i,
            " is empty: there is nothing to predict from. Start with the BOS token?");
    check_token_ids(prompts[i].data(), static_cast<int64_t>(prompts[i].size()), vocabulary());
  }
}

void Generation::State::make_rows() {
  rows.resize(options.max_new_tokens.size());
  for (size_t r = 0; r < rows.size(); ++r) {
    Row& row = rows[r];
    row.prompt = r / static_cast<size_t>(options.copies);
    row.max_new_tokens = options.max_new_tokens[r];
    require(row.max_new_tokens >= 0, ErrorKind::kOption, "generate: max_new_tokens must be at least 0, got ",
            row.max_new_tokens);
    const int64_t context = continued != nullptr ? continued->capacity() : model->config().context;
    const int64_t before = static_cast<int64_t>(prompts[row.prompt].size());
    require(before <= context && row.max_new_tokens <= context - before, ErrorKind::kContextLength,
            "generate: ", before, " tokens and ", row.max_new_tokens, " new ones do not fit into ",
            continued != nullptr ? "the session's capacity of " : "the model's context of ", context,
            ". Shorten the prompt or ask for fewer tokens");
  }
  // All checks first: a batch that is refused must not have allocated caches.
  if (continued == nullptr) {
    int64_t needed = 0;
    for (const Row& row : rows) {
      const int64_t capacity = static_cast<int64_t>(prompts[row.prompt].size()) + row.max_new_tokens;
      if (row.max_new_tokens == 0) continue;
      const int64_t cache = model->backend().kv_cache_nbytes(model->kv_shape(capacity, options.kv_dtype));
      needed = checked_add(needed, cache, "KV cache");
    }
    model->backend().require_memory(needed, cat("generate: the KV caches of ", rows.size(), " sequences"));
  }
  for (Row& row : rows) {
    if (row.max_new_tokens == 0) continue;
    row.output.reserve(static_cast<size_t>(row.max_new_tokens));  // so that commit() cannot fail
    row.session = continued;
    if (continued == nullptr) {
      const int64_t before = static_cast<int64_t>(prompts[row.prompt].size());
      row.owned = std::make_unique<Session>(model, before + row.max_new_tokens, options.kv_dtype);
      row.session = row.owned.get();
    }
  }
}

/// A caller may use the continued session between two steps; what was generated would no longer follow from it.
void Generation::State::check_continued(const Row& row, int64_t ran) const {
  if (row.session != continued) return;
  const std::vector<int32_t>& prompt = prompts[row.prompt];
  const std::vector<int32_t>& tokens = continued->tokens();
  const size_t of_prompt = std::min(prompt.size(), static_cast<size_t>(ran));
  const bool same = tokens.size() == static_cast<size_t>(ran) &&
                    std::equal(tokens.begin(), tokens.begin() + static_cast<int64_t>(of_prompt), prompt.begin()) &&
                    std::equal(tokens.begin() + static_cast<int64_t>(of_prompt), tokens.end(), row.output.begin());
  require(same, ErrorKind::kOption, "generate: the session was changed while a generation continues it");
}

void Generation::State::append(const std::vector<Session*>& sessions, const std::vector<std::vector<int32_t>>& tokens) {
  logits.resize(sessions.size() * static_cast<size_t>(vocabulary()));
  Session::append_batch(sessions, tokens, LogitsRows::kLast, logits.data());
}

GenerationEvent Generation::State::draw(size_t row, size_t logits_row) const {
  throw_if_interrupted();
  const Row& drawn = rows[row];
  SampleArgs args;
  args.logits = TensorView(logits.data() + logits_row * static_cast<size_t>(vocabulary()), DType::kF32, {vocabulary()});
  args.options = &options.sampling;
  args.prompt = &prompts[drawn.prompt];
  args.output = &drawn.output;
  args.key = {.seed = options.seed, .stream = row, .counter = drawn.output.size()};
  const SampleResult sampled = model->backend().sample(args);

  Finish finish = Finish::kNone;
  if (contains(options.eos, sampled.token)) {
    finish = Finish::kEos;
  } else if (static_cast<int64_t>(drawn.output.size()) + 1 == drawn.max_new_tokens) {
    finish = Finish::kLength;
  }
  return {.row = static_cast<int64_t>(row), .token = sampled.token, .logprob = sampled.logprob, .finish = finish};
}

/// Nothing in here can fail: memory was reserved when the rows were made.
void Generation::State::commit(const std::vector<GenerationEvent>& events) {
  for (const GenerationEvent& event : events) {
    Row& row = rows[static_cast<size_t>(event.row)];
    if (event.token >= 0) row.output.push_back(event.token);
    if (event.finish != Finish::kNone) row.end(event.finish);
  }
}

/// Each different prompt runs once, for the first row that has it; the other rows copy its keys and values.
std::vector<GenerationEvent> Generation::State::prefill() {
  std::map<const std::vector<int32_t>*, size_t, ByContent> index_of;
  std::vector<Session*> leaders;
  std::vector<std::vector<int32_t>> tokens;
  for (const Row& row : rows) {
    if (row.session == nullptr) continue;
    const std::vector<int32_t>& prompt = prompts[row.prompt];
    if (!index_of.emplace(&prompt, leaders.size()).second) continue;
    check_continued(row, continued_length);
    leaders.push_back(row.session);
    tokens.emplace_back(prompt.begin() + continued_length, prompt.end());
  }
  append(leaders, tokens);

  try {
    std::vector<GenerationEvent> events;
    events.reserve(rows.size());
    for (size_t r = 0; r < rows.size(); ++r) {
      Row& row = rows[r];
      if (!row.is_running()) continue;
      if (row.session == nullptr) {
        events.push_back({.row = static_cast<int64_t>(r), .token = -1, .logprob = 0, .finish = Finish::kLength});
        continue;
      }
      const size_t leader = index_of.at(&prompts[row.prompt]);
      events.push_back(draw(r, leader));
      if (row.session != leaders[leader] && events.back().finish == Finish::kNone)
        row.session->copy_from(*leaders[leader]);
    }
    commit(events);
    has_prefilled = true;
    return events;
  } catch (...) {
    for (const Row& row : rows) {
      if (row.session != nullptr) row.session->rewind(continued_length);
    }
    throw;
  }
}

std::vector<GenerationEvent> Generation::State::decode() {
  std::vector<size_t> running;
  std::vector<Session*> sessions;
  std::vector<std::vector<int32_t>> tokens;
  for (size_t r = 0; r < rows.size(); ++r) {
    if (!rows[r].is_running()) continue;
    check_continued(rows[r], static_cast<int64_t>(prompts[rows[r].prompt].size() + rows[r].output.size()) - 1);
    running.push_back(r);
    sessions.push_back(rows[r].session);
    tokens.push_back({rows[r].output.back()});
  }
  append(sessions, tokens);

  try {
    std::vector<GenerationEvent> events;
    events.reserve(running.size());
    for (size_t i = 0; i < running.size(); ++i) events.push_back(draw(running[i], i));
    commit(events);
    return events;
  } catch (...) {
    for (Session* session : sessions) session->rewind(session->length() - 1);
    throw;
  }
}

Generation::Generation(std::shared_ptr<const Model> model, std::vector<std::vector<int32_t>> prompts,
                       GenerationOptions options, Session* continued)
    : state_(std::make_unique<State>()) {
  state_->model = std::move(model);
  state_->prompts = std::move(prompts);
  state_->options = std::move(options);
  if (continued != nullptr) {
    state_->continued = continued;
    state_->continued_length = continued->length();
    for (std::vector<int32_t>& prompt : state_->prompts) {
      prompt.insert(prompt.begin(), continued->tokens().begin(), continued->tokens().end());
    }
  }
  state_->check_options();
  state_->make_rows();
}

Generation::~Generation() = default;

int64_t Generation::rows() const { return static_cast<int64_t>(state_->rows.size()); }

bool Generation::done() const {
  return std::none_of(state_->rows.begin(), state_->rows.end(), [](const Row& row) { return row.is_running(); });
}

std::vector<GenerationEvent> Generation::step() { return run(1); }

std::vector<GenerationEvent> Generation::run(int64_t steps) {
  require(steps >= 0, ErrorKind::kOption, "generate: the number of steps must be at least 0, got ", steps);
  std::vector<GenerationEvent>& events = state_->undelivered;
  for (int64_t i = 0; i < steps && !done(); ++i) {
    // Room first (by doubling): once a step is committed its events must not be lost.
    const size_t needed = events.size() + state_->rows.size();
    if (events.capacity() < needed) events.reserve(std::max(needed, 2 * events.capacity()));
    const std::vector<GenerationEvent> step = state_->has_prefilled ? state_->decode() : state_->prefill();
    events.insert(events.end(), step.begin(), step.end());
  }
  return std::exchange(events, {});
}

void Generation::stop(int64_t row) {
  require(row >= 0 && row < rows(), ErrorKind::kOption, "generate: there is no row ", row, ", the rows are 0 to ",
          rows() - 1);
  Row& stopped = state_->rows[static_cast<size_t>(row)];
  if (stopped.is_running()) stopped.end(Finish::kStopped);
}

}  // namespace llama_ext
