#include "ops/sample.h"

#include <algorithm>
#include <array>
#include <cfloat>
#include <cmath>
#include <limits>
#include <numeric>

#include "ops/argument_checks.h"
#include "ops/embedding.h"
#include "ops/log_sum_exp.h"
#include "ops/sample_next.h"

namespace llama_ext {

// ---------------------------------------------------------------------------------------------------------------------
// Random numbers.

double random_uniform(const RandomKey& key) {
  const auto low = [](uint64_t value) { return static_cast<uint32_t>(value); };
  const auto high = [](uint64_t value) { return static_cast<uint32_t>(value >> 32); };
  std::array<uint32_t, 4> block = {low(key.counter), high(key.counter), low(key.stream), high(key.stream)};
  uint32_t key0 = low(key.seed);
  uint32_t key1 = high(key.seed);
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xd2511f53} * block[0];
    const uint64_t product1 = uint64_t{0xcd9e8d57} * block[2];
    block = {high(product1) ^ block[1] ^ key0, low(product1), high(product0) ^ block[3] ^ key1, low(product0)};
    key0 += 0x9e3779b9u;
    key1 += 0xbb67ae85u;
  }
  const uint64_t bits = (uint64_t{block[1]} << 32) | block[0];
  return static_cast<double>(bits >> 11) * 0x1p-53;
}

// ---------------------------------------------------------------------------------------------------------------------
// Checks.

bool has_penalties(const SamplingOptions& options) {
  return options.repetition_penalty != 1.0 || options.presence_penalty != 0.0 || options.frequency_penalty != 0.0;
}

namespace {

void require_finite(double value, const char* field) {
  require(std::isfinite(value), ErrorKind::kOption, "sample: ", field, " must be finite, got ", value);
}

}  // namespace

void check(const SamplingOptions& options, int64_t vocabulary) {
  require(std::isfinite(options.temperature) && options.temperature >= 0, ErrorKind::kOption,
          "sample: temperature must be a number of at least 0 (0 is greedy), got ", options.temperature);
  require(options.top_k >= 0, ErrorKind::kOption, "sample: top_k must be at least 0 (0 keeps all), got ",
          options.top_k);
  require(options.top_p > 0 && options.top_p <= 1, ErrorKind::kOption,
          "sample: top_p must be a probability, 0 < top_p <= 1, got ", options.top_p);
  require(options.min_p >= 0 && options.min_p < 1, ErrorKind::kOption,
          "sample: min_p must be a share, 0 <= min_p < 1, got ", options.min_p);
  require(std::isfinite(options.repetition_penalty) && options.repetition_penalty > 0, ErrorKind::kOption,
          "sample: repetition_penalty must be a number above 0 (1 is none), got ", options.repetition_penalty);
  require_finite(options.presence_penalty, "presence_penalty");
  require_finite(options.frequency_penalty, "frequency_penalty");
  for (const auto& [token, bias] : options.logit_bias) {
    require(token >= 0 && token < vocabulary, ErrorKind::kOption, "sample: logit_bias names token ", token,
            ", the vocabulary has ", vocabulary, " tokens");
    require(bias < std::numeric_limits<float>::infinity(), ErrorKind::kOption, "sample: logit_bias of token ", token,
            " must be finite or -inf, got ", bias);
  }
}

