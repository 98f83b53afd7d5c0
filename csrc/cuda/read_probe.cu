// How fast the GPU's memory can be read: what every other figure is a share of. Each thread reads 16 bytes at a time, several in
// flight, and keeps their exclusive or, so that nothing is left out. Bound by memory, and by nothing else.
#include <chrono>

#include "cuda/kernels.h"
#include "cuda/numeric.h"

namespace llama_ext::cuda {
namespace {

constexpr int kInFlight = 4;

__global__ void read_probe_kernel(const uint4* from, int64_t count, uint32_t* out) {
  const int64_t threads = int64_t{gridDim.x} * blockDim.x;
  uint32_t found = 0;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += threads * kInFlight) {
    uint4 words[kInFlight];
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      words[j] = i + j * threads < count ? __ldcs(from + i + j * threads) : uint4{0, 0, 0, 0};
    }
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) found ^= words[j].x ^ words[j].y ^ words[j].z ^ words[j].w;
  }
  if (found == 0x9e3779b9u) out[threadIdx.x] = found;  // never, as far as the compiler knows
}

}  // namespace

double read_probe(const Gpu& gpu, int64_t nbytes, int rounds) {
  const Scratch memory(gpu, static_cast<size_t>(nbytes) + kThreads * sizeof(uint32_t));
  gpu.fill_zero(memory.as<void>(), static_cast<size_t>(nbytes), static_cast<size_t>(nbytes), 1);
  auto* out = reinterpret_cast<uint32_t*>(memory.as<unsigned char>() + nbytes);
  const dim3 grid(static_cast<unsigned>(gpu.multiprocessors() * 16));
  const auto run = [&] { launch(gpu, read_probe_kernel, grid, kThreads, 0, memory.as<uint4>(), nbytes / 16, out); };
  run();
  gpu.synchronize();
  const auto begin = std::chrono::steady_clock::now();
  for (int i = 0; i < rounds; ++i) run();
  gpu.synchronize();
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
  return static_cast<double>(nbytes) * rounds / seconds.count();
}

}  // namespace llama_ext::cuda
