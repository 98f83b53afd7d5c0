#include "generate/draft.h"

#include <algorithm>
#include <utility>

#include "core/interrupt.h"
#include "generate/eos.h"
#include "generate/prefix.h"

namespace llama_ext {
namespace {

// Ends of this length are compared; a longer match is hardly a better sign, and a single token is hardly any.
constexpr int64_t kLongestMatch = 8;
constexpr int64_t kShortestMatch = 2;

/// The tokens that `session` still has to run before it can say what follows `row`, once those it guessed wrong are
/// forgotten. At least one, as only running a token gives logits.
std::vector<int32_t> catch_up(const Row& row, Session& session) {
  const int64_t length = row.prompt_length() + row.output_length();
  const std::vector<int32_t>& held = session.tokens();
  const int64_t most = std::min(session.length(), length - 1);
  int64_t kept = 0;
  while (kept < most && held[static_cast<size_t>(kept)] == row.token(kept)) ++kept;
  session.rewind(kept);
  std::vector<int32_t> missing;
  missing.reserve(static_cast<size_t>(length - kept));
  for (int64_t position = kept; position < length; ++position) missing.push_back(row.token(position));
  return missing;
}

/// A row that is guessed for, and what its draft session runs next. Its guesses lie at the end of its output, where the
/// penalties look for them, until this goes.
class Guess {
 public:
  Guess(Row& row, int64_t wanted)
      : row_(&row), length_(row.output.size()), wanted_(static_cast<size_t>(wanted)), next_(catch_up(row, session())) {}
  Guess(Guess&& other) noexcept
      : row_(std::exchange(other.row_, nullptr)),
        length_(other.length_),
        wanted_(other.wanted_),
        next_(std::move(other.next_)) {}
  Guess& operator=(Guess&&) = delete;
  ~Guess() {
    if (row_ != nullptr) row_->output.resize(length_);
  }

  Row& row() const { return *row_; }
  Session& session() const { return *row_->draft_session; }
  SessionChunk chunk() const {
    return {.session = &session(),
            .tokens = next_.data(),
            .count = static_cast<int64_t>(next_.size()),
            .logits = LogitsRows::kLast};
  }
  bool wants_more() const { return row_->draft.size() < wanted_; }
  void take(int32_t token, bool ends) {
    row_->draft.push_back(token);
    row_->output.push_back(token);  // there is room for every token that the row may yet get
    next_.assign(1, token);
    if (ends) wanted_ = 0;
  }

 private:
  Row* row_;
  size_t length_;
  size_t wanted_;
  std::vector<int32_t> next_;
};

/// Says whose error it is: the words of the model itself are about "the model".
template <typename Work>
auto of_draft_model(Work&& work) {
  try {
    return work();
  } catch (const Error& error) {
    throw Error(error.kind(), cat("draft model: ", error.what()));
  }
}

}  // namespace

std::vector<int32_t> look_up_draft(const Row& row, int64_t count) {
  const int64_t length = row.prompt_length() + row.output_length();
  int64_t longest = kShortestMatch - 1;
  int64_t follows = 0;  // where the best match goes on
  for (int64_t end = length - 1; end >= kShortestMatch && longest < kLongestMatch; --end) {
    const int64_t most = std::min(end, kLongestMatch);
    int64_t matched = 0;
    while (matched < most && row.token(end - 1 - matched) == row.token(length - 1 - matched)) ++matched;
    if (matched > longest) {
      longest = matched;
      follows = end;
    }
  }
  std::vector<int32_t> draft;
  if (follows == 0) return draft;
  draft.reserve(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) {
    const int64_t position = follows + i;
    draft.push_back(position < length ? row.token(position) : draft[static_cast<size_t>(position - length)]);
  }
  return draft;
}

int64_t DraftModel::nbytes(const Row& row) const {
  return model_->backend().kv_cache_nbytes(model_->kv_shape(capacity(row), kv_dtype_));
}

std::unique_ptr<Session> DraftModel::create_session(const Row& row, const Session* source) const {
  auto session = std::make_unique<Session>(model_, capacity(row), kv_dtype_);
  if (source != nullptr) {
    const int64_t shared = std::min(common_prefix(*row.prompt, source->tokens()), session->capacity());
    if (shared > 0) session->copy_from(*source, shared);
  }
  return session;
}

void DraftModel::copy(const Row& row, const Row& other) const {
  const int64_t length = std::min(other.draft_session->length(), row.draft_session->capacity());
  row.draft_session->copy_from(*other.draft_session, length);
}

int64_t DraftModel::read_prompts(const std::vector<Row*>& rows) const {
  std::vector<SessionChunk> chunks;
  int64_t ran = 0;
  for (const Row* row : rows) {
    const int64_t held = row->draft_session->length();
    const int64_t count = row->prompt_length() - held;
    if (count <= 0 || row->prompt_length() > row->draft_session->capacity()) continue;
    chunks.push_back({.session = row->draft_session.get(),
                      .tokens = row->prompt->data() + held,
                      .count = count,
                      .logits = LogitsRows::kNone});
    ran += count;
  }
  of_draft_model([&] { Session::append_batch(chunks, nullptr); });
  return ran;
}

int64_t DraftModel::draft(const std::vector<Row*>& rows, const std::vector<int64_t>& wanted,
                          const GenerationOptions& options) const {
  std::vector<Guess> guesses;
  guesses.reserve(rows.size());
  for (size_t i = 0; i < rows.size(); ++i) {
    Row& row = *rows[i];
    row.draft.clear();
    // The first guess needs everything so far to fit, each further one a position more.
    const int64_t room = row.draft_session->capacity() - row.prompt_length() - row.output_length() + 1;
    const int64_t count = std::min(wanted[i], room);
    if (count <= 0) continue;
    row.draft.reserve(static_cast<size_t>(count));
    guesses.emplace_back(row, count);
  }
  int64_t ran = 0;
  const int64_t vocabulary = model_->config().vocabulary;
  std::vector<float> logits;
  std::vector<SampleArgs> args;
  std::vector<SampleResult> results;
  while (true) {
    std::vector<SessionChunk> chunks;
    std::vector<Guess*> running;
    for (Guess& guess : guesses) {
      if (!guess.wants_more()) continue;
      chunks.push_back(guess.chunk());
      running.push_back(&guess);
      ran += chunks.back().count;
    }
    if (running.empty()) return ran;
    logits.resize(running.size() * static_cast<size_t>(vocabulary));
    of_draft_model([&] {
      Session::append_batch(chunks, logits.data());
      throw_if_interrupted();
      args.clear();
      for (const Guess* guess : running) {
        const Row& row = guess->row();
        SampleArgs& one = args.emplace_back();
        one.logits =
            TensorView(logits.data() + (args.size() - 1) * static_cast<size_t>(vocabulary), DType::kF32, {vocabulary});
        one.options = &options.sampling;
        one.prompt = row.prompt;
        one.output = &row.output;
        one.key = {.seed = options.seed, .stream = static_cast<uint64_t>(row.index), .counter = row.output.size()};
      }
      results.resize(args.size());
      model_->backend().sample(args, results);
      for (size_t i = 0; i < running.size(); ++i) {
        running[i]->take(results[i].token, contains(options.eos, results[i].token));
      }
    });
  }
}

}  // namespace llama_ext
