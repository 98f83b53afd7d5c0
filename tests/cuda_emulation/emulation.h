// Blocks of threads as fibers, run one block after the other on the thread that launches.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3() = default;
  constexpr dim3(unsigned x_, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

struct CUstream_st;

namespace cuda_emulation {

constexpr unsigned kWarpSize = 32;
inline constexpr const char* kSyncWarp = "__syncwarp";
constexpr size_t kSlot = 64;  // bytes that a lane can give to the others of its warp at once

/// One thread of the block that runs.
struct Thread {
  dim3 index;
  unsigned number = 0;  // within the block
};

struct Block {
  dim3 index;
  dim3 size;
  dim3 grid;
  unsigned char* shared = nullptr;
};

Thread& thread();
Block& block();
inline unsigned lane() { return thread().number % kWarpSize; }

/// Waits until every thread of the block is here.
void sync_block();

/// Gives `nbytes` to the other lanes of the warp and waits until all 32 have called this with the same `what`. Returns the slots
/// of all, which stay as they are until the calling lane's next but one exchange.
const unsigned char* exchange_bytes(const char* what, const void* value, size_t nbytes);

template <typename T>
struct Lanes {
  const unsigned char* slots;
  T operator[](unsigned lane) const {
    T value;
    std::memcpy(&value, slots + (lane % kWarpSize) * kSlot, sizeof value);
    return value;
  }
};

template <typename T>
Lanes<T> exchange(const char* what, const T& value) {
  static_assert(sizeof(T) <= kSlot);
  return {exchange_bytes(what, &value, sizeof value)};
}

/// The copy is only done when the thread waits for it; what lies there before is NaN.
void copy_async(void* shared, const void* global, size_t nbytes);
void commit_copies();
/// Waits for all groups of copies but the last `pending`.
void wait_for_copies(int pending);

struct LaunchShape {
  dim3 grid;
  unsigned threads = 0;
  size_t shared_bytes = 0;
  unsigned cluster = 1;       // blocks that run together
  bool starts_early = false;  // may run beside those before it until it waits for them, back to the last that does not
};
/// Runs `kernel` for every thread of the grid, or, where the stream captures, with each launch of the graph. Device memory can only be
/// followed meanwhile. Errors show in cudaGetLastError.
void launch(CUstream_st* stream, const LaunchShape& shape, const std::function<void()>& kernel);
/// How many have been launched: for tests that ask the library.
extern "C" __attribute__((visibility("default"))) uint32_t cuda_emulation_launches();
/// Threads of a block of the last one: likewise.
extern "C" __attribute__((visibility("default"))) uint32_t cuda_emulation_threads();
/// No kernel after this starts before those ahead of it are done.
void begin_in_order();
void wait_for_predecessors();

// For hopper.h.

/// Waits until `count` threads of the block are at its barrier of this number, or only counts as one of them.
void meet_at(int barrier, unsigned count, bool waits);
unsigned cluster_rank();
void sync_cluster();
/// Where addresses of shared memory count from, in the calling thread's block or in that of a rank.
unsigned char* shared_window();
unsigned char* shared_window_of(unsigned rank);
/// Gives way until *word is not `value`.
void wait_for_change(const uint64_t* word, uint64_t value);
/// Done by the scheduler, once no thread can go on.
void copy_later(std::function<void()> copy);
/// Done by the thread, at the wait for its group, or at once where turns go backward.
void multiply_later(std::function<void()> product);
void commit_products();
void wait_for_products(int pending);
/// From here on, of the calling thread, which all of its block may do once. Together they have no more than at the launch.
void have_registers(int count);
/// What follows in this launch is ordered by what the race check does not know.
void stop_watching();
/// Ends the launch with an error.
[[noreturn]] void fail_launch(const char* reason);

/// Whether all these bytes lie within one allocation of the device.
bool is_device_memory(const void* data, size_t nbytes);

}  // namespace cuda_emulation
