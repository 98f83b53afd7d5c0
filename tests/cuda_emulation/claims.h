// Claims of the emulator's test programs, one line each.
#pragma once

#include <cstdio>
#include <functional>
#include <string>

#include "core/errors.h"

namespace claims {

inline int failures = 0;

inline void expect(bool ok, const char* claim) {
  std::printf("%s: %s\n", ok ? "ok" : "FAILED", claim);
  if (!ok) ++failures;
}

/// What the error says that this ends in, or nothing.
inline std::string error_of(const std::function<void()>& work) {
  try {
    work();
  } catch (const llama_ext::Error& error) {
    return error.what();
  }
  return "";
}

inline int exit_status() { return failures == 0 ? 0 : 1; }

}  // namespace claims
