// The sampler: random numbers against published vectors, each step by hand, all steps together against a plain rewrite.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "check.h"
#include "cpu/cpu_backend.h"
#include "cpu/isa.h"
#include "ops/log_sum_exp.h"
#include "ops/sample.h"

// An option left out has its default, which is the point of naming the others.
#pragma GCC diagnostic ignored "-Wmissing-field-initializers"

namespace llama_ext::test {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

SampleResult sample(const std::vector<float>& logits, const SamplingOptions& options, const RandomKey& key = {},
                    const std::vector<int32_t>& prompt = {}, const std::vector<int32_t>& output = {}) {
  SampleArgs args;
  args.logits = {static_cast<const void*>(logits.data()), DType::kF32, {static_cast<int64_t>(logits.size())}};
  args.options = &options;
  args.prompt = &prompt;
  args.output = &output;
  args.key = key;
  return sample_on_host(args);
}

/// The tokens that come up in many draws.
std::set<int32_t> support(const std::vector<float>& logits, const SamplingOptions& options) {
  std::set<int32_t> tokens;
  for (uint64_t i = 0; i < 2000; ++i) tokens.insert(sample(logits, options, {.seed = 7, .counter = i}).token);
  return tokens;
}

void test_philox_known_answers() {
  // Random123's kat_vectors for philox4x32 with 10 rounds, of which the first two words make the number.
  const auto uniform_of = [](uint32_t word0, uint32_t word1) {
    return std::ldexp(static_cast<double>(((uint64_t{word1} << 32) | word0) >> 11), -53);
  };
  CHECK(random_uniform({}) == uniform_of(0x6627e8d5, 0xe169c58d));
  CHECK(random_uniform({UINT64_MAX, UINT64_MAX, UINT64_MAX}) == uniform_of(0x408f276d, 0x41c83b0e));
  CHECK(random_uniform({.seed = 0x299f31d0a4093822, .stream = 0x0370734413198a2e, .counter = 0x85a308d3243f6a88}) ==
        uniform_of(0xd16cfe09, 0x94fdcceb));
}

void test_uniform_is_uniform() {
  std::vector<int> bins(64, 0);
  constexpr int kDraws = 100000;
  for (uint64_t i = 0; i < kDraws; ++i) {
    const double value = random_uniform({.seed = 1, .stream = i % 16, .counter = i / 16});
    CHECK(value >= 0 && value < 1);
    ++bins[static_cast<size_t>(value * 64)];
  }
  double chi_square = 0;
  for (int count : bins) chi_square += std::pow(count - kDraws / 64.0, 2) / (kDraws / 64.0);
  CHECK(chi_square < 103.4);  // 63 degrees of freedom, p = 0.001
}

void test_greedy_takes_the_largest() {
  for (size_t size = 1; size < 40; ++size) {  // across the tails of the lanes
    for (size_t best = 0; best < size; ++best) {
      std::vector<float> logits(size, -1.0f);
      logits[best] = 0.5f;
      CHECK(sample(logits, {}).token == static_cast<int32_t>(best));
    }
    CHECK(sample(std::vector<float>(size, 2.0f), {}).token == 0);
  }
  CHECK(sample({-kInf, -3e38f, -kInf}, {}).token == 1);
  CHECK(sample({0.0f, 1.0f, 1.0f}, {}).token == 1);
}

void test_logprob_is_of_the_raw_logits() {
  const std::vector<float> logits = {1.0f, 3.0f, -2.0f, -kInf};
  const double normaliser = std::log(std::exp(1.0) + std::exp(3.0) + std::exp(-2.0));
  CHECK_NEAR(sample(logits, {}).logprob, 3.0 - normaliser, 1e-7);
  CHECK_NEAR(sample(logits, {.logit_bias = {{1, -10.0f}}}).logprob, 1.0 - normaliser, 1e-7);
  CHECK_NEAR(sample(logits, {.temperature = 1e-9}).logprob, 3.0 - normaliser, 1e-7);
  CHECK(sample({5.0f}, {}).logprob == 0.0f);
  // -log(1 + e^-x) is as small as e^-x, so float32 shows the relative error of the exponential.
  for (float x = 0; x < 10; x += 1.0f / 64) {
    const double expected = -std::log1p(std::exp(-static_cast<double>(x)));
    CHECK_NEAR(sample({0.0f, -x}, {}).logprob, expected, 6.1e-8 * -expected);
  }
  std::vector<float> many(100003);
  double sum = 0;
  for (size_t i = 0; i < many.size(); ++i) {
    many[i] = -static_cast<float>(i % 900);  // beyond where e^x is 0
    sum += std::exp(static_cast<double>(many[i]));
  }
  CHECK_NEAR(sample(many, {}).logprob, -std::log(sum), 1e-6);
}

void test_log_sum_exp_is_as_good_as_float64() {
  for (const int64_t size : {1, 7, 8, 255, 256, 257, 100003}) {
    std::vector<float> logits(static_cast<size_t>(size));
    double sum = 0;
    for (size_t i = 0; i < logits.size(); ++i) {
      logits[i] = 20.0f - static_cast<float>((i * 37) % 331) / 16;
      sum += std::exp(static_cast<double>(logits[i]) - 20.0);
    }
    CHECK_NEAR(log_sum_exp_on_host(logits.data(), size, "test").value, 20.0 + std::log(sum), 1e-13);
  }
}

/// Logits of any size and place: finite, or -inf.
std::vector<float> mixed_logits(size_t size, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0.0f, 8.0f);
  std::vector<float> logits(size);
  for (float& logit : logits) logit = random() % 11 == 0 ? -kInf : normal(random);
  logits[random() % size] = 30.0f;
  logits[random() % size] = 30.0f;  // the first of equals counts
  return logits;
}

