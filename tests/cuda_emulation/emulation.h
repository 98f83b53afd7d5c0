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

/// Runs `kernel` for every thread of the grid, or, where the stream captures, with each launch of the graph. Device memory can only be
/// followed meanwhile. Errors show in cudaGetLastError. A kernel that `starts_early` may run beside those before it until it waits for
/// them, back to the last that does not, and to begin_in_order().
void launch(CUstream_st* stream, const dim3& grid, unsigned threads, size_t shared_bytes, bool starts_early,
            const std::function<void()>& kernel);
void begin_in_order();
void wait_for_predecessors();

/// Whether all these bytes lie within one allocation of the device.
bool is_device_memory(const void* data, size_t nbytes);

}  // namespace cuda_emulation
