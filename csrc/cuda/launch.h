// How kernels are started, and the shared memory that they are given: the only places that differ in the emulator of the tests.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "cuda/runtime.h"

namespace llama_ext::cuda {

inline constexpr unsigned kWarp = 32;
inline constexpr unsigned kAllLanes = 0xffffffffu;
/// Threads of a block wherever nothing speaks for another number.
inline constexpr unsigned kThreads = 256;

/// When a kernel starts: once all before it are done, or, in a recording, as soon as there is room. An early one must call
/// wait_for_predecessors() before it writes, and before it reads what a kernel of the same recording has written by then. Weights it may read
/// earlier, and what the replay before this one has left, as replays run one after the other.
enum class Start : uint8_t { kInOrder, kEarly };

#if !defined(LLAMA_EXT_CUDA_EMULATED)
/// Lets launches of the kernel ask for as much as a block may have. Not for what one launch needs: that is kept with the kernel, and
/// another thread's launch could lower it in between.
inline void allow_shared_memory(const Gpu& gpu, const void* kernel) {
  require_success(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                       static_cast<int>(gpu.shared_bytes_per_block())),
                  "a kernel's shared memory");
}
#endif

/// For the large kernels of a recorded token, which run beside each other where one starts early: a multiprocessor is divided alike for
/// all of them, 64 KB of Hopper's 228 for shared memory (more where a block needs more), so that it never has to be divided anew in
/// between, and loads on their way have the first cache; or all of it, where weights on their way have shared memory (matmul_one_row.cu): for a
/// kernel by itself, or for all of them where all such products are made so.
template <typename... Parameters>
void divide_alike([[maybe_unused]] const Gpu& gpu, [[maybe_unused]] void (*kernel)(Parameters...),
                  [[maybe_unused]] bool streams = false) {
#if !defined(LLAMA_EXT_CUDA_EMULATED)
  const CurrentGpu current = gpu.use();
  const int percent_shared = streams || gpu.streams_one_row() == StreamsOneRow::kAll ? 100 : 28;
  require_success(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                       cudaFuncAttributePreferredSharedMemoryCarveout, percent_shared),
                  "how a kernel divides its multiprocessor");
#endif
}

/// Runs kernel(args...) on the GPU's stream, in blocks of `threads` (a multiple of 32) with `shared_bytes` of dynamic shared
/// memory. An empty grid is no work. Throws DeviceError.
template <Start kStart = Start::kInOrder, typename... Parameters, typename... Arguments>
void launch(const Gpu& gpu, void (*kernel)(Parameters...), dim3 grid, unsigned threads, size_t shared_bytes,
            Arguments... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  const CurrentGpu current = gpu.use();
#if defined(LLAMA_EXT_CUDA_EMULATED)
  // By value: a recording keeps it.
  const bool is_early = kStart == Start::kEarly && gpu.overlaps() && Capture::of(gpu) != nullptr;
  cuda_emulation::launch(gpu.stream(), {grid, threads, shared_bytes, 1, is_early},
                         [=] { kernel(static_cast<Parameters>(arguments)...); });
  require_success(cudaGetLastError(), "a kernel");
#else
  if (shared_bytes > 48 * 1024) allow_shared_memory(gpu, reinterpret_cast<const void*>(kernel));
  const auto start = [&](Parameters... parameters) {
    void* pointers[] = {const_cast<void*>(static_cast<const void*>(&parameters))...};
    if (kStart == Start::kEarly && gpu.overlaps() && Capture::of(gpu) != nullptr) {
      cudaLaunchAttribute early{};
      early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
      early.val.programmaticStreamSerializationAllowed = 1;
      cudaLaunchConfig_t config{};
      config.gridDim = grid;
      config.blockDim = dim3(threads);
      config.dynamicSmemBytes = shared_bytes;
      config.stream = gpu.stream();
      config.attrs = &early;
      config.numAttrs = 1;
      return require_success(cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), pointers), "a kernel");
    }
    require_success(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, dim3(threads), pointers, shared_bytes,
                                     gpu.stream()),
                    "a kernel");
  };
  start(static_cast<Parameters>(arguments)...);
#endif
}

/// Lets the next kernel start, where it may start early: once all blocks have called this, or are done.
__device__ __forceinline__ void let_next_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

/// Whether a kernel lets the next one start as soon as it waits itself.
enum class NextStart : uint8_t { kNow, kLater };

/// Waits until all kernels before this one are done and what they wrote can be seen.
template <NextStart kNext = NextStart::kNow>
__device__ __forceinline__ void wait_for_predecessors() {
  if constexpr (kNext == NextStart::kNow) let_next_start();
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#elif defined(LLAMA_EXT_CUDA_EMULATED)
  cuda_emulation::wait_for_predecessors();
#endif
}

/// The block's dynamic shared memory.
__device__ __forceinline__ unsigned char* shared_memory() {
#if defined(LLAMA_EXT_CUDA_EMULATED)
  return cuda_emulation::block().shared;
#else
  extern __shared__ __align__(16) unsigned char bytes[];
  return bytes;
#endif
}

__host__ __device__ constexpr int64_t blocks_for(int64_t count, int64_t each) { return (count + each - 1) / each; }

/// The compute capability that the kernel was compiled for, as it runs on this GPU: 90 for 9.0.
template <typename... Parameters>
int architecture_of(const Gpu& gpu, void (*kernel)(Parameters...)) {
  const CurrentGpu current = gpu.use();
  cudaFuncAttributes attributes{};
  require_success(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)), "asking for a kernel");
  return attributes.ptxVersion;  // binaryVersion is the GPU's own, also of what the driver has compiled
}

/// As launch(), `blocks` in clusters of `cluster`, for kernels of Hopper's own instructions.
template <typename... Parameters, typename... Arguments>
void launch_clusters(const Gpu& gpu, void (*kernel)(Parameters...), unsigned blocks, unsigned cluster, unsigned threads,
                     size_t shared_bytes, Arguments... arguments) {
  if (blocks == 0) return;
  const CurrentGpu current = gpu.use();
#if defined(LLAMA_EXT_CUDA_EMULATED)
  cuda_emulation::launch(gpu.stream(), {dim3(blocks), threads, shared_bytes, cluster, false},
                         [=] { kernel(static_cast<Parameters>(arguments)...); });
  require_success(cudaGetLastError(), "a kernel");
#else
  allow_shared_memory(gpu, reinterpret_cast<const void*>(kernel));
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {cluster, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = gpu.stream();
  config.attrs = &attribute;
  config.numAttrs = 1;
  const auto start = [&](Parameters... parameters) {
    void* pointers[] = {const_cast<void*>(static_cast<const void*>(&parameters))...};
    require_success(cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), pointers), "a kernel");
  };
  start(static_cast<Parameters>(arguments)...);
#endif
}

}  // namespace llama_ext::cuda