void test_every_isa_makes_the_same_bits_of_logits() {
  for (const std::string& isa : available_isas()) {
    const LogitsLoops& loops = kernel_table(isa).logits;
    for (const size_t size : std::initializer_list<size_t>{1,  2,  3,   4,   5,   7,    8,    9,    15,   16,
                                                           17, 31, 255, 256, 257, 1023, 1024, 1025, 5000, 100003}) {
      std::vector<float> logits = mixed_logits(size, static_cast<uint32_t>(size));
      const auto count = static_cast<int64_t>(size);
      const int64_t argmax = kPlainLogitsLoops.argmax(logits.data(), count);
      CHECK(loops.argmax(logits.data(), count) == argmax);
      const float largest = logits[static_cast<size_t>(argmax)];
      CHECK(loops.exp_sum(logits.data(), count, largest) == kPlainLogitsLoops.exp_sum(logits.data(), count, largest));
      for (const double temperature : {0.01, 0.7, 1.0, 1e300}) {
        std::vector<double> weights(logits.begin(), logits.end());
        loops.weights(weights.data(), count, static_cast<double>(largest), temperature);
        std::vector<double> plain(logits.begin(), logits.end());
        kPlainLogitsLoops.weights(plain.data(), count, static_cast<double>(largest), temperature);
        CHECK(weights == plain);
        for (size_t i = 0; i < size; ++i) {
          // Not below denormals, where the relative error has no bound.
          const double exact = std::exp((static_cast<double>(logits[i]) - static_cast<double>(largest)) / temperature);
          CHECK_NEAR(weights[i], exact, 5e-16 * exact + 1e-300);
        }
      }
      for (const size_t bad : {size_t{0}, size / 2, size - 1}) {
        for (float value : {std::numeric_limits<float>::quiet_NaN(), -std::numeric_limits<float>::quiet_NaN(), kInf}) {
          const float good = std::exchange(logits[bad], value);
          CHECK(loops.argmax(logits.data(), count) == -1);
          logits[bad] = good;
        }
      }
      std::fill(logits.begin(), logits.end(), -kInf);
      CHECK(loops.argmax(logits.data(), count) == 0);
    }
  }
}

