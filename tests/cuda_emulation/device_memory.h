// The emulated device's memory: allocations that end at a forbidden page, hold NaN at first, and can only be followed by kernels
// and copies where the processor has protection keys.
#pragma once

#include <cstddef>

#include <functional>

#include "cuda.h"
#include "cuda_runtime.h"

namespace cuda_emulation {

void set_last_error(cudaError_t error, const char* reason);

/// What a block of the emulated card may have.
size_t shared_memory_per_block();

/// The compute capability that kernels were compiled for: 90 of a Hopper GPU, or 80, which every other GPU runs.
int architecture_of_code();

/// Whether the stream is of another GPU than the thread's current one: an error, which it says.
bool is_elsewhere(cudaStream_t stream);

/// Copies that are late (unless LLAMA_EXT_CUDA_EMULATION_LATE_COPIES=0) are done now: what comes next on the stream may read them.
void finish_copies(cudaStream_t stream);

/// Streams that capture keep what was to run.
bool is_capturing(cudaStream_t stream);
void capture(cudaStream_t stream, std::function<void()> work);

/// Whether anything was asked of a GPU that makes its context: for tests that ask the library.
extern "C" __attribute__((visibility("default"))) int cuda_emulation_is_used(int device);
/// As cuDevicePrimaryCtxGetState.
CUresult primary_context_state(CUdevice device, unsigned* flags, int* is_active);

/// Whether host code that follows a device pointer is stopped.
bool has_protection_keys();

/// While one lives, the calling thread can follow device pointers.
class DeviceAccess {
 public:
  DeviceAccess();
  ~DeviceAccess();
  DeviceAccess(const DeviceAccess&) = delete;
  DeviceAccess& operator=(const DeviceAccess&) = delete;
};

}  // namespace cuda_emulation
