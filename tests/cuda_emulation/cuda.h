// The driver's part that csrc/cuda uses of CUDA: descriptions of matrices for Hopper's copy engine, and what is asked about a GPU.
#pragma once

#include <cstdint>

using CUdevice = int;
using cuuint32_t = uint32_t;
using cuuint64_t = uint64_t;
enum CUresult { CUDA_SUCCESS = 0, CUDA_ERROR_INVALID_VALUE = 1 };
enum CUtensorMapDataType { CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 = 9 };
enum CUtensorMapInterleave { CU_TENSOR_MAP_INTERLEAVE_NONE };
enum CUtensorMapSwizzle { CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_SWIZZLE_128B = 3 };
enum CUtensorMapL2promotion { CU_TENSOR_MAP_L2_PROMOTION_L2_256B = 3 };
enum CUtensorMapFloatOOBfill { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE };

struct alignas(64) CUtensorMap {
  const unsigned char* data;
  uint32_t rank;
  uint64_t sizes[3];    // innermost first
  uint64_t pitches[2];  // bytes, of all but the innermost
  uint32_t box[3];
};
