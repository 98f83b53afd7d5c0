// Descriptions of matrices that Hopper's copy engine takes.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "cuda/runtime.h"

namespace llama_ext::cuda {

/// bfloat16 numbers of `rank` axes, the innermost first: `size` of each, `pitch` bytes between elements of all but the innermost.
/// A box of `box` numbers is brought at a time, its rows of 128 bytes swizzled; zeros come from outside. Throws DeviceError.
CUtensorMap tensor_map(const Gpu& gpu, const void* data, int rank, const int64_t* size, const int64_t* pitch,
                       const int* box);

}  // namespace llama_ext::cuda
