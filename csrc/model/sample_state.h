// What a device needs to choose tokens by itself (ops/sample_next.h), put into its memory.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "backend/backend.h"

namespace llama_ext {

/// A sequence from whose logits a token is drawn next.
struct SampleSeat {
  int32_t token = 0;     // the newest
  int64_t position = 0;  // where that one runs
  RandomKey key;
  // For the penalties; or nullptr.
  const std::vector<int32_t>* prompt = nullptr;
  const std::vector<int32_t>* output = nullptr;
};

class SampleState {
 public:
  /// Whether a backend can choose tokens by itself, with such options.
  static bool is_possible(Backend& backend, const SamplingOptions& options);

  /// slots: results of each row that there is room for. Throws OptionError, TokenIdError, OutOfMemoryError.
  SampleState(Backend& backend, const SamplingOptions& options, const std::vector<SampleSeat>& seats,
              int64_t vocabulary, int64_t slots);
  SampleState(const SampleState&) = delete;
  SampleState& operator=(const SampleState&) = delete;

  /// All but the logits.
  const SampleNextArgs& args() const { return args_; }
  /// Of slot `index`, a result for each seat.
  const DecodeResult* results(int64_t index) const { return args_.results + index * rows_; }

 private:
  int64_t rows_;
  SamplingOptions options_;
  std::vector<unsigned char> first_;  // what the memory was filled with
  std::unique_ptr<Buffer> memory_;
  std::unique_ptr<Buffer> results_;
  SampleNextArgs args_;
};

}  // namespace llama_ext
