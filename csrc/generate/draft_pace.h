// How many tokens to guess.
#pragma once

#include <algorithm>
#include <cstdint>

namespace llama_ext {

/// Follows what was accepted: twice as many after guesses that were all right, what would have sufficed after others,
/// and after some steps without a single right one none at all for a while, twice as long each time.
class DraftPace {
 public:
  explicit DraftPace(int64_t most = 0) : most_(most), width_(most) {}

  /// Tokens to guess in this step, in [0, most].
  int64_t next() {
    if (pause_ == 0) return width_;
    --pause_;
    return 0;
  }

  /// What became of `drafted` guesses; drafted >= 1.
  void record(int64_t drafted, int64_t accepted) {
    misses_ = accepted > 0 ? 0 : std::min(misses_ + 1, kMostMisses);
    pause_ = misses_ > 0 ? (int64_t{1} << (misses_ - 1)) - 1 : 0;
    width_ = std::clamp(accepted == drafted ? 2 * width_ : accepted + 1, int64_t{1}, most_);
  }

 private:
  static constexpr int kMostMisses = 5;  // a pause of 15 steps

  int64_t most_;
  int64_t width_;
  int misses_ = 0;
  int64_t pause_ = 0;
};

}  // namespace llama_ext
