#pragma once

#include <chrono>
#include <cstdint>

#include "core/interrupt.h"

namespace llama_ext::reference {

/// Lives as long as one operation, which reports its progress; asks the caller's interrupt handler every 10 ms or so.
class InterruptPoll {
 public:
  /// work: multiplications, roughly, since the last call. Throws Interrupted.
  void advance(int64_t work) {
    work_ += work;
    // Reading the clock costs as much as dozens of multiplications.
    if (work_ < kWorkPerClock) return;
    work_ = 0;
    const Clock::time_point now = Clock::now();
    if (now - last_ < std::chrono::milliseconds(10)) return;
    last_ = now;
    InterruptHandler* handler = current_interrupt_handler();
    if (handler != nullptr && handler->requested()) throw Interrupted();
  }

 private:
  using Clock = std::chrono::steady_clock;
  static constexpr int64_t kWorkPerClock = 1 << 16;

  int64_t work_ = 0;
  Clock::time_point last_ = Clock::now();
};

}  // namespace llama_ext::reference
