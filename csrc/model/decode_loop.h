// Decoding on a device that records (backend/recorder.h): one recording of a token is replayed for every token, and what goes from
// one to the next stays in the device's memory. So the host may ask for tokens ahead of those that it has seen.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <span>
#include <vector>

#include "model/transformer.h"
#include "model/workspace.h"

namespace llama_ext {

/// A sequence that decodes.
struct DecodeSeat {
  KvCache* cache = nullptr;
  int64_t position = 0;  // where `token` runs: the cache holds what precedes
  int32_t token = 0;
  RandomKey key;  // of the token that follows
  // For the penalties; or nullptr.
  const std::vector<int32_t>* prompt = nullptr;
  const std::vector<int32_t>* output = nullptr;
};

/// Gives the tokens that forward() and Backend::sample would, one after the other, for a fixed set of sequences without adapters.
/// Between a push and its result the caches hold more than was told. Not for use by two threads at once.
class DecodeLoop {
 public:
  static constexpr int64_t kMostSeats = 128;
  static constexpr int64_t kMostInFlight = 8;

  /// Whether this model's device can, with such options.
  static bool is_possible(const Model& model, const SamplingOptions& options);

  /// seats: at most kMostSeats, of different caches. Throws OutOfMemoryError, OptionError.
  DecodeLoop(std::shared_ptr<const Model> model, const SamplingOptions& options, std::vector<DecodeSeat> seats);
  /// Waits for what is in flight.
  ~DecodeLoop();
  DecodeLoop(const DecodeLoop&) = delete;
  DecodeLoop& operator=(const DecodeLoop&) = delete;

  /// Asks for one more token of every sequence; the caches must have room. Does not wait.
  void push();
  /// Tokens that were asked for and not fetched, at most kMostInFlight.
  int64_t in_flight() const { return pushed_ - fetched_; }
  /// Waits for the oldest of them: a result for each seat.
  std::span<const DecodeResult> fetch();

 private:
  void make_state(const SamplingOptions& options);
  void record(int64_t needed);
  void run(const Pass& pass);
  void prepare_angles();
  int64_t seats() const { return static_cast<int64_t>(seats_.size()); }

  std::shared_ptr<const Model> model_;
  Recorder& recorder_;
  SamplingOptions options_;
  std::vector<DecodeSeat> seats_;
  int64_t pushed_ = 0;
  int64_t fetched_ = 0;

  std::unique_ptr<Buffer> state_;
  std::vector<unsigned char> first_state_;  // what it was filled with
  SampleNextArgs sampling_;
  std::unique_ptr<Buffer> results_;
  std::vector<std::unique_ptr<Mark>> marks_;

  // For positions below limit_.
  int64_t limit_ = 0;
  Workspace workspace_;
  std::vector<bool> has_angles_;  // by block of positions
  std::deque<std::vector<float>> angles_;
  std::unique_ptr<Recording> recording_;
};

}  // namespace llama_ext
