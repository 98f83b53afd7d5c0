// Decoding on a device that records (backend/recorder.h): one recording of a token is replayed for every token, and what goes from
// one to the next stays in the device's memory. So the host may ask for tokens ahead of those that it has seen.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <span>
#include <vector>

#include "model/sample_state.h"
#include "model/transformer.h"
#include "model/workspace.h"

namespace llama_ext {

/// A sequence that decodes: its cache holds what precedes the newest token.
struct DecodeSeat {
  KvCache* cache = nullptr;
  SampleSeat sample;
};

/// Gives the tokens that forward() and Backend::sample would, one after the other, for a fixed set of sequences without adapters.
/// SampleState says whether a device can. Between a push and its result the caches hold more than was told. Not for use by two threads at once.
class DecodeLoop {
 public:
  static constexpr int64_t kMostSeats = 128;
  static constexpr int64_t kMostInFlight = 8;

  /// seats: at most kMostSeats, of different caches. Throws as SampleState does.
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
  void record(int64_t needed);
  void run(const Workspace& workspace);
  void prepare_angles();
  int64_t seats() const { return static_cast<int64_t>(seats_.size()); }

  std::shared_ptr<const Model> model_;
  std::vector<DecodeSeat> seats_;
  int64_t pushed_ = 0;
  int64_t fetched_ = 0;

  SampleState state_;
  std::vector<std::unique_ptr<Mark>> marks_;

  /// A recording, and what it works on.
  struct Recorded {
    int64_t limit = 0;  // good for positions below
    Workspace workspace;
    std::vector<bool> has_angles;  // by block of positions
    std::deque<std::vector<float>> angles;
    std::unique_ptr<Recording> recording;
  };
  Recorded now_;
  Recorded before_;  // may still run, until all that it was pushed for was fetched
  int64_t before_pushed_ = 0;
};

}  // namespace llama_ext
