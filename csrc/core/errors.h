// The error type of the core. Bindings map each kind to the Python class of the same name in `llama_ext.errors`.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace llama_ext {

enum class ErrorKind {
  kShape,
  kDType,
  kOption,
  kFormat,
  kCheckpoint,
  kLimit,
  kUnsupported,
  kContextLength,
  kTokenId,
  kNumeric,
  kOutOfMemory,
  kDevice,
  kInternal,  // a broken invariant of ours: shown as LlamaExtError, and a bug
};

class Error : public std::runtime_error {
 public:
  Error(ErrorKind kind, const std::string& message) : std::runtime_error(message), kind_(kind) {}
  ErrorKind kind() const { return kind_; }

 private:
  ErrorKind kind_;
};

/// Thrown out of a long computation when the caller's interrupt handler asked for it (core/interrupt.h). Not an error:
/// the handler has already said what happened (for Python, the pending KeyboardInterrupt).
class Interrupted : public std::exception {
 public:
  const char* what() const noexcept override { return "interrupted"; }
};

/// Concatenates anything that streams into a message.
template <typename... Parts>
std::string cat(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

template <typename... Parts>
[[noreturn]] void fail(ErrorKind kind, const Parts&... parts) {
  throw Error(kind, cat(parts...));
}

/// Throws `Error(kind, parts...)` unless `ok`. The message is only built on failure.
template <typename... Parts>
inline void require(bool ok, ErrorKind kind, const Parts&... parts) {
  if (!ok) [[unlikely]] {
    fail(kind, parts...);
  }
}

}  // namespace llama_ext
