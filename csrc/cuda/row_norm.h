// 1 / sqrt(mean(x^2) + eps) of a row of x, with the same bits wherever it is made: of 128 neighbours, a segment, a warp adds up the squares,
// four of them a lane, and of all segments a warp does so in their order. Neither the threads of a block nor the way in which they share
// out segments change that, and a kernel that has the row in registers anyway does not read it again.
#pragma once

#include "cuda/numeric.h"

namespace llama_ext::cuda {

inline constexpr int kSegment = 4 * static_cast<int>(kWarp);
__host__ __device__ constexpr int segments_of(int width) { return (width + kSegment - 1) / kSegment; }
inline size_t squares_bytes(int width) { return static_cast<size_t>(segments_of(width)) * sizeof(float); }

/// Whether load_four() may read four numbers at once: of rows that lie at 16 bytes, of a width of whole fours.
__device__ __forceinline__ bool lies_whole(const float* row, int width) {
  return (reinterpret_cast<uintptr_t>(row) % sizeof(float4)) == 0 && width % 4 == 0;
}

/// Elements k to k + 3 of a row, zeros beyond its last. is_whole: four of them are there and lie at 16 bytes, wherever k begins.
__device__ __forceinline__ float4 load_four(const float* row, int k, int cols, bool is_whole) {
  if (is_whole) return *reinterpret_cast<const float4*>(row + k);
  float4 four{0.0f, 0.0f, 0.0f, 0.0f};
  if (k < cols) four.x = row[k];
  if (k + 1 < cols) four.y = row[k + 1];
  if (k + 2 < cols) four.z = row[k + 2];
  if (k + 3 < cols) four.w = row[k + 3];
  return four;
}

/// Of a segment whose numbers the warp's lanes have, zeros where there are none.
__device__ __forceinline__ float squares_of_segment(const float4& four) {
  return warp_sum(fmaf(four.w, four.w, fmaf(four.z, four.z, fmaf(four.y, four.y, four.x * four.x))));
}

/// Of a row whose segments' sums are in `squares`, behind a barrier.
__device__ __forceinline__ float inverse_rms_of_segments(const float* squares, int width, float eps) {
  float sum = 0.0f;
  for (int i = static_cast<int>(threadIdx.x % kWarp); i < segments_of(width); i += static_cast<int>(kWarp)) {
    sum += squares[i];
  }
  return 1.0f / sqrtf(warp_sum(sum) / static_cast<float>(width > 0 ? width : 1) + eps);
}

/// By a whole block. A thread has of x the fours at 4 thread, and so on, 4 blockDim.x further on each time (whatever where they would be
/// beyond the row); those that follow are read here. squares: segments_of(width) numbers of shared memory, which all threads have read
/// after the next barrier.
template <int kHeld>
__device__ __forceinline__ float block_inverse_rms(const float4 (&held)[kHeld], const float* x, int width, float eps,
                                                   float* squares) {
  const auto thread = static_cast<int>(threadIdx.x);
  const auto turn = static_cast<int>(4 * blockDim.x);
  const int end = segments_of(width) * kSegment;
  const auto store = [&](int k, float sum) {
    if (thread % static_cast<int>(kWarp) == 0 && k < end) squares[k / kSegment] = sum;
  };
  float sums[kHeld];  // without a branch between them, so that shuffles do not wait for each other
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    sums[i] = squares_of_segment(4 * thread + i * turn < width ? held[i] : float4{0.0f, 0.0f, 0.0f, 0.0f});
  }
#pragma unroll
  for (int i = 0; i < kHeld; ++i) store(4 * thread + i * turn, sums[i]);
  const bool is_whole = lies_whole(x, width);
  // Who holds more has few rows that are longer.
  [[maybe_unused]] constexpr int kAtOnce = kHeld == 1 ? 4 : 1;
#pragma unroll kAtOnce
  for (int k = 4 * thread + kHeld * turn; k < end; k += turn) {
    store(k, squares_of_segment(load_four(x, k, width, is_whole && k < width)));
  }
  __syncthreads();
  return inverse_rms_of_segments(squares, width, eps);
}
__device__ __forceinline__ float block_inverse_rms(const float* x, int width, float eps, float* squares) {
  const auto thread = static_cast<int>(threadIdx.x);
  const float4 first[1] = {load_four(x, 4 * thread, width, lies_whole(x, width) && 4 * thread < width)};
  return block_inverse_rms(first, x, width, eps, squares);
}

__device__ __forceinline__ float normalized(float x, float inverse_rms, float weight) {
  return x * inverse_rms * weight;
}
__device__ __forceinline__ float4 normalized(const float4& x, float inverse_rms, const float4& weight) {
  return {normalized(x.x, inverse_rms, weight.x), normalized(x.y, inverse_rms, weight.y),
          normalized(x.z, inverse_rms, weight.z), normalized(x.w, inverse_rms, weight.w)};
}

}  // namespace llama_ext::cuda
