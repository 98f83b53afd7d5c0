// The race check: what nothing orders has to show, and what something orders must not.
#include <functional>
#include <string>

#include "claims.h"
#include "cuda/launch.h"
#include "cuda/mma.h"

using namespace llama_ext::cuda;
using claims::error_of;
using claims::expect;

namespace {

enum class Order { kNothing, kWarp, kBlock, kShuffle };

__device__ void put_in_order(Order order) {
  if (order == Order::kWarp) __syncwarp();
  if (order == Order::kBlock) __syncthreads();
  if (order == Order::kShuffle) __shfl_sync(kAllLanes, 0, 0);
}

__device__ int* shared_numbers() { return reinterpret_cast<int*>(shared_memory()); }

/// Thread i writes number i and reads that of another, `apart` threads away.
__global__ void read_after_write_kernel(int* out, int apart, Order order) {
  int* numbers = shared_numbers();
  const int thread = static_cast<int>(threadIdx.x);
  numbers[thread] = thread;
  put_in_order(order);
  out[thread] = numbers[thread ^ apart];
}
/// All threads read number 0, and then one writes it.
__global__ void write_after_read_kernel(int* out, Order order) {
  int* numbers = shared_numbers();
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) numbers[0] = 1;
  __syncthreads();
  out[thread] = numbers[0];
  put_in_order(order);
  if (thread == 0) numbers[0] = 2;
}
__global__ void one_place_kernel(int* out, Order order) {
  if (threadIdx.x == 0) out[0] = 1;
  put_in_order(order);
  if (threadIdx.x == 1) out[0] = 1;
}
__global__ void neighbouring_bytes_kernel(unsigned char* out) {
  out[threadIdx.x] = static_cast<unsigned char>(threadIdx.x);
}
__global__ void count_kernel(int* out, Order order) {
  int* count = shared_numbers();
  if (threadIdx.x == 0) *count = 0;
  __syncthreads();
  atomicAdd(count, 1);
  put_in_order(order);
  out[threadIdx.x] = *count;
}
__global__ void copy_kernel(const int* from, int* out, Order order) {
  int* numbers = shared_numbers();
  const int thread = static_cast<int>(threadIdx.x);
  copy_async(numbers + 4 * thread, from, true);
  commit_copies();
  wait_for_copies<0>();
  put_in_order(order);
  out[thread] = numbers[4 * (thread ^ 1)];
}

/// Each block writes its number; the last to come adds them up.
enum class Fence { kNone, kOfAll, kOfOne, kOfWriters };
__global__ void last_block_kernel(int* numbers, unsigned* arrivals, int* out, Fence fence) {
  int* is_last = shared_numbers();
  const unsigned thread = threadIdx.x;
  const unsigned blocks = gridDim.x;
  numbers[blockIdx.x * 64 + thread] = 1;
  if (fence == Fence::kOfAll || fence == Fence::kOfWriters) __threadfence();
  __syncthreads();
  if (thread == 0) {
    if (fence == Fence::kOfOne) __threadfence();
    *is_last = atomicInc(arrivals, blocks - 1) == blocks - 1;
    if (fence == Fence::kOfOne) __threadfence();
  }
  __syncthreads();
  if (*is_last == 0) return;
  if (fence == Fence::kOfAll) __threadfence();
  int sum = 0;
  for (unsigned i = 0; i < blocks; ++i) sum += numbers[i * 64 + thread];
  out[thread] = sum;
}
__global__ void block_reads_other_kernel(int* numbers) {
  if (threadIdx.x == 0) numbers[blockIdx.x] = numbers[(blockIdx.x + 1) % gridDim.x];
}

__global__ void produce_kernel(int* out) {
  wait_for_predecessors();
  out[threadIdx.x] = 1;
}
__global__ void pass_kernel(int* out) {
  wait_for_predecessors();
  out[threadIdx.x] = 2;
}
template <bool kWaitsFirst>
__global__ void consume_kernel(const int* in, int* out) {
  if constexpr (kWaitsFirst) wait_for_predecessors();
  const int value = in[threadIdx.x];
  if constexpr (!kWaitsFirst) wait_for_predecessors();
  out[threadIdx.x] = value;
}
__global__ void impatient_kernel() {}

/// Runs what `record` launches as one recording, and returns its error.
std::string error_of_recording(const Gpu& gpu, const std::function<void()>& record) {
  Arena arena(gpu);
  cudaGraph_t graph = nullptr;
  {
    const Capture capture(gpu, arena);
    record();
    graph = capture.end();
  }
  cudaGraphExec_t runnable = nullptr;
  cudaGraphInstantiate(&runnable, graph, 0);
  cudaGraphDestroy(graph);
  const std::string error =
      cudaGraphLaunch(runnable, gpu.stream()) == cudaSuccess ? "" : cudaGetErrorString(cudaSuccess);
  cudaGetLastError();
  cudaGraphExecDestroy(runnable);
  return error;
}

}  // namespace

