// One model, many threads, a session each: the same bits as one thread alone. Made for ThreadSanitizer, and true without it.
#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "check.h"
#include "cpu/cpu_backend.h"
#include "cpu/thread_pool.h"
#include "generate/beam_search.h"
#include "generate/generation.h"
#include "generate/score.h"
#include "model/session.h"
#include "model/transformer.h"

namespace llama_ext::test {
namespace {

using Tokens = std::vector<int32_t>;

ModelConfig small_config(bool tied) {
  ModelConfig config;
  config.vocabulary = 300;
  config.width = 64;
  config.ffn_width = 160;
  config.layers = 2;
  config.heads = 4;
  config.kv_heads = 2;
  config.head_dim = 16;
  config.context = 96;
  config.tied_head = tied;
  config.attention_bias = true;
  config.rope.head_dim = 16;
  return config;
}

/// A model of some weights; its slots are filled by several threads at once, as a loader may.
std::shared_ptr<const Model> make_model(const WeightPlan& plan, int threads, bool tied = false) {
  auto model = std::make_shared<Model>(std::shared_ptr<Backend>(make_cpu_backend(threads)), small_config(tied), plan,
                                       PackedWeights(), Compute::kAuto);
  const auto& slots = model->weights().slots();
  std::vector<std::thread> loaders;
  for (size_t loader = 0; loader < 3; ++loader) {
    loaders.emplace_back([&, loader] {
      for (size_t slot = loader; slot < slots.size(); slot += 3) {
        const std::vector<int64_t>& shape = slots[slot].shape;
        int64_t size = 1;
        for (int64_t extent : shape) size *= extent;
        std::vector<float> values(static_cast<size_t>(size));
        uint32_t state = static_cast<uint32_t>(slot) + 1;
        for (float& value : values) {
          state = state * 1664525u + 1013904223u;
          value = (static_cast<float>(state >> 8) * 0x1p-23f - 1.0f) * 0.3f;
        }
        const TensorView view = shape.size() == 1 ? TensorView(values.data(), DType::kF32, {shape[0]})
                                                  : TensorView(values.data(), DType::kF32, {shape[0], shape[1]});
        model->weights().load(slots[slot].name, view, {});
      }
    });
  }
  for (std::thread& loader : loaders) loader.join();
  CHECK(model->weights().missing().empty());
  return model;
}

Tokens prompt_of(int index) {
  Tokens prompt;
  for (int i = 0; i < 9 + 5 * index; ++i) prompt.push_back((i * 37 + index * 11) % 300);
  return prompt;
}

/// Everything that a thread does with a model, as numbers to compare.
struct Outcome {
  Tokens tokens;
  std::vector<float> numbers;
  bool operator==(const Outcome&) const = default;
};

Outcome use(const std::shared_ptr<const Model>& model, int index, DType kv_dtype) {
  Outcome outcome;
  const Tokens prompt = prompt_of(index);
  // A session: prefill, decode, a fork, a rewind.
  Session session(model, 64, kv_dtype);
  std::vector<float> logits(static_cast<size_t>(model->config().vocabulary));
  session.append(prompt.data(), static_cast<int64_t>(prompt.size()), LogitsRows::kLast, logits.data());
  outcome.numbers = logits;
  const std::unique_ptr<Session> fork = session.fork(64);
  for (int32_t token : {7, 8, 9}) {
    fork->append(&token, 1, LogitsRows::kLast, logits.data());
    outcome.numbers.insert(outcome.numbers.end(), logits.begin(), logits.end());
  }
  session.rewind(3);
  // A batch of its own, sampled, with guesses.
  GenerationOptions options;
  options.sampling.temperature = 0.8;
  options.sampling.top_p = 0.95;
  options.max_new_tokens = {12, 7};
  options.seed = static_cast<uint64_t>(index);
  options.kv_dtype = kv_dtype;
  options.speculation.tokens = 3;
  Generation generation(model, {prompt, prompt_of(index + 1)}, options);
  while (!generation.done()) {
    for (const GenerationEvent& event : generation.step()) {
      outcome.tokens.push_back(event.token);
      outcome.numbers.push_back(event.logprob);
    }
  }
  for (const Score& each : score(model, prompt, 1)) outcome.numbers.push_back(each.logprob);
  BeamSearchOptions beams;
  beams.beams = 3;
  beams.max_new_tokens = 4;
  for (const BeamHypothesis& found : beam_search(model, prompt, beams)) {
    outcome.tokens.insert(outcome.tokens.end(), found.tokens.begin(), found.tokens.end());
  }
  return outcome;
}

void test_threads_that_share_a_model_get_what_each_gets_alone() {
  const auto plan = [](Encoding encoding, int32_t group) {
    WeightPlan made;
    made.others = {encoding, group};
    return made;
  };
  WeightPlan mixed = plan(Encoding::kInt4, 32);
  mixed.by_slot["embedding"] = {Encoding::kInt8, 64};
  mixed.by_slot["head"] = {Encoding::kInt8Min, 32};
  mixed.by_slot["layers.0.v"] = {Encoding::kInt5Min, 64};
  mixed.by_slot["layers.1.gate"] = {Encoding::kBF16, 0};
  const std::vector<std::pair<WeightPlan, DType>> cases = {
      {plan(Encoding::kF32, 0), DType::kF32},
      {plan(Encoding::kBF16, 0), DType::kBF16},
      {plan(Encoding::kInt8, 64), DType::kI8},
      {plan(Encoding::kInt4Min, 32), DType::kF32},
      {mixed, DType::kI8},
  };
  constexpr int kThreads = 4;
  for (const auto& [weights, kv_dtype] : cases) {
    const std::shared_ptr<const Model> model = make_model(weights, 2, &weights == &cases.front().first);
    std::vector<Outcome> alone;
    for (int index = 0; index < kThreads; ++index) alone.push_back(use(model, index, kv_dtype));
    std::vector<Outcome> together(kThreads);
    std::vector<std::thread> threads;
    for (int index = 0; index < kThreads; ++index) {
      // Clang before 16 captures no structured binding.
      threads.emplace_back(
          [&, index, kept = kv_dtype] { together[static_cast<size_t>(index)] = use(model, index, kept); });
    }
    for (std::thread& thread : threads) thread.join();
    for (size_t index = 0; index < kThreads; ++index) {
      CHECK(!alone[index].tokens.empty());
      CHECK(together[index] == alone[index]);
    }
  }
}

void test_the_pool_serves_many_callers() {
  // Jobs of very few and of many tasks, nested ones, and ones that throw, from several threads at once.
  std::vector<std::thread> callers;
  std::atomic<int64_t> wrong{0};
  for (int caller = 0; caller < 4; ++caller) {
    callers.emplace_back([&wrong, caller] {
      for (int64_t round = 0; round < 200; ++round) {
        const int64_t tasks = 1 + (round * 7 + caller) % 40;
        std::vector<int64_t> seen(static_cast<size_t>(tasks), 0);
        parallel_for(3, tasks, [&](int64_t task, int) {
          // Within a task everything is this thread's.
          parallel_for(3, 2, [&](int64_t, int) { seen[static_cast<size_t>(task)] += task + 1; });
        });
        for (int64_t task = 0; task < tasks; ++task) wrong += seen[static_cast<size_t>(task)] != 2 * (task + 1);
        bool thrown = false;
        try {
          parallel_for(3, tasks,
                       [&](int64_t task, int) { require(task != tasks / 2, ErrorKind::kOption, "task ", task); });
        } catch (const Error&) {
          thrown = true;
        }
        wrong += !thrown;
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  CHECK(wrong == 0);
}

}  // namespace

void test_threads() {
  test_the_pool_serves_many_callers();
  test_threads_that_share_a_model_get_what_each_gets_alone();
}

}  // namespace llama_ext::test
