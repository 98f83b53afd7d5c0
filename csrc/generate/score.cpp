#include "generate/score.h"

#include <algorithm>
#include <utility>

#include "ops/log_sum_exp.h"

namespace llama_ext {
namespace {

// Logits held at a time: 64 MiB, but never fewer than 64 rows (one product of the head should have work) or more than a pass.
constexpr int64_t kLogitsHeld = int64_t{1} << 24;
constexpr int64_t kLeastRows = 64;

// Sequences of one logits call run together until they have tokens for this many passes, which bounds their KV caches.
constexpr int64_t kGroupPasses = 4;

Score score_of(const float* logits, const LogSumExp& sum, int32_t token) {
  return {.logprob = static_cast<float>(static_cast<double>(logits[token]) - sum.value),
          .is_greedy = sum.argmax == token};
}

}  // namespace

std::vector<Score> score(const std::shared_ptr<const Model>& model, const std::vector<int32_t>& tokens, int64_t first,
                         const std::function<void(int64_t)>& advance, std::shared_ptr<const Adapter> adapter,
                         DType kv_dtype) {
  const int64_t count = static_cast<int64_t>(tokens.size());
  require_language_model(model->config(), "score");
  const int64_t vocabulary = model->config().vocabulary;
  require(first >= 1 && first <= count, ErrorKind::kOption, "score: first must be in [1, ", count,
          "] (the first token has nothing before it), got ", first);
  require(count <= model->config().context, ErrorKind::kContextLength, "score: ", count,
          " tokens do not fit into the model's context of ", model->config().context);
  check_token_ids(tokens.data(), count, vocabulary);
  std::vector<Score> scores;
  if (first == count) return scores;
  scores.reserve(static_cast<size_t>(count - first));

  // The last token is predicted, never run. Logits at position p score token p + 1.
  Session session(model, count - 1, kv_dtype, std::move(adapter));
  session.append(tokens.data(), first - 1, LogitsRows::kNone, nullptr);
  const int64_t rows = std::clamp(kLogitsHeld / vocabulary, kLeastRows, model->backend().pass_rows());
  std::vector<float> logits(static_cast<size_t>(std::min(rows, count - first) * vocabulary));
  std::vector<LogSumExp> sums(static_cast<size_t>(std::min(rows, count - first)));
  for (int64_t position = first - 1; position < count - 1;) {
    const int64_t ran = std::min(rows, count - 1 - position);
    session.append(tokens.data() + position, ran, LogitsRows::kAll, logits.data());
    model->backend().log_sum_exp({.logits = {logits.data(), DType::kF32, {ran, vocabulary}}, .out = sums.data()});
    for (int64_t i = 0; i < ran; ++i) {
      scores.push_back(score_of(logits.data() + i * vocabulary, sums[static_cast<size_t>(i)],
                                tokens[static_cast<size_t>(position + i + 1)]));
    }
    position += ran;
    if (advance) advance(ran);
  }
  return scores;
}

void sequence_logits(const Model& model, const std::vector<std::vector<int32_t>>& sequences,
                     const std::vector<std::shared_ptr<const Adapter>>& adapters, LogitsRows which, float* logits) {
  require(adapters.empty() || adapters.size() == sequences.size(), ErrorKind::kOption,
          "logits: adapters must have one entry for each of ", sequences.size(), " sequences, got ", adapters.size());
  for (const auto& adapter : adapters) {
    if (adapter) adapter->require_fits(model.config());
  }
  for (const std::vector<int32_t>& sequence : sequences) {
    const int64_t count = static_cast<int64_t>(sequence.size());
    require(count <= model.config().context, ErrorKind::kContextLength, "logits: ", count,
            " tokens do not fit into the model's context of ", model.config().context);
    check_token_ids(sequence.data(), count, model.config().vocabulary);
  }
  const int64_t group_rows = kGroupPasses * model.backend().pass_rows();
  for (size_t next = 0; next < sequences.size();) {
    std::vector<std::unique_ptr<KvCache>> caches;
    std::vector<Chunk> chunks;
    int64_t rows = 0;
    for (; next < sequences.size() && rows < group_rows; ++next) {
      const int64_t count = static_cast<int64_t>(sequences[next].size());
      if (count == 0) continue;
      caches.push_back(model.backend().create_kv_cache(model.kv_shape(count, DType::kF32)));
      chunks.push_back({.cache = caches.back().get(),
                        .position = 0,
                        .tokens = sequences[next].data(),
                        .count = count,
                        .logits = which,
                        .adapter = adapters.empty() ? nullptr : adapters[next].get()});
      rows += count;
    }
    forward(model, chunks, logits);
    logits += logits_rows(chunks) * model.config().outputs();
  }
}

}  // namespace llama_ext