void check(const SampleArgs& args) {
  require(args.options != nullptr, ErrorKind::kInternal, "sample: options are missing");
  require_tensor(args.logits, DType::kF32, {-1}, Rows::kContiguous, "sample", "logits");
  const int64_t vocabulary = args.logits.rows();
  require(vocabulary > 0 && vocabulary <= std::numeric_limits<int32_t>::max(), ErrorKind::kShape,
          "sample: logits must have between 1 and 2147483647 entries, got ", vocabulary);
  check(*args.options, vocabulary);
  if (!has_penalties(*args.options)) return;  // only penalties read the tokens
  for (const std::vector<int32_t>* tokens : {args.prompt, args.output}) {
    if (tokens != nullptr) check_token_ids(tokens->data(), static_cast<int64_t>(tokens->size()), vocabulary);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// The steps of sampling.

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

/// The largest of the processed logits, -inf when all are. Throws NumericError, naming the first token, for a NaN or +inf.
double finite_max(const std::vector<double>& logits) {
  double largest = -kInfinity;
  for (size_t token = 0; token < logits.size(); ++token) {
    require(logits[token] <= std::numeric_limits<double>::max(), ErrorKind::kNumeric,
            "sample: the processed logit of token ", token, " is ", logits[token],
            ". Are the weights corrupt, or too large for their dtype?");
    largest = std::max(largest, logits[token]);
  }
  return largest;
}

/// logit_bias and the penalties, in place.
void adjust(const SampleArgs& args, std::vector<double>& logits) {
  const SamplingOptions& options = *args.options;
  const auto at = [](int32_t token) { return static_cast<size_t>(token); };
  for (const auto& [token, bias] : options.logit_bias) logits[at(token)] += static_cast<double>(bias);

  if (options.repetition_penalty != 1.0) {
    std::vector<uint8_t> seen(logits.size(), 0);
    for (const std::vector<int32_t>* tokens : {args.prompt, args.output}) {
      if (tokens == nullptr) continue;
      for (int32_t token : *tokens) {
        if (seen[at(token)] != 0) continue;
        seen[at(token)] = 1;
        double& logit = logits[at(token)];
        logit = logit > 0 ? logit / options.repetition_penalty : logit * options.repetition_penalty;
      }
    }
  }
  if (args.output != nullptr && (options.presence_penalty != 0.0 || options.frequency_penalty != 0.0)) {
    std::vector<int32_t> counts(logits.size(), 0);
    for (int32_t token : *args.output) ++counts[at(token)];
    for (int32_t token : *args.output) {
      int32_t& count = counts[at(token)];
      if (count == 0) continue;
      logits[at(token)] -= options.presence_penalty + options.frequency_penalty * count;
      count = 0;  // done: later occurrences are counted already
    }
  }
}

struct Candidate {
  double logit;
  int32_t token;
};

/// The order of top_k and top_p: the most likely first, the lowest id among equals.
bool is_likelier(const Candidate& a, const Candidate& b) {
  return a.logit > b.logit || (a.logit == b.logit && a.token < b.token);
}

/// Weights exp((logit - largest) / temperature).
struct Weighing {
  double largest;
  double temperature;
  const LogitsLoops& loops;

  void in_place(std::vector<double>& logits) const {
    loops.weights(logits.data(), static_cast<int64_t>(logits.size()), largest, temperature);
  }
  std::vector<double> of(const Candidate* begin, const Candidate* end) const {
    std::vector<double> weights(static_cast<size_t>(end - begin));
    std::transform(begin, end, weights.begin(), [](const Candidate& candidate) { return candidate.logit; });
    in_place(weights);
    return weights;
  }
};

/// Drops all but the most likely candidates, as few as reach top_p of the total weight. A quickselect on weight: each
/// step narrows the range in which the last of them lies, so little is ever sorted.
void keep_top_p(std::vector<Candidate>& candidates, double top_p, const Weighing& weighing) {
  constexpr std::ptrdiff_t kSortBelow = 64;
  const auto weight_between = [&](const Candidate* from, const Candidate* to) {
    const std::vector<double> weights = weighing.of(from, to);
    return std::accumulate(weights.begin(), weights.end(), 0.0);
  };
  Candidate* begin = candidates.data();
  Candidate* end = begin + candidates.size();
  const double wanted = top_p * weight_between(begin, end);
  double reached = 0;  // by everything before `begin`
  // The first cut is far off the middle, as the front usually holds most of the weight.
  for (std::ptrdiff_t parts = 16; end - begin > kSortBelow; parts = 2) {
    Candidate* const middle = begin + (end - begin) / parts;
    std::nth_element(begin, middle, end, is_likelier);
    const double with_front = reached + weight_between(begin, middle);
    if (with_front >= wanted) {
      end = middle;
    } else {
      reached = with_front;
      begin = middle;
    }
  }
  std::sort(begin, end, is_likelier);
  for (const double weight : weighing.of(begin, end)) {
    if (reached >= wanted) break;
    reached += weight;
    ++begin;
  }
  candidates.resize(static_cast<size_t>(std::max<std::ptrdiff_t>(begin - candidates.data(), 1)));
}

/// What top_k and top_p leave, in the order of ids: the draw then does not depend on how they were found.
std::vector<Candidate> filtered(const std::vector<double>& logits, const SamplingOptions& options,
                                const Weighing& weighing) {
  std::vector<Candidate> candidates;
  candidates.reserve(logits.size());
  for (size_t token = 0; token < logits.size(); ++token) {
    if (logits[token] > -kInfinity) candidates.push_back({logits[token], static_cast<int32_t>(token)});
  }
  const size_t kept = static_cast<size_t>(options.top_k);
  if (kept > 0 && kept < candidates.size()) {
    std::nth_element(candidates.begin(), candidates.begin() + options.top_k, candidates.end(), is_likelier);
    candidates.resize(kept);
  }
  if (options.top_p < 1) keep_top_p(candidates, options.top_p, weighing);
  std::sort(candidates.begin(), candidates.end(),
            [](const Candidate& a, const Candidate& b) { return a.token < b.token; });
  return candidates;
}

/// Draws an index by weight, without those below min_p.
size_t draw(const std::vector<double>& weights, double min_p, const RandomKey& key) {
  // The most likely has weight 1.
  const auto kept = [&](double weight) { return weight >= min_p ? weight : 0.0; };
  // In lanes, as a chain of additions would wait for each.
  std::array<double, 8> lanes = {};
  size_t i = 0;
  for (; i + lanes.size() <= weights.size(); i += lanes.size()) {
    for (size_t lane = 0; lane < lanes.size(); ++lane) lanes[lane] += kept(weights[i + lane]);
  }
  double total = 0;
  for (const double sum : lanes) total += sum;
  for (; i < weights.size(); ++i) total += kept(weights[i]);

  const double target = random_uniform(key) * total;
  double reached = 0;
  size_t last = 0;
  for (i = 0; i < weights.size(); ++i) {
    const double weight = kept(weights[i]);
    if (weight == 0) continue;
    reached += weight;
    last = i;
    if (reached > target) break;
  }
  return last;  // rounding may leave `reached` at the target: then the last one that has any weight
}

int64_t choose(const SampleArgs& args, int64_t argmax, const LogitsLoops& loops) {
  const SamplingOptions& options = *args.options;
  const float* raw = args.logits.f32();
  const int64_t vocabulary = args.logits.rows();
  const bool is_greedy = options.temperature == 0.0;
  const bool is_adjusted = has_penalties(options) || !options.logit_bias.empty();
  if (is_greedy && !is_adjusted) return argmax;

  std::vector<double> logits(raw, raw + vocabulary);
  double largest = static_cast<double>(raw[argmax]);
  if (is_adjusted) {
    adjust(args, logits);
    largest = finite_max(logits);
    require(largest > -kInfinity, ErrorKind::kNumeric,
            "sample: no token is left to choose from: every logit is -inf once logit_bias is added");
  }
  if (is_greedy) return std::find(logits.begin(), logits.end(), largest) - logits.begin();
  const Weighing weighing{largest, options.temperature, loops};
  if (options.top_k == 0 && options.top_p == 1) {
    weighing.in_place(logits);
    return static_cast<int64_t>(draw(logits, options.min_p, args.key));
  }
  const std::vector<Candidate> candidates = filtered(logits, options, weighing);
  const std::vector<double> weights = weighing.of(candidates.data(), candidates.data() + candidates.size());
  return candidates[draw(weights, options.min_p, args.key)].token;
}

}  // namespace

SampleResult sample_on_host(const SampleArgs& args, const LogitsLoops& loops) {
  check(args);
  const float* logits = args.logits.f32();
  const LogSumExp sum = log_sum_exp_on_host(logits, args.logits.rows(), "sample", loops);
  const int64_t token = choose(args, sum.argmax, loops);
  return {static_cast<int32_t>(token), static_cast<float>(static_cast<double>(logits[token]) - sum.value)};
}

}  // namespace llama_ext
