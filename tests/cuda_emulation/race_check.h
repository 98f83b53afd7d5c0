// Finds accesses of kernels that nothing orders, where their sources were compiled with -fsanitize=thread: the compiler then calls
// a function before each access, and those functions are here, instead of the sanitizer's library. Elsewhere nothing is recorded.
//
// Two accesses of one thread are ordered by its program; of one block, by __syncthreads between them; of one warp, by __syncwarp
// too. A shuffle or a product of a warp orders nothing, as CUDA's memory model has it, though a GPU may happen to. Blocks are
// ordered by an atomic operation that one does after __threadfence() and another before it; kernels by their stream, but for what
// one that starts early does before wait_for_predecessors(). So this knows what compute-sanitizer's racecheck does not, which
// watches shared memory alone; and that knows instructions that the emulator has not.
#pragma once

#include <cstddef>
#include <cstdint>

namespace cuda_emulation {

/// What orders a thread's accesses, as of now. The scheduler counts.
struct Place {
  uint32_t launch;
  uint32_t first_unfinished;  // `launch`, or an earlier one that this thread has not waited for
  uint32_t block;             // its number in the grid
  uint32_t epoch;             // how many barriers of the block are passed
  uint32_t warp_epoch;        // how many __syncwarps of the warp
  uint32_t thread;
};

/// Of the fiber that runs on the calling thread. False where none does, and where `data` is that fiber's own.
bool current_place(const void* data, Place& place);

enum class Access : uint8_t { kRead, kWrite, kAtomic };

namespace race_check {

/// Whether any kernel was compiled so.
bool is_on();

/// One launch at a time, whichever threads launch.
void begin_launch(uint32_t blocks, bool starts_early);
void begin_block(const unsigned char* shared, size_t shared_bytes);
/// An access of the fiber that runs, by the code at `from`; of no interest unless it is shared or the device's memory.
void access(Access kind, const void* data, size_t nbytes, const void* from);
/// __threadfence() of the fiber that runs.
void fence();

}  // namespace race_check
}  // namespace cuda_emulation