int main() {
  const Gpu gpu(0);
  auto* numbers = static_cast<int*>(gpu.allocate(4096 * sizeof(int), "a test"));
  int* out = numbers + 1024;
  int* more = numbers + 2048;
  auto* counters = reinterpret_cast<unsigned*>(numbers + 4000);
  gpu.fill_zero(numbers, 4096 * sizeof(int), 4096 * sizeof(int), 1);
  constexpr size_t kShared = 64 * 4 * sizeof(int);
  const auto run = [&](auto kernel, unsigned blocks, auto... arguments) {
    return error_of([&] { launch(gpu, kernel, dim3(blocks), 64, kShared, arguments...); });
  };
  const auto is_race = [](const std::string& error) { return error.find("a race") != std::string::npos; };

  expect(is_race(run(read_after_write_kernel, 1, out, 1, Order::kNothing)), "a read of what another thread writes");
  expect(is_race(run(read_after_write_kernel, 1, out, 1, Order::kShuffle)), "a shuffle orders no accesses to memory");
  expect(run(read_after_write_kernel, 1, out, 1, Order::kWarp).empty(), "__syncwarp orders those of its warp");
  expect(is_race(run(read_after_write_kernel, 1, out, 32, Order::kWarp)), "and no others");
  expect(run(read_after_write_kernel, 1, out, 32, Order::kBlock).empty(), "__syncthreads orders those of its block");

  expect(is_race(run(write_after_read_kernel, 1, out, Order::kNothing)), "a write of what other threads read");
  expect(is_race(run(write_after_read_kernel, 1, out, Order::kWarp)),
         "which a warp's barrier does not order for a block");
  expect(run(write_after_read_kernel, 1, out, Order::kBlock).empty(), "and a block's does");
  expect(is_race(run(one_place_kernel, 1, out, Order::kNothing)), "two writes of one place, of whatever");
  expect(run(one_place_kernel, 1, out, Order::kWarp).empty(), "and one after the other");
  expect(is_race(run(one_place_kernel, 2, out, Order::kBlock)), "and by two blocks");
  expect(run(neighbouring_bytes_kernel, 1, reinterpret_cast<unsigned char*>(out)).empty(),
         "bytes are places of their own");

  expect(run(count_kernel, 1, out, Order::kBlock).empty(), "atomic operations need no order among themselves");
  expect(is_race(run(count_kernel, 1, out, Order::kNothing)), "but a read of what they count does");
  expect(is_race(run(copy_kernel, 1, numbers, out, Order::kNothing)), "a copy that another thread waited for");
  expect(run(copy_kernel, 1, numbers, out, Order::kBlock).empty(), "and a barrier after that");

  expect(is_race(run(block_reads_other_kernel, 3, numbers)), "a read of what another block wrote");
  expect(is_race(run(last_block_kernel, 3, numbers, counters, out, Fence::kNone)),
         "an atomic operation without fences orders nothing");
  gpu.fill_zero(counters, 4, 4, 1);
  expect(is_race(run(last_block_kernel, 3, numbers, counters, out, Fence::kOfWriters)),
         "a fence of the writers is half of it");
  gpu.fill_zero(counters, 4, 4, 1);
  expect(run(last_block_kernel, 3, numbers, counters, out, Fence::kOfAll).empty(),
         "fences of all threads on both sides do");
  expect(run(last_block_kernel, 3, numbers, counters, out, Fence::kOfOne).empty(),
         "and those of the one thread whose barriers lie before and after");

  const auto record = [&](bool waits_first, bool has_another_between, bool starts_early) {
    return error_of_recording(gpu, [&] {
      launch<Start::kEarly>(gpu, produce_kernel, dim3(1), 64, 0, numbers);
      if (has_another_between) launch<Start::kEarly>(gpu, pass_kernel, dim3(1), 64, 0, more);
      auto* const consume = waits_first ? consume_kernel<true> : consume_kernel<false>;
      if (starts_early) {
        launch<Start::kEarly>(gpu, consume, dim3(1), 64, 0, static_cast<const int*>(numbers), out);
      } else {
        launch(gpu, consume, dim3(1), 64, 0, static_cast<const int*>(numbers), out);
      }
    });
  };
  expect(record(true, false, true).empty(), "a kernel that starts early and waits first");
  expect(is_race(record(false, false, true)), "or reads what its predecessor writes before it waits");
  expect(is_race(record(false, true, true)), "or what the one before that writes");
  expect(record(false, false, false).empty(), "a kernel that starts in order need not wait");
  expect(error_of_recording(gpu, [&] { launch<Start::kEarly>(gpu, impatient_kernel, dim3(1), 32, 0); }).find("wait") !=
             std::string::npos,
         "a kernel that starts early and never waits is an error");
  return claims::exit_status();
}
