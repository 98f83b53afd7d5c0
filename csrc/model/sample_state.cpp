#include "model/sample_state.h"

#include <cstring>
#include <set>

#include "core/checked.h"

namespace llama_ext {
namespace {

constexpr int64_t kAlignment = 256;

}  // namespace

bool SampleState::is_possible(Backend& backend, const SamplingOptions& options) {
  if (backend.recorder() == nullptr) return false;
  // Biases of one token are added one after the other; here a token has one.
  std::set<int32_t> tokens;
  for (const auto& [token, bias] : options.logit_bias) tokens.insert(token);
  return tokens.size() == options.logit_bias.size();
}

SampleState::SampleState(Backend& backend, const SamplingOptions& options, const std::vector<SampleSeat>& seats,
                         int64_t vocabulary, int64_t slots)
    : rows_(static_cast<int64_t>(seats.size())), options_(options) {
  check(options, vocabulary);
  int64_t end = 0;
  const auto region = [&end](int64_t count, size_t each) {
    const int64_t begin = end;
    const int64_t nbytes = checked_mul(count, static_cast<int64_t>(each), "sample state");
    end = checked_add(end, round_up(nbytes, kAlignment), "sample state");
    return begin;
  };
  const bool has_bias = !options.logit_bias.empty();
  const bool has_occurrences = has_penalties(options);
  const int64_t tokens = region(rows_, sizeof(int32_t));
  const int64_t positions = region(rows_, sizeof(int32_t));
  const int64_t states = region(rows_, sizeof(DecodeRow));
  const int64_t bias = region(has_bias ? vocabulary : 0, sizeof(float));
  const int64_t occurrences =
      region(has_occurrences ? checked_mul(rows_, vocabulary, "sample state") : 0, sizeof(int32_t));

  first_.assign(static_cast<size_t>(end), 0);
  const auto put = [this](int64_t begin, int64_t index, const auto& value) {
    std::memcpy(first_.data() + begin + index * static_cast<int64_t>(sizeof value), &value, sizeof value);
  };
  for (int64_t i = 0; i < rows_; ++i) {
    const SampleSeat& seat = seats[static_cast<size_t>(i)];
    check_token_ids(&seat.token, 1, vocabulary);
    put(tokens, i, seat.token);
    put(positions, i, static_cast<int32_t>(seat.position));
    DecodeRow row;
    row.key = seat.key;
    put(states, i, row);
    if (!has_occurrences) continue;
    for (const std::vector<int32_t>* ids : {seat.prompt, seat.output}) {
      if (ids != nullptr) check_token_ids(ids->data(), static_cast<int64_t>(ids->size()), vocabulary);
    }
    auto* counts = reinterpret_cast<int32_t*>(first_.data() + occurrences) + i * vocabulary;
    if (seat.prompt != nullptr) {
      for (int32_t token : *seat.prompt) counts[token] = kInPrompt;
    }
    if (seat.output != nullptr) {
      for (int32_t token : *seat.output) ++counts[token];
    }
  }
  for (const auto& [token, value] : options.logit_bias) put(bias, token, value);

  memory_ = backend.allocate(first_.size());
  results_ = backend.recorder()->allocate_visible(static_cast<size_t>(checked_mul(slots, rows_, "sample state")) *
                                                  sizeof(DecodeResult));
  auto* base = static_cast<unsigned char*>(memory_->data());
  backend.copy_to_device(base, first_.data(), first_.size());
  args_.options = &options_;
  args_.tokens = TensorView(base + tokens, DType::kI32, {rows_});
  args_.positions = TensorView(base + positions, DType::kI32, {rows_});
  args_.rows = reinterpret_cast<DecodeRow*>(base + states);
  args_.results = static_cast<DecodeResult*>(results_->data());
  args_.slots = slots;
  if (has_bias) args_.bias = TensorView(base + bias, DType::kF32, {vocabulary});
  if (has_occurrences) args_.occurrences = TensorView(base + occurrences, DType::kI32, {rows_, vocabulary});
}

}  // namespace llama_ext
