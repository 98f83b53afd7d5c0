// Four float32 numbers at once where memory allows it: for kernels that memory bounds.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace llama_ext::cuda {

inline constexpr int kVector = 4;

/// Whether rows that start `stride` numbers apart may be read and written 4 numbers at a time.
inline bool has_vectors(const float* data, int64_t stride) {
  return stride % kVector == 0 && reinterpret_cast<uintptr_t>(data) % (kVector * sizeof(float)) == 0;
}

/// Numbers [at, at + 4) of a row of `width`, zeros beyond it.
template <bool kVectors>
__device__ __forceinline__ void read_vector(const float* row, int64_t at, int64_t width, float values[kVector]) {
  if (kVectors && at + kVector <= width) {
    const float4 all = *reinterpret_cast<const float4*>(row + at);
    values[0] = all.x;
    values[1] = all.y;
    values[2] = all.z;
    values[3] = all.w;
    return;
  }
#pragma unroll
  for (int i = 0; i < kVector; ++i) values[i] = at + i < width ? row[at + i] : 0.0f;
}

template <bool kVectors>
__device__ __forceinline__ void write_vector(float* row, int64_t at, int64_t width, const float values[kVector]) {
  if (kVectors && at + kVector <= width) {
    *reinterpret_cast<float4*>(row + at) = {values[0], values[1], values[2], values[3]};
    return;
  }
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    if (at + i < width) row[at + i] = values[i];
  }
}

}  // namespace llama_ext::cuda
