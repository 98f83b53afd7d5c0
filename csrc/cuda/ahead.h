// Weights that will be read soon, brought into the GPU's second cache while its memory has nothing else to do. On Hopper, by its
// copy engine: it takes no registers and no first cache, and nobody waits for it.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/kernels.h"

namespace llama_ext::cuda {

/// Asks for bytes [from, from + nbytes) of memory that no kernel writes, both multiples of 16. One lane's business.
__device__ __forceinline__ void bring_near(const unsigned char* from, uint32_t nbytes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(__cvta_generic_to_global(from)), "r"(nbytes));
#elif defined(LLAMA_EXT_CUDA_EMULATED)
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0 || nbytes == 0 || nbytes % 16 != 0 ||
      !cuda_emulation::is_device_memory(from, nbytes)) {
    cuda_emulation::fail_launch("what is asked for ahead is no device memory, or not in pieces of 16 bytes");
  }
#endif
}

/// Asks for the piece of 32 bytes in which *from is.
__device__ __forceinline__ void bring_sector_near(const void* from) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(from)));
#elif defined(LLAMA_EXT_CUDA_EMULATED)
  if (!cuda_emulation::is_device_memory(from, 1))
    cuda_emulation::fail_launch("what is asked for ahead is no device memory");
#endif
}

inline constexpr int64_t kAheadPiece = 8192;  // bytes that a lane asks for at once

/// Of `workers` lanes, number `worker` asks for its share of the pieces.
__device__ __forceinline__ void bring_near(const AheadView& ahead, int64_t worker, int64_t workers) {
#pragma unroll
  for (int i = 0; i < AheadView::kMost; ++i) {
#pragma unroll 1
    for (int64_t at = worker * kAheadPiece; at < ahead.nbytes[i]; at += workers * kAheadPiece) {
      const int64_t left = ahead.nbytes[i] - at;
      bring_near(ahead.data[i] + at, static_cast<uint32_t>(left < kAheadPiece ? left : kAheadPiece));
    }
  }
}

}  // namespace llama_ext::cuda