void test_rows_are_drawn_as_each_alone() {
  const std::vector<SamplingOptions> kinds = {
      {}, {.temperature = 1.0}, {.temperature = 0.7, .top_k = 40, .top_p = 0.9}, {.repetition_penalty = 1.3}};
  constexpr size_t kRows = 19;
  constexpr size_t kVocabulary = 3001;
  std::vector<std::vector<float>> logits;
  for (uint32_t row = 0; row < kRows; ++row) logits.push_back(mixed_logits(kVocabulary, row));
  const std::vector<int32_t> output = {5, 17, 5};
  for (const std::string& isa : available_isas()) {
    for (const int threads : {1, 2, 5}) {
      const std::unique_ptr<Backend> backend = make_cpu_backend(threads, isa);
      std::vector<SampleArgs> rows(kRows);
      for (size_t row = 0; row < kRows; ++row) {
        rows[row].logits = {static_cast<const void*>(logits[row].data()), DType::kF32, {kVocabulary}};
        rows[row].options = &kinds[row % kinds.size()];
        rows[row].output = &output;
        rows[row].key = {.seed = 3, .stream = row, .counter = 3};
      }
      std::vector<SampleResult> results(kRows);
      backend->sample(rows, results);
      for (size_t row = 0; row < kRows; ++row) {
        const SampleResult alone = sample_on_host(rows[row]);
        CHECK(results[row].token == alone.token && results[row].logprob == alone.logprob);
        LogSumExp sum;
        backend->log_sum_exp(
            {.logits = {static_cast<const void*>(logits[row].data()), DType::kF32, {1, kVocabulary}}, .out = &sum});
        const float logit = logits[row][static_cast<size_t>(alone.token)];
        CHECK(static_cast<float>(static_cast<double>(logit) - sum.value) == alone.logprob);
      }
      logits[7][5] = kInf;
      CHECK_ERROR(ErrorKind::kNumeric, "sample: the logit of token 5 is inf", backend->sample(rows, results));
      logits[7][5] = 0.0f;
    }
  }
}

void test_bad_logits_are_named() {
  for (size_t bad = 0; bad < 21; ++bad) {
    for (float value : {std::numeric_limits<float>::quiet_NaN(), kInf}) {
      std::vector<float> logits(21, 0.0f);
      logits[bad] = value;
      CHECK_ERROR(ErrorKind::kNumeric, cat("the logit of token ", bad, " is "), sample(logits, {}));
      CHECK_ERROR(ErrorKind::kNumeric, cat("the logit of token ", bad, " is "), sample(logits, {.temperature = 1}));
    }
  }
  CHECK_ERROR(ErrorKind::kNumeric, "every logit is -inf", sample({-kInf, -kInf}, {}));
  CHECK_ERROR(ErrorKind::kNumeric, "once logit_bias is added", sample({-kInf, 1.0f}, {.logit_bias = {{1, -kInf}}}));
  CHECK_ERROR(ErrorKind::kNumeric, "the processed logit of token 0 is inf",
              sample({3e38f, 1.0f}, {.repetition_penalty = 1e-300}, {}, {0}));
  CHECK_ERROR(ErrorKind::kShape, "between 1 and", sample({}, {}));
}

void test_penalties() {
  const SamplingOptions repetition{.repetition_penalty = 2.0};
  CHECK(sample({2.0f, 1.5f}, repetition, {}, {0}).token == 1);
  CHECK(sample({2.0f, 1.5f}, repetition, {}, {}, {0}).token == 1);
  CHECK(sample({-1.0f, -1.5f}, repetition, {}, {0}).token == 1);
  CHECK(sample({2.0f, 0.75f}, repetition, {}, {0, 0}, {0}).token == 0);  // once, however often it was seen
  const SamplingOptions presence{.presence_penalty = 1.0};
  CHECK(sample({2.0f, 1.5f}, presence, {}, {0, 0}).token == 0);  // the prompt does not count
  CHECK(sample({2.0f, 1.5f}, presence, {}, {}, {0}).token == 1);
  CHECK(sample({3.0f, 1.5f}, presence, {}, {}, {0, 0, 0}).token == 0);
  const SamplingOptions frequency{.frequency_penalty = 0.4};
  CHECK(sample({3.0f, 2.0f}, frequency, {}, {}, {0, 0}).token == 0);
  CHECK(sample({3.0f, 2.0f}, frequency, {}, {}, {0, 0, 0}).token == 1);
  CHECK(sample({1.0f, 2.0f}, {.frequency_penalty = -1.0}, {}, {}, {0, 0}).token == 0);
  // The bias comes first: (1 + 2) / 2 < 2.4, whereas 1 / 2 + 2 would win.
  CHECK(sample({1.0f, 2.4f}, {.repetition_penalty = 2.0, .logit_bias = {{0, 2.0f}}}, {}, {0}).token == 1);
  CHECK(sample({1.0f, 2.0f, 3.0f}, {.logit_bias = {{2, -kInf}}}).token == 1);
  CHECK_ERROR(ErrorKind::kTokenId, "token id 2 at index 1", sample({1.0f, 2.0f}, repetition, {}, {0, 2}));
  CHECK(sample({1.0f, 2.0f}, {}, {}, {0, 2}).token == 1);  // without penalties nobody looks at them
}

