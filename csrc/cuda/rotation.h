// The rotation of ops/rope.h, as rope and kv_store do it.
#pragma once

#include <cuda_runtime.h>

namespace llama_ext::cuda {

__device__ __forceinline__ void rotate(float& first, float& second, float cosine, float sine) {
  const float x = first;
  const float y = second;
  first = fmaf(x, cosine, -(y * sine));
  second = fmaf(y, cosine, x * sine);
}

}  // namespace llama_ext::cuda
