// The emulator itself: what is wrong in a kernel has to show, or its tests prove nothing.
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <thread>
#include <vector>

#include "claims.h"
#include "core/half.h"
#include "cuda/launch.h"
#include "cuda/mma.h"
#include "device_memory.h"

using namespace llama_ext::cuda;
using claims::error_of;
using claims::expect;

namespace {

/// The signal that ends a child that does this, or 0.
int signal_of(const std::function<void()>& work) {
  const pid_t child = fork();
  if (child == 0) {
    std::signal(SIGSEGV, SIG_DFL);
    work();
    _exit(0);
  }
  int status = 0;
  waitpid(child, &status, 0);
  return WIFSIGNALED(status) ? WTERMSIG(status) : 0;
}

bool throws(const std::function<void()>& work) { return !error_of(work).empty(); }

/// Thread i writes i, and reads what its neighbour wrote.
template <bool kHasBarrier>
__global__ void neighbours_kernel(float* out) {
  auto* shared = reinterpret_cast<float*>(shared_memory());
  shared[threadIdx.x] = static_cast<float>(threadIdx.x);
  if constexpr (kHasBarrier) __syncthreads();
  out[threadIdx.x] = shared[(threadIdx.x + 1) % blockDim.x];
}

__global__ void divergent_barrier_kernel() {
  if (threadIdx.x < 7) __syncthreads();
}
__global__ void different_collectives_kernel(float* out) {
  const float value = 1.0f;
  out[threadIdx.x] = threadIdx.x % 2 == 0 ? __shfl_xor_sync(kAllLanes, value, 1) : __shfl_sync(kAllLanes, value, 0);
}
__global__ void store_kernel(float* out, int at) { out[at] = 1.0f; }
__global__ void shared_store_kernel(int at) { reinterpret_cast<float*>(shared_memory())[at] = 1.0f; }
__global__ void unwaited_copy_kernel(const float* from, float* out) {
  auto* shared = reinterpret_cast<float*>(shared_memory());
  copy_async(shared + 4 * threadIdx.x, from, true);
  commit_copies();
  out[threadIdx.x] = shared[4 * threadIdx.x];
  wait_for_copies<0>();
}
__global__ void count_kernel(float* out) {
  if (threadIdx.x == 0) *out += 1.0f;
}
__global__ void arrivals_kernel(unsigned* arrivals, float* out) {
  if (threadIdx.x == 0 && atomicInc(arrivals, gridDim.x - 1) == gridDim.x - 1) *out += 1.0f;
}
__global__ void sum_kernel(float* out) { out[threadIdx.x] = warp_sum(static_cast<float>(threadIdx.x)); }

/// C = A B of whole numbers, through the layout that mma.h describes.
__global__ void mma_kernel(const uint16_t* a, const uint16_t* b, float* c) {
  const unsigned g = threadIdx.x / 4;
  const unsigned t = threadIdx.x % 4;
  const auto pair = [](const uint16_t* at, unsigned step) {
    return static_cast<uint32_t>(at[0]) | static_cast<uint32_t>(at[step]) << 16;
  };
  uint32_t fragment[4];
  for (unsigned i = 0; i < 4; ++i) fragment[i] = pair(a + (g + i % 2 * 8) * 16 + 2 * t + i / 2 * 8, 1);
  const uint32_t columns[2] = {pair(b + 2 * t * 8 + g, 8), pair(b + (2 * t + 8) * 8 + g, 8)};
  float sums[4] = {};
  mma<MmaType::kBF16>(sums, fragment, columns);
  // The same operand, read from rows of k by ldmatrix.
  auto* shared = reinterpret_cast<uint16_t*>(shared_memory());
  for (unsigned i = threadIdx.x; i < 16 * 16; i += kWarp) shared[i] = i % 16 < 8 ? b[i / 16 * 8 + i % 16] : uint16_t{0};
  __syncthreads();
  uint32_t transposed[4];
  load_transposed(transposed, shared + (threadIdx.x / 8 % 2 * 8 + threadIdx.x % 8) * 16 + threadIdx.x / 16 * 8);
  const bool is_same = transposed[0] == columns[0] && transposed[1] == columns[1] && transposed[2] == 0;
  for (unsigned i = 0; i < 4; ++i) c[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = is_same ? sums[i] : -1.0f;
}

}  // namespace

int main() {
  const auto current_index = [] {
    int index = -1;
    cudaGetDevice(&index);
    return index;
  };
  setenv("LLAMA_EXT_CUDA_EMULATION_DEVICES", "4", 1);
  static_cast<void>(Gpu(1));
  expect(current_index() == 1, "a GPU that nothing has used does not become current again");
  cudaSetDevice(0);
  static_cast<void>(Gpu(1));
  expect(current_index() == 0, "one that something uses does");

  const Gpu gpu(0);
  auto* memory = static_cast<float*>(gpu.allocate(4096 * sizeof(float), "a test"));
  std::vector<float> host(4096);
  const auto read = [&](size_t count) { gpu.copy_to_host(host.data(), memory, count * sizeof(float)); };

  for (const char* order : {"forward", "backward", "shuffled"}) {
    setenv("LLAMA_EXT_CUDA_EMULATION_ORDER", order, 1);
    launch(gpu, neighbours_kernel<true>, dim3(1), 64, 64 * sizeof(float), memory);
    read(64);
    bool is_right = true;
    for (size_t i = 0; i < 64; ++i) is_right = is_right && host[i] == static_cast<float>((i + 1) % 64);
    expect(is_right, "a barrier makes what others wrote visible, in every order of turns");
    launch(gpu, neighbours_kernel<false>, dim3(1), 64, 64 * sizeof(float), memory);
    read(64);
    bool has_nan = false;
    for (size_t i = 0; i < 64; ++i) has_nan = has_nan || host[i] != host[i];
    expect(has_nan, "without the barrier some thread reads the NaN that was there");
  }
  unsetenv("LLAMA_EXT_CUDA_EMULATION_ORDER");

  launch(gpu, sum_kernel, dim3(1), 64, 0, memory);
  read(64);
  expect(host[0] == 496 && host[31] == 496 && host[32] == 1520,
         "a sum over a warp reaches every lane, and its warp alone");

  std::vector<uint16_t> a(256), b(128);
  for (size_t i = 0; i < 256; ++i) a[i] = llama_ext::f32_to_bf16(static_cast<float>(i * 7 % 13) - 6);
  for (size_t i = 0; i < 128; ++i) b[i] = llama_ext::f32_to_bf16(static_cast<float>(i * 5 % 11) - 5);
  auto* operands = static_cast<uint16_t*>(gpu.allocate(1024, "a test"));
  gpu.copy_to_device(operands, a.data(), 512);
  gpu.copy_to_device(operands + 256, b.data(), 256);
  launch(gpu, mma_kernel, dim3(1), 32, 512, operands, operands + 256, memory);
  read(128);
  bool is_product = true;
  for (size_t row = 0; row < 16; ++row) {
    for (size_t column = 0; column < 8; ++column) {
      float sum = 0;
      for (size_t k = 0; k < 16; ++k) {
        sum += llama_ext::bf16_to_f32(a[row * 16 + k]) * llama_ext::bf16_to_f32(b[k * 8 + column]);
      }
      is_product = is_product && host[row * 8 + column] == sum;
    }
  }
  expect(is_product, "mma multiplies matrices whose fragments lie as the PTX manual says");

  // Recording.
  {
    gpu.fill_zero(memory, 4096 * sizeof(float), 4096 * sizeof(float), 1);
    Arena arena(gpu);
    cudaGraph_t graph = nullptr;
    void* scratch[3] = {};
    {
      const Capture capture(gpu, arena);
      launch(gpu, count_kernel, dim3(1), 32, 0, memory);
      for (int i = 0; i < 2; ++i) scratch[i] = Scratch(gpu, 64).as<void>();
      const Scratch first(gpu, 64);
      scratch[2] = Scratch(gpu, 64).as<void>();
      expect(first.as<void>() == scratch[0], "a recording's operations share scratch memory, one after the other");
      expect(throws([&] { gpu.copy_to_device(memory, host.data(), 4); }), "a copy cannot be recorded");
      expect(throws([&] { const Capture inner(gpu, arena); }), "nor can a recording within a recording");
      graph = capture.end();
    }
    expect(scratch[0] == scratch[1] && scratch[2] != scratch[0], "but not those of one operation");
    read(1);
    expect(host[0] == 0, "what is recorded does not run");
    cudaGraphExec_t runnable = nullptr;
    cudaGraphInstantiate(&runnable, graph, 0);
    cudaGraphDestroy(graph);
    for (int i = 0; i < 3; ++i) cudaGraphLaunch(runnable, gpu.stream());
    read(1);
    expect(host[0] == 3, "and runs each time that it is replayed");
    cudaGraphExecDestroy(runnable);
    try {
      const Capture capture(gpu, arena);
      throw 1;
    } catch (int) {
    }
    launch(gpu, count_kernel, dim3(1), 32, 0, memory);
    read(1);
    expect(host[0] == 4, "after operations that threw while they were recorded, others run again");
  }
  {
    Arena arena(gpu);
    std::atomic<bool> is_done = false;
    std::thread other;
    {
      const Capture capture(gpu, arena);
      other = std::thread([&] {
        gpu.synchronize_device();
        is_done = true;
      });
      std::this_thread::sleep_for(std::chrono::milliseconds(50));
      expect(cudaDeviceSynchronize() != cudaSuccess, "waiting for a device while a stream captures is an error");
      cudaGetLastError();
      expect(!is_done, "so whoever waits for a device waits until nobody records");
    }
    other.join();
    expect(is_done, "and no longer");
  }
  for (int i = 0; i < 2; ++i)
    launch(gpu, arrivals_kernel, dim3(5), 32, 0, reinterpret_cast<unsigned*>(memory + 1), memory);
  read(1);
  expect(host[0] == 6, "one block of each launch comes last");

  {
    const Gpu other(1);
    auto* there = static_cast<float*>(other.allocate(4 * sizeof(float), "a test"));
    launch(other, store_kernel, dim3(1), 32, 0, there, 3);
    other.copy_to_host(host.data(), there, 4 * sizeof(float));
    other.release(there);
    const Scratch scratch(other, 16);
    other.synchronize();
    expect(current_index() == 0, "what runs on another GPU leaves the thread's current one as it was");
    cudaGetLastError();
    cuda_emulation::launch(other.stream(), {dim3(1), 32, 0, 1, false}, [] {});
    expect(cudaGetLastError() != cudaSuccess, "a stream of another GPU than the current one is an error");
    const CurrentGpu current = other.use();
    expect(current_index() == 1, "a GPU that is used is the current one meanwhile");
  }
  expect(current_index() == 0, "and no longer");
  unsetenv("LLAMA_EXT_CUDA_EMULATION_DEVICES");

  expect(throws([&] { launch(gpu, divergent_barrier_kernel, dim3(1), 32, 0); }),
         "a barrier that some threads miss is an error");
  expect(throws([&] { launch(gpu, different_collectives_kernel, dim3(1), 32, 0, memory); }),
         "lanes that call different collectives are an error");
  expect(throws([&] { launch(gpu, sum_kernel, dim3(1), 33, 0, memory); }), "a block of 33 threads is an error");
  expect(throws([&] { launch(gpu, sum_kernel, dim3(1), 32, 300 * 1024, memory); }),
         "too much shared memory is an error");
  launch(gpu, unwaited_copy_kernel, dim3(1), 32, 32 * 16, memory, memory);
  read(32);
  expect(host[0] != host[0], "a copy that is not waited for reads as NaN");
  const auto copied = [&](const auto& copy) {
    float number = 1;
    copy(&number);
    number = 2;
    read(1);
    return host[0];
  };
  expect(copied([&](const float* from) { gpu.copy_to_device(memory, from, sizeof *from); }) == 2,
         "a copy may read the host's memory later");
  setenv("LLAMA_EXT_CUDA_EMULATION_LATE_COPIES", "0", 1);
  expect(copied([&](const float* from) { gpu.copy_to_device(memory, from, sizeof *from); }) == 1, "or at once");
  unsetenv("LLAMA_EXT_CUDA_EMULATION_LATE_COPIES");
  expect(throws([&] { gpu.copy_to_host(host.data(), host.data(), 4); }),
         "a copy from the host's memory as the device's is an error");
  expect(throws([&] { static_cast<void>(gpu.allocate(size_t{1} << 40, "much")); }),
         "more memory than there is is an error");

  expect(signal_of([&] { launch(gpu, store_kernel, dim3(1), 32, 0, memory, 4095); }) == 0,
         "the last element can be written");
  expect(signal_of([&] { launch(gpu, store_kernel, dim3(1), 32, 0, memory, 4096); }) == SIGSEGV,
         "a store beyond an allocation ends the process");
  expect(signal_of([&] { launch(gpu, shared_store_kernel, dim3(1), 32, 64, 16); }) == SIGSEGV,
         "a store beyond the shared memory ends the process");
  if (cuda_emulation::has_protection_keys()) {
    expect(signal_of([&] { host[0] = memory[0]; }) == SIGSEGV,
           "host code that follows a device pointer ends the process");
  } else {
    std::printf("skipped: this processor has no protection keys\n");
  }
  return claims::exit_status();
}