void test_filters_keep_the_right_tokens() {
  using Set = std::set<int32_t>;
  const std::vector<float> logits = {std::log(0.125f), std::log(0.5f), std::log(0.125f), std::log(0.25f)};
  CHECK(support(logits, {.temperature = 1}) == (Set{0, 1, 2, 3}));
  CHECK(support(logits, {.temperature = 1, .top_k = 1}) == (Set{1}));
  CHECK(support(logits, {.temperature = 1, .top_k = 3}) == (Set{0, 1, 3}));
  CHECK(support(logits, {.temperature = 1, .top_k = 100}) == (Set{0, 1, 2, 3}));
  CHECK(support(logits, {.temperature = 1, .top_p = 1e-9}) == (Set{1}));
  CHECK(support(logits, {.temperature = 1, .top_p = 0.49}) == (Set{1}));
  CHECK(support(logits, {.temperature = 1, .top_p = 0.51}) == (Set{1, 3}));
  CHECK(support(logits, {.temperature = 1, .top_p = 0.76}) == (Set{0, 1, 3}));
  CHECK(support(logits, {.temperature = 1, .min_p = 0.24}) == (Set{0, 1, 2, 3}));
  CHECK(support(logits, {.temperature = 1, .min_p = 0.26}) == (Set{1, 3}));
  CHECK(support(logits, {.temperature = 1, .min_p = 0.99}) == (Set{1}));
  // top_p is of what top_k left: 0.5 / 0.75 < 0.7, so both stay.
  CHECK(support(logits, {.temperature = 1, .top_k = 2, .top_p = 0.66}) == (Set{1}));
  CHECK(support(logits, {.temperature = 1, .top_k = 2, .top_p = 0.67}) == (Set{1, 3}));
  // Temperature comes before top_p: at 0.5 the shares are 16 : 4 : 1 : 1.
  CHECK(support(logits, {.temperature = 0.5, .top_p = 0.7}) == (Set{1}));
  // Ties go to the lower id; a set that reaches top_p exactly is enough.
  const std::vector<float> equal(4, 1.0f);
  CHECK(support(equal, {.temperature = 1, .top_k = 2}) == (Set{0, 1}));
  CHECK(support(equal, {.temperature = 1, .top_p = 0.5}) == (Set{0, 1}));
  CHECK(support(equal, {.temperature = 1, .top_p = 0.51}) == (Set{0, 1, 2}));
  // What is forbidden never appears, whatever the filters.
  const std::vector<float> masked = {-kInf, 0.0f, -kInf, 0.0f};
  CHECK(support(masked, {.temperature = 1}) == (Set{1, 3}));
  CHECK(support(masked, {.temperature = 1, .top_k = 3, .top_p = 0.99}) == (Set{1, 3}));
}

void test_extreme_temperatures() {
  const std::vector<float> logits = {1.0f, 1.0f + 1e-6f, 0.0f};
  CHECK(support(logits, {.temperature = 1e-300}) == std::set<int32_t>{1});
  CHECK(support(logits, {.temperature = 1e300}) == (std::set<int32_t>{0, 1, 2}));
  // Weights are equal to the last bit here, logits are not.
  CHECK(support(logits, {.temperature = 1e30, .top_k = 1}) == std::set<int32_t>{1});
}

void test_draws_follow_the_distribution() {
  const std::vector<float> logits = {0.0f, 1.0f, -1.0f, 2.0f, 0.5f, -2.0f, 1.5f, -0.5f};
  constexpr double kTemperature = 0.8;
  std::vector<double> expected(logits.size());
  double total = 0;
  for (size_t i = 0; i < logits.size(); ++i)
    total += expected[i] = std::exp(static_cast<double>(logits[i]) / kTemperature);
  for (int variant = 0; variant < 2; ++variant) {
    // Filters that remove nothing change nothing, not even the tokens drawn.
    const SamplingOptions options{.temperature = kTemperature, .top_k = variant == 0 ? 0 : 8};
    constexpr int kDraws = 100000;
    std::vector<int> counts(logits.size(), 0);
    for (uint64_t i = 0; i < kDraws; ++i) {
      const RandomKey key{.seed = 42, .stream = i % 7, .counter = i / 7};
      ++counts[static_cast<size_t>(sample(logits, options, key).token)];
    }
    double chi_square = 0;
    for (size_t i = 0; i < logits.size(); ++i) {
      const double mean = kDraws * expected[i] / total;
      chi_square += (counts[i] - mean) * (counts[i] - mean) / mean;
    }
    CHECK(chi_square < 24.32);  // 7 degrees of freedom, p = 0.001
  }
}

