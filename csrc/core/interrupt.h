// How a long computation notices that its caller wants it to stop.
#pragma once

#include "core/errors.h"

namespace llama_ext {

/// Asked from time to time (at most every few milliseconds) by the thread that called into the core, never by a worker.
class InterruptHandler {
 public:
  virtual ~InterruptHandler() = default;
  /// True: stop as soon as possible; the computation then throws Interrupted.
  virtual bool requested() = 0;
};

/// The handler of the calling thread, or nullptr.
inline InterruptHandler*& current_interrupt_handler() {
  thread_local InterruptHandler* handler = nullptr;
  return handler;
}

/// Throws Interrupted when the calling thread's handler, if it has one, asks for it.
inline void throw_if_interrupted() {
  InterruptHandler* handler = current_interrupt_handler();
  if (handler != nullptr && handler->requested()) throw Interrupted();
}

/// Installs a handler for the calling thread for the lifetime of the scope.
class InterruptScope {
 public:
  explicit InterruptScope(InterruptHandler* handler) : previous_(current_interrupt_handler()) {
    current_interrupt_handler() = handler;
  }
  ~InterruptScope() { current_interrupt_handler() = previous_; }
  InterruptScope(const InterruptScope&) = delete;
  InterruptScope& operator=(const InterruptScope&) = delete;

 private:
  InterruptHandler* previous_;
};

}  // namespace llama_ext
