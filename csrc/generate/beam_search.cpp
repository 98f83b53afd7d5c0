#include "generate/beam_search.h"

#include <algorithm>
#include <cmath>
#include <set>
#include <utility>

#include "core/interrupt.h"
#include "generate/eos.h"
#include "ops/log_sum_exp.h"

namespace llama_ext {
namespace {

constexpr int64_t kMaxBeams = 1024;

/// A sequence still growing. `cache` holds the prompt and all tokens but the last one.
struct Beam {
  std::vector<int32_t> tokens;
  double logprob = 0;
  std::unique_ptr<KvCache> cache;
};

/// A beam and one more token.
struct Candidate {
  double logprob = 0;
  size_t beam = 0;
  int32_t token = 0;
};

bool better(const Candidate& a, const Candidate& b) {
  if (a.logprob != b.logprob) return a.logprob > b.logprob;
  if (a.beam != b.beam) return a.beam < b.beam;
  return a.token < b.token;
}

class BeamSearch {
 public:
  BeamSearch(const Model& model, const std::vector<int32_t>& prompt, const BeamSearchOptions& options)
      : model_(model),
        prompt_(prompt),
        options_(options),
        cache_shape_(model.kv_shape(static_cast<int64_t>(prompt.size()) + options.max_new_tokens, options.kv_dtype)) {
    // Even if every eos follows every beam, enough candidates are left to go on with.
    const size_t eos_count = std::set<int32_t>(options.eos.begin(), options.eos.end()).size();
    candidates_kept_ = std::max<size_t>(2, 1 + eos_count) * beams_wanted();
  }

  std::vector<BeamHypothesis> run() {
    // While beams grow, the old ones and the new ones are there together.
    model_.backend().require_memory(
        checked_mul(2 * options_.beams, model_.backend().kv_cache_nbytes(cache_shape_), "KV cache"),
        cat("beam search: the KV caches of ", options_.beams, " beams"));
    std::vector<Beam> beams(1);
    beams[0].cache = model_.backend().create_kv_cache(cache_shape_);
    forward_prompt(beams[0]);
    for (int64_t length = 1;; ++length) {
      const std::vector<Candidate> next = finish(beams, best_candidates(beams), length);
      if (next.empty() || is_over(next.front(), length)) break;
      beams = grow(std::move(beams), next, length);
      forward_last_tokens(beams, length);
    }
    if (complete_.size() > static_cast<size_t>(options_.returned))
      complete_.resize(static_cast<size_t>(options_.returned));
    return std::move(complete_);
  }

 private:
  size_t beams_wanted() const { return static_cast<size_t>(options_.beams); }

  double score(double logprob, int64_t length) const {
    return logprob / std::pow(static_cast<double>(length), options_.length_penalty);
  }

  void forward_prompt(const Beam& beam) {
    logits_.resize(static_cast<size_t>(model_.config().vocabulary));
    forward(model_,
            {{.cache = beam.cache.get(),
              .position = 0,
              .tokens = prompt_.data(),
              .count = static_cast<int64_t>(prompt_.size()),
              .logits = LogitsRows::kLast,
              .adapter = options_.adapter.get()}},
            logits_.data());
  }

  void forward_last_tokens(const std::vector<Beam>& beams, int64_t length) {
    logits_.resize(beams.size() * static_cast<size_t>(model_.config().vocabulary));
    std::vector<Chunk> chunks;
    for (const Beam& beam : beams) {
      chunks.push_back({.cache = beam.cache.get(),
                        .position = static_cast<int64_t>(prompt_.size()) + length - 1,
                        .tokens = &beam.tokens.back(),
                        .count = 1,
                        .logits = LogitsRows::kLast,
                        .adapter = options_.adapter.get()});
    }
    forward(model_, chunks, logits_.data());
  }

  /// The best continuations of all beams by one token, best first.
  std::vector<Candidate> best_candidates(const std::vector<Beam>& beams) const {
    const int64_t vocabulary = model_.config().vocabulary;
    std::vector<Candidate> heap;  // the worst of those kept on top
    std::vector<LogSumExp> sums(beams.size());
    model_.backend().log_sum_exp({.logits = {static_cast<const void*>(logits_.data()),
                                             DType::kF32,
                                             {static_cast<int64_t>(beams.size()), vocabulary}},
                                  .out = sums.data()});
    for (size_t b = 0; b < beams.size(); ++b) {
      throw_if_interrupted();
      const float* logits = logits_.data() + b * static_cast<size_t>(vocabulary);
      const double base = beams[b].logprob - sums[b].value;
      for (int32_t token = 0; token < vocabulary; ++token) {
        const Candidate candidate{.logprob = base + static_cast<double>(logits[token]), .beam = b, .token = token};
        if (heap.size() == candidates_kept_) {
          if (!better(candidate, heap.front())) continue;
          std::pop_heap(heap.begin(), heap.end(), better);
          heap.pop_back();
        }
        heap.push_back(candidate);
        std::push_heap(heap.begin(), heap.end(), better);
      }
    }
    std::sort_heap(heap.begin(), heap.end(), better);
    return heap;
  }