/// Temperature, top_k, top_p, min_p and the draw by sorting everything.
int32_t plain_sample(const std::vector<float>& logits, const SamplingOptions& options, const RandomKey& key) {
  std::vector<size_t> order(logits.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return logits[a] > logits[b]; });
  const double largest = static_cast<double>(logits[order[0]]);
  if (options.top_k > 0) order.resize(std::min(order.size(), static_cast<size_t>(options.top_k)));
  const auto weight = [&](size_t i) {
    return std::exp((static_cast<double>(logits[i]) - largest) / options.temperature);
  };
  double total = 0;
  for (size_t i : order) total += weight(i);
  if (options.top_p < 1) {
    double reached = 0;
    size_t kept = 0;
    while (kept < order.size() && reached < options.top_p * total) reached += weight(order[kept++]);
    order.resize(kept);
  }
  std::erase_if(order, [&](size_t i) { return weight(i) < options.min_p; });
  std::sort(order.begin(), order.end());
  total = 0;
  for (size_t i : order) total += weight(i);
  double left = random_uniform(key) * total;
  for (size_t i : order) {
    left -= weight(i);
    if (left < 0) return static_cast<int32_t>(i);
  }
  return static_cast<int32_t>(order.back());
}

void test_all_steps_match_a_plain_rewrite() {
  std::mt19937 generator(3);
  std::normal_distribution<float> normal(0.0f, 3.0f);
  const double temperatures[] = {0.3, 1.0, 4.0, 50.0};
  const int64_t top_ks[] = {0, 1, 40, 500, 5000};
  const double top_ps[] = {1.0, 0.999, 0.9, 0.5, 0.01};
  const double min_ps[] = {0.0, 0.02, 0.5};
  for (uint64_t trial = 0; trial < 1000; ++trial) {
    std::vector<float> logits(1 + generator() % 3000);
    for (float& logit : logits) logit = normal(generator);
    const SamplingOptions options{.temperature = temperatures[generator() % 4],
                                  .top_k = top_ks[generator() % 5],
                                  .top_p = top_ps[generator() % 5],
                                  .min_p = min_ps[generator() % 3]};
    const RandomKey key{.seed = 5, .stream = trial};
    CHECK(sample(logits, options, key).token == plain_sample(logits, options, key));
  }
}

void test_options_are_checked() {
  const auto refuse = [](const char* text, const SamplingOptions& options) {
    CHECK_ERROR(ErrorKind::kOption, text, check(options, 10));
  };
  const double nan = std::nan("");
  check(SamplingOptions{}, 10);
  refuse("temperature", {.temperature = -0.1});
  refuse("temperature", {.temperature = nan});
  refuse("temperature", {.temperature = HUGE_VAL});
  refuse("top_k must be at least 0 (0 keeps all), got -1", {.top_k = -1});
  refuse("top_p must be a probability, 0 < top_p <= 1, got 0", {.top_p = 0.0});
  refuse("top_p", {.top_p = 1.01});
  refuse("top_p", {.top_p = nan});
  refuse("min_p", {.min_p = 1.0});
  refuse("min_p", {.min_p = -0.1});
  refuse("repetition_penalty", {.repetition_penalty = 0.0});
  refuse("repetition_penalty", {.repetition_penalty = nan});
  refuse("presence_penalty must be finite", {.presence_penalty = HUGE_VAL});
  refuse("frequency_penalty must be finite", {.frequency_penalty = nan});
  refuse("logit_bias names token 10", {.logit_bias = {{10, 1.0f}}});
  refuse("logit_bias names token -1", {.logit_bias = {{-1, 1.0f}}});
  refuse("logit_bias of token 3", {.logit_bias = {{3, kInf}}});
  refuse("logit_bias of token 3", {.logit_bias = {{3, std::nanf("")}}});
}

}  // namespace

void test_sample() {
  test_philox_known_answers();
  test_uniform_is_uniform();
  test_greedy_takes_the_largest();
  test_logprob_is_of_the_raw_logits();
  test_log_sum_exp_is_as_good_as_float64();
  test_every_isa_makes_the_same_bits_of_logits();
  test_rows_are_drawn_as_each_alone();
  test_bad_logits_are_named();
  test_penalties();
  test_filters_keep_the_right_tokens();
  test_extreme_temperatures();
  test_draws_follow_the_distribution();
  test_all_steps_match_a_plain_rewrite();
  test_options_are_checked();
}

}  // namespace llama_ext::test
