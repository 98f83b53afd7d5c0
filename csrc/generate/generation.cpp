#include "generate/generation.h"

#include <optional>
#include <utility>

#include "core/checked.h"
#include "generate/batch.h"
#include "generate/eos.h"

namespace llama_ext {
namespace {

void check_speculation(const GenerationRequest& request) {
  const SpeculationOptions& speculation = request.options.speculation;
  require(speculation.tokens >= 0 && speculation.tokens <= kMostDrafted, ErrorKind::kOption, "generate: between 0 and ",
          kMostDrafted, " tokens can be drafted at a time, got ", speculation.tokens);
  if (speculation.model == nullptr) return;
  const int64_t vocabulary = request.model->config().vocabulary;
  const int64_t drafted = speculation.model->config().vocabulary;
  require(drafted == vocabulary, ErrorKind::kOption, "generate: the draft model has a vocabulary of ", drafted,
          " tokens and the model one of ", vocabulary, ": it must be the same vocabulary");
}

void check_options(const GenerationRequest& request) {
  require_language_model(request.model->config(), "generate");
  const GenerationOptions& options = request.options;
  const int64_t vocabulary = request.model->config().vocabulary;
  check(options.sampling, vocabulary);
  check_eos(options.eos, vocabulary);
  check_speculation(request);
  require(options.copies >= 1, ErrorKind::kOption, "generate: copies must be at least 1, got ", options.copies);
  require(options.max_batch_size >= 1, ErrorKind::kOption, "generate: max_batch_size must be at least 1, got ",
          options.max_batch_size);
  const int64_t count =
      checked_mul(static_cast<int64_t>(request.prompts.size()), options.copies, "generate: prompts x copies");
  require(static_cast<int64_t>(options.max_new_tokens.size()) == count, ErrorKind::kOption,
          "generate: max_new_tokens must have one entry for each of ", count, " rows, got ",
          options.max_new_tokens.size());
  if (request.continued != nullptr) {
    require(count == 1, ErrorKind::kOption, "generate: a session continues with one prompt and one copy, got ", count,
            " rows");
    require(&request.continued->model() == request.model.get(), ErrorKind::kOption,
            "generate: the session belongs to another model");
  }
  require(options.adapters.empty() || options.adapters.size() == request.prompts.size(), ErrorKind::kOption,
          "generate: adapters must have one entry for each of ", request.prompts.size(), " prompts, got ",
          options.adapters.size());
  for (const auto& adapter : options.adapters) {
    if (adapter) adapter->require_fits(request.model->config());
  }
  for (size_t i = 0; i < request.prompts.size(); ++i) {
    const std::vector<int32_t>& prompt = request.prompts[i];
    require(prompt.size() > static_cast<size_t>(request.continued_length), ErrorKind::kOption, "generate: prompt ", i,
            " is empty: there is nothing to predict from. Start with the BOS token?");
    check_token_ids(prompt.data(), static_cast<int64_t>(prompt.size()), vocabulary);
  }
}

void check_lengths(const GenerationRequest& request) {
  const bool continues = request.continued != nullptr;
  const int64_t context = continues ? request.continued->capacity() : request.model->config().context;
  for (size_t r = 0; r < request.options.max_new_tokens.size(); ++r) {
    const int64_t added = request.options.max_new_tokens[r];
    require(added >= 0, ErrorKind::kOption, "generate: max_new_tokens must be at least 0, got ", added);
    const int64_t before =
        static_cast<int64_t>(request.prompts[r / static_cast<size_t>(request.options.copies)].size());
    require(before <= context && added <= context - before, ErrorKind::kContextLength, "generate: ", before,
            " tokens and ", added, " new ones do not fit into ",
            continues ? "the session's capacity of " : "the model's context of ", context,
            ". Shorten the prompt or ask for fewer tokens");
  }
}

}  // namespace

struct Generation::State {
  GenerationRequest request;
  std::optional<Batch> batch;
  std::vector<GenerationEvent> undelivered;  // of steps that ran before one that threw, in one call of run()
};

Generation::Generation(std::shared_ptr<const Model> model, std::vector<std::vector<int32_t>> prompts,
                       GenerationOptions options, Session* continued)
    : state_(std::make_unique<State>()) {
  GenerationRequest& request = state_->request;
  request.model = std::move(model);
  request.prompts = std::move(prompts);
  request.options = std::move(options);
  if (continued != nullptr) {
    request.continued = continued;
    request.continued_length = continued->length();
    for (std::vector<int32_t>& prompt : request.prompts) {
      prompt.insert(prompt.begin(), continued->tokens().begin(), continued->tokens().end());
    }
  }
  check_options(request);
  check_lengths(request);
  state_->batch.emplace(request);
}

Generation::~Generation() = default;

int64_t Generation::rows() const { return static_cast<int64_t>(state_->batch->rows()); }

bool Generation::done() const { return state_->batch->done(); }

std::vector<GenerationEvent> Generation::step() { return run(1); }

std::vector<GenerationEvent> Generation::run(int64_t steps) {
  require(steps >= 0, ErrorKind::kOption, "generate: the number of steps must be at least 0, got ", steps);
  for (int64_t i = 0; i < steps && !done(); ++i) state_->batch->step(state_->undelivered);
  return std::exchange(state_->undelivered, {});
}

void Generation::stop(int64_t row) {
  require(row >= 0 && row < rows(), ErrorKind::kOption, "generate: there is no row ", row, ", the rows are 0 to ",
          rows() - 1);
  state_->batch->stop(static_cast<size_t>(row));
}

RowCounts Generation::row_counts(int64_t row) const {
  require(row >= 0 && row < rows(), ErrorKind::kOption, "generate: there is no row ", row, ", the rows are 0 to ",
          rows() - 1);
  return state_->batch->row_counts(static_cast<size_t>(row));
}

GenerationCounts Generation::counts() const { return state_->batch->counts(); }

}  // namespace llama_ext