  /// Moves the candidates that end here to the complete hypotheses, and returns those to go on with. Only an ending
  /// among the best `beams` counts: one further down is not a result a search of this width would have reached.
  std::vector<Candidate> finish(const std::vector<Beam>& beams, const std::vector<Candidate>& candidates,
                                int64_t length) {
    const bool is_last = length == options_.max_new_tokens;
    std::vector<Candidate> next;
    for (size_t i = 0; i < candidates.size(); ++i) {
      const Candidate& candidate = candidates[i];
      const bool is_eos = contains(options_.eos, candidate.token);
      if (is_eos || is_last) {
        if (i < beams_wanted()) complete(beams[candidate.beam], candidate, length, is_eos);
      } else if (next.size() < beams_wanted()) {
        next.push_back(candidate);
      }
    }
    return next;
  }

  /// Keeps the best `beams` hypotheses, best first; of equal ones, the earlier.
  void complete(const Beam& beam, const Candidate& candidate, int64_t length, bool is_eos) {
    BeamHypothesis hypothesis{.tokens = beam.tokens, .score = score(candidate.logprob, length), .finished = is_eos};
    hypothesis.tokens.push_back(candidate.token);
    const auto place =
        std::upper_bound(complete_.begin(), complete_.end(), hypothesis,
                         [](const BeamHypothesis& a, const BeamHypothesis& b) { return a.score > b.score; });
    complete_.insert(place, std::move(hypothesis));
    if (complete_.size() > beams_wanted()) complete_.pop_back();
  }

  bool is_over(const Candidate& best_running, int64_t length) const {
    if (complete_.size() < beams_wanted()) return false;
    // One beam is greedy search: what follows the first eos is never looked at.
    if (options_.early_stopping || options_.beams == 1) return true;
    return score(best_running.logprob, length) <= complete_.back().score;
  }

  /// The beams of the next step. The first child of a beam takes over its cache; its siblings get caches of beams that
  /// have no children, or new ones, and copy into them.
  std::vector<Beam> grow(std::vector<Beam> parents, const std::vector<Candidate>& next, int64_t length) {
    std::vector<char> has_child(parents.size(), 0);
    for (const Candidate& candidate : next) has_child[candidate.beam] = 1;
    for (size_t i = 0; i < parents.size(); ++i) {
      if (has_child[i] == 0) spare_.push_back(std::move(parents[i].cache));
    }

    const int64_t positions = static_cast<int64_t>(prompt_.size()) + length - 1;
    std::vector<Beam> children(next.size());
    std::vector<KvCache*> cache_of(parents.size(), nullptr);  // once a first child has it
    for (size_t i = 0; i < next.size(); ++i) {
      Beam& parent = parents[next[i].beam];
      KvCache*& taken = cache_of[next[i].beam];
      if (taken == nullptr) {
        taken = parent.cache.get();
        children[i].cache = std::move(parent.cache);
      } else {
        children[i].cache = spare_cache();
        model_.backend().copy_kv_cache(*children[i].cache, *taken, positions);
      }
      children[i].logprob = next[i].logprob;
      children[i].tokens.reserve(static_cast<size_t>(options_.max_new_tokens));
      children[i].tokens.assign(parent.tokens.begin(), parent.tokens.end());
      children[i].tokens.push_back(next[i].token);
    }
    return children;
  }

  std::unique_ptr<KvCache> spare_cache() {
    if (spare_.empty()) return model_.backend().create_kv_cache(cache_shape_);
    std::unique_ptr<KvCache> cache = std::move(spare_.back());
    spare_.pop_back();
    return cache;
  }

  const Model& model_;
  const std::vector<int32_t>& prompt_;
  const BeamSearchOptions& options_;
  KvCacheShape cache_shape_;
  size_t candidates_kept_ = 0;
  std::vector<float> logits_;
  std::vector<BeamHypothesis> complete_;
  std::vector<std::unique_ptr<KvCache>> spare_;
};

}  // namespace

std::vector<BeamHypothesis> beam_search(const std::shared_ptr<const Model>& model, const std::vector<int32_t>& prompt,
                                        const BeamSearchOptions& options) {
  const int64_t count = static_cast<int64_t>(prompt.size());
  const int64_t context = model->config().context;
  require(options.beams >= 1 && options.beams <= kMaxBeams, ErrorKind::kOption, "beam_search: beams must be in [1, ",
          kMaxBeams, "], got ", options.beams);
  require(options.returned >= 1 && options.returned <= options.beams, ErrorKind::kOption,
          "beam_search: the number of returned sequences must be in [1, beams = ", options.beams, "], got ",
          options.returned);
  require(options.max_new_tokens >= 0, ErrorKind::kOption, "beam_search: max_new_tokens must be at least 0, got ",
          options.max_new_tokens);
  require(std::isfinite(options.length_penalty), ErrorKind::kOption, "beam_search: length_penalty must be finite, got ",
          options.length_penalty);
  require_language_model(model->config(), "beam_search");
  check_eos(options.eos, model->config().vocabulary);
  require(count > 0, ErrorKind::kOption, "beam_search: the prompt is empty: there is nothing to predict from");
  check_token_ids(prompt.data(), count, model->config().vocabulary);
  require(count <= context && options.max_new_tokens <= context - count, ErrorKind::kContextLength,
          "beam_search: ", count, " tokens and ", options.max_new_tokens,
          " new ones do not fit into the model's context of ", context, ". Shorten the prompt or ask for fewer tokens");
  if (options.adapter) options.adapter->require_fits(model->config());
  if (options.max_new_tokens == 0) return {BeamHypothesis{}};
  return BeamSearch(*model, prompt, options).run();
}

}  // namespace llama_ext
