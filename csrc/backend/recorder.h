// What a device offers that can decode by itself: operations that are recorded once and replayed, and a sampler that needs no host.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>

#include "ops/sample_next.h"

namespace llama_ext {

class Buffer;

/// Operations with the arguments that they had.
class Recording {
 public:
  virtual ~Recording() = default;
  /// Runs them all once more, after everything that was asked for before. Does not wait.
  virtual void replay() = 0;
};

/// A place among the operations of a device.
class Mark {
 public:
  virtual ~Mark() = default;
  /// Behind everything that was asked for so far.
  virtual void set() = 0;
  /// Until the device has come to where it was set last.
  virtual void wait() = 0;
};

class Recorder {
 public:
  virtual ~Recorder() = default;
  /// What `operations` asks of the backend, which does not run: only operations (and sample_next), no copies, and no memory is allocated
  /// or given back. The memory that they name must stay as long as the recording, and the recording until its replays are done. What
  /// other threads ask for meanwhile is no part of it.
  virtual std::unique_ptr<Recording> record(const std::function<void()>& operations) = 0;
  virtual std::unique_ptr<Mark> create_mark() = 0;
  /// Zero-filled memory of the host that operations can write: there once a mark behind them was waited for.
  virtual std::unique_ptr<Buffer> allocate_visible(size_t nbytes) = 0;
  virtual void sample_next(const SampleNextArgs& args) = 0;
};

}  // namespace llama_ext
