// Memory of the CPU backend: aligned, zeroed by the system as it is touched, in huge pages where that pays.
#pragma once

#include <cstddef>
#include <cstdint>

#include "backend/backend.h"

namespace llama_ext {

/// Pages straight from the system. Zero bytes are legal.
class HostBuffer final : public Buffer {
 public:
  /// Throws OutOfMemoryError, with both numbers, when the system has not that much memory to give (`what` names the purpose).
  HostBuffer(size_t nbytes, const char* what);
  ~HostBuffer() override;
  HostBuffer(const HostBuffer&) = delete;
  HostBuffer& operator=(const HostBuffer&) = delete;
};

/// Bytes the system and this process's control group could give without swapping; the largest number when neither says.
size_t available_memory();

/// Throws OutOfMemoryError, with both numbers, when that is less than `nbytes`.
void require_available_memory(size_t nbytes, const char* what);

/// What an operation needs scratch for: each purpose has memory of its own, so that operations may nest.
enum class Scratch : uint8_t { kProduct, kActivation, kAttention, kWeights, kSums };
inline constexpr size_t kScratches = 5;

/// Scratch of the calling thread, at least `nbytes`, aligned to a page, kept for its next call.
void* thread_scratch(Scratch purpose, size_t nbytes);

}  // namespace llama_ext
