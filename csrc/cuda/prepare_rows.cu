// A block for a row of activations, on the way to a product: normalised, and for the tensor cores rounded to 16 bits. bfloat16 has
// float32's range. float16 has not, so a row is first scaled by a power of two that brings its largest number just below
// the end of that range: rounding costs half a unit of 11 bits, as everywhere in float16. Bound by memory.
#include "cuda/kernels.h"
#include "cuda/mma.h"
#include "cuda/numeric.h"
#include "cuda/row_norm.h"

namespace llama_ext::cuda {
namespace {

__global__ void prepare_rows_kernel(Rows x, int width, int stride, NormView norm, bool to_half, uint16_t* y,
                                    float* row_scales) {
  auto* place = reinterpret_cast<float*>(shared_memory());
  const float* from = x.row(blockIdx.x);
  uint16_t* to = y + int64_t{blockIdx.x} * stride;
  float inverse = 1.0f;
  if (norm.weight != nullptr) inverse = block_inverse_rms(from, width, norm.eps, place + kWarp);
  const auto value = [&](int i) {
    if (i >= width) return 0.0f;
    return norm.weight == nullptr ? from[i] : normalized(from[i], inverse, norm.weight[i]);
  };
  float power = 1.0f;
  if (to_half) {
    float largest = 0.0f;
    for (int i = static_cast<int>(threadIdx.x); i < width; i += static_cast<int>(blockDim.x)) {
      largest = max_or_nan(largest, fabsf(value(i)));
    }
    power = power_for_f16(block_max(largest, place));
    if (threadIdx.x == 0) row_scales[blockIdx.x] = 1.0f / power;
  }
  for (int i = static_cast<int>(threadIdx.x); i < stride; i += static_cast<int>(blockDim.x)) {
    to[i] = to_half ? to_f16(value(i) * power) : to_bf16(value(i));
  }
}

/// The same to bfloat16 for rows of at most kHeld fours a thread, which registers hold: x is read once.
template <int kHeld>
__global__ void __launch_bounds__(kThreads)
    round_rows_kernel(Rows x, int width, int stride, NormView norm, uint16_t* y) {
  const float* from = x.row(blockIdx.x);
  uint16_t* to = y + int64_t{blockIdx.x} * stride;
  const int first = 4 * static_cast<int>(threadIdx.x);
  constexpr int kTurn = 4 * static_cast<int>(kThreads);
  const bool is_whole = lies_whole(from, width);
  float4 held[kHeld];
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int k = first + i * kTurn;
    held[i] = load_four(from, k, width, is_whole && k < width);
  }
  if (norm.weight != nullptr) {
    const bool is_whole_weight = lies_whole(norm.weight, width);
    float4 gains[kHeld];
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int k = first + i * kTurn;
      gains[i] = load_four(norm.weight, k, width, is_whole_weight && k < width);
    }
    const float inverse = block_inverse_rms(held, from, width, norm.eps, reinterpret_cast<float*>(shared_memory()));
#pragma unroll
    for (int i = 0; i < kHeld; ++i) held[i] = normalized(held[i], inverse, gains[i]);
  }
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int k = first + i * kTurn;
    if (k >= stride) continue;
    *reinterpret_cast<uint2*>(to + k) = {round_pair(held[i].x, held[i].y), round_pair(held[i].z, held[i].w)};
  }
}

template <int kHeld>
bool start_round_rows(const Gpu& gpu, Rows x, int64_t rows, int width, int stride, NormView norm, uint16_t* y) {
  if (stride > kHeld * 4 * static_cast<int>(kThreads)) return false;
  launch(gpu, round_rows_kernel<kHeld>, dim3(static_cast<unsigned>(rows)), kThreads, squares_bytes(width), x, width,
         stride, norm, y);
  return true;
}

}  // namespace

void prepare_rows(const Gpu& gpu, Rows x, int64_t rows, int width, int stride, NormView norm, uint16_t* y,
                  float* row_scales) {
  if (row_scales == nullptr && (start_round_rows<1>(gpu, x, rows, width, stride, norm, y) ||
                                start_round_rows<2>(gpu, x, rows, width, stride, norm, y) ||
                                start_round_rows<4>(gpu, x, rows, width, stride, norm, y))) {
    return;
  }
  launch(gpu, prepare_rows_kernel, dim3(static_cast<unsigned>(rows)), kThreads,
         kWarp * sizeof(float) + squares_bytes(width), x, width, stride, norm, row_scales != nullptr, y, row_scales);
}

}  // namespace llama_ext::cuda
