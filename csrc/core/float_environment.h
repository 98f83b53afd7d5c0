// The floating-point settings that every computation runs with.
#pragma once

#include <xmmintrin.h>

namespace llama_ext {

/// Sets the default rounding and denormals for the lifetime of the scope, whatever the caller's process has set (some libraries
/// flush denormals to zero for everybody), so that all threads compute the same bits; the caller's setting is put back.
class DefaultFloatEnvironment {
 public:
  DefaultFloatEnvironment() : saved_(_mm_getcsr()) {
    if ((saved_ & ~kFlags) != kDefault) _mm_setcsr(kDefault);
  }
  ~DefaultFloatEnvironment() {
    if ((saved_ & ~kFlags) != kDefault) _mm_setcsr(saved_);
  }
  DefaultFloatEnvironment(const DefaultFloatEnvironment&) = delete;
  DefaultFloatEnvironment& operator=(const DefaultFloatEnvironment&) = delete;

 private:
  static constexpr unsigned kDefault = 0x1f80;
  static constexpr unsigned kFlags = 0x3f;  // sticky exception flags, not settings
  unsigned saved_;
};

}  // namespace llama_ext
