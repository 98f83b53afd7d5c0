// What a profiler shows around the operations of a GPU: NVTX ranges in the domain "llama_ext", off unless they are asked for.
#pragma once

#include <atomic>

namespace llama_ext::cuda {

namespace ranges {
extern std::atomic<bool> are_on;
}

/// Whether this build has them: NVTX is a header of the CUDA toolkit.
bool has_ranges();
/// LLAMA_EXT_NVTX=1 switches them on from the start.
inline bool ranges_are_on() { return ranges::are_on.load(std::memory_order_relaxed); }
/// Throws UnsupportedError when they are to be on and this build has none.
void show_ranges(bool on);
/// Throws UnsupportedError when LLAMA_EXT_NVTX asks for what this build does not have, OptionError when it is neither 0 nor 1.
void require_ranges_asked_for();
/// Of the calling thread, nested.
void push_range(const char* name);
void pop_range();

/// The range of an operation, while it lives: a branch where they are off.
class OpRange {
 public:
  explicit OpRange(const char* name) : is_on_(ranges_are_on()) {
    if (is_on_) [[unlikely]] {
      push_range(name);
    }
  }
  ~OpRange() {
    if (is_on_) [[unlikely]] {
      pop_range();
    }
  }
  OpRange(const OpRange&) = delete;
  OpRange& operator=(const OpRange&) = delete;

 private:
  bool is_on_;
};

}  // namespace llama_ext::cuda
