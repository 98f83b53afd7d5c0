// What a profiler shows around operations: passes and layers.
#pragma once

#include "backend/backend.h"

namespace llama_ext {

/// A named range of the calling thread, while it lives. Where nobody looks it costs a question, and the name is not put together.
class Range {
 public:
  template <typename... Parts>
  explicit Range(Backend& backend, const Parts&... parts) {
    if (!backend.shows_ranges()) [[likely]] {
      return;
    }
    backend.begin_range(cat(parts...));
    backend_ = &backend;  // ended even when ranges are switched off meanwhile
  }
  ~Range() {
    if (backend_ != nullptr) backend_->end_range();
  }
  Range(const Range&) = delete;
  Range& operator=(const Range&) = delete;

 private:
  Backend* backend_ = nullptr;
};

}  // namespace llama_ext
