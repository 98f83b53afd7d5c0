// 1 / sqrt(mean(x^2) + eps) of a row of x, with the same bits wherever the forward direction makes it: of 128 neighbours, a segment, a warp
// adds up the squares, four of them a lane, and of all segments a warp does so in their order. Neither the threads of a block nor the way in
// which they share out segments change that, and a kernel that has the row in registers anyway does not read it again.
#pragma once

#include "cuda/numeric.h"

namespace llama_ext::cuda {

inline constexpr int kSegment = 4 * static_cast<int>(kWarp);
inline constexpr int kMostSquares = 1024;  // whose sums are in shared memory at a time
__host__ __device__ constexpr int segments_of(int width) { return (width + kSegment - 1) / kSegment; }
/// Sums that block_inverse_rms() has in shared memory.
__host__ __device__ constexpr int squares_of(int width) {
  return segments_of(width) < kMostSquares ? segments_of(width) : kMostSquares;
}
inline size_t squares_bytes(int width) { return static_cast<size_t>(squares_of(width)) * sizeof(float); }

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

/// 1 / sqrt(mean(x^2) + eps) by a whole block. A thread has of x the fours at 4 thread, and so on, 4 blockDim.x further on each time
/// (whatever where they would be beyond the row); those that follow are read here. squares: squares_of(width) numbers of shared memory,
/// which all threads have read after the next barrier.
template <int kHeld>
__device__ __forceinline__ float block_inverse_rms(const float4 (&held)[kHeld], const float* x, int width, float eps,
                                                   float* squares) {
  const auto thread = static_cast<int>(threadIdx.x);
  const auto turn = static_cast<int>(4 * blockDim.x);
  const int all = segments_of(width);
  const bool is_whole = lies_whole(x, width);
  float total = 0.0f;
  for (int first = 0; first < all; first += kMostSquares) {
    const int count = min(all - first, kMostSquares);
    const auto store = [&](int segment, float sum) {
      if (thread % static_cast<int>(kWarp) == 0 && segment < count) squares[segment] = sum;
    };
    int segment = thread / static_cast<int>(kWarp);
    if (first == 0) {
      float sums[kHeld];  // without a branch between them, so that shuffles do not wait for each other
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        sums[i] = squares_of_segment(4 * thread + i * turn < width ? held[i] : float4{0.0f, 0.0f, 0.0f, 0.0f});
      }
#pragma unroll
      for (int i = 0; i < kHeld; ++i) store(segment + i * turn / kSegment, sums[i]);
      segment += kHeld * turn / kSegment;
    }
    // Who holds more has few rows that are longer.
    [[maybe_unused]] constexpr int kAtOnce = kHeld == 1 ? 4 : 1;
#pragma unroll kAtOnce
    for (; segment < count; segment += turn / kSegment) {
      const int k = (first + segment) * kSegment + thread % static_cast<int>(kWarp) * 4;
      store(segment, squares_of_segment(load_four(x, k, width, is_whole && k < width)));
    }
    __syncthreads();
    float sum = 0.0f;
    for (int i = thread % static_cast<int>(kWarp); i < count; i += static_cast<int>(kWarp)) sum += squares[i];
    total += warp_sum(sum);
    if (first + kMostSquares < all) __syncthreads();
  }
  return 1.0f / sqrtf(total / static_cast<float>(width > 0 ? width : 1) + eps);
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
