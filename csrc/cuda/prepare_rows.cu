// A block for a row of activations, on the way to a product: normalised, and for the tensor cores rounded to 16 bits. bfloat16 has
// float32's range. float16 has not, so a row is first scaled by a power of two that brings its largest number just below
// the end of that range: rounding costs half a unit of 11 bits, as everywhere in float16. Bound by memory.
#include "cuda/kernels.h"
#include "cuda/numeric.h"

namespace llama_ext::cuda {
namespace {

__global__ void normalize_rows_kernel(Rows x, int width, NormView norm, Rows y) {
  auto* place = reinterpret_cast<float*>(shared_memory());
  const float* from = x.row(blockIdx.x);
  float* to = y.row(blockIdx.x);
  const float inverse = block_inverse_rms(from, width, norm.eps, place);
  for (int i = static_cast<int>(threadIdx.x); i < width; i += static_cast<int>(blockDim.x)) {
    to[i] = normalized(from[i], inverse, norm.weight[i]);
  }
}

__global__ void prepare_rows_kernel(Rows x, int width, int stride, NormView norm, bool to_half, uint16_t* y,
                                    float* row_scales) {
  auto* place = reinterpret_cast<float*>(shared_memory());
  const float* from = x.row(blockIdx.x);
  uint16_t* to = y + int64_t{blockIdx.x} * stride;
  float inverse = 1.0f;
  if (norm.weight != nullptr) inverse = block_inverse_rms(from, width, norm.eps, place);
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

/// The same to bfloat16 for rows of at most kEach x kThreads numbers, which registers hold: x is read once.
template <int kEach>
__global__ void round_rows_kernel(Rows x, int width, int stride, NormView norm, uint16_t* y) {
  auto* place = reinterpret_cast<float*>(shared_memory());
  const float* from = x.row(blockIdx.x);
  uint16_t* to = y + int64_t{blockIdx.x} * stride;
  const int thread = static_cast<int>(threadIdx.x);
  constexpr int kStep = static_cast<int>(kThreads);
  float values[kEach];
#pragma unroll
  for (int i = 0; i < kEach; ++i) values[i] = thread + i * kStep < width ? from[thread + i * kStep] : 0.0f;
  if (norm.weight != nullptr) {
    float weights[kEach];
#pragma unroll
    for (int i = 0; i < kEach; ++i) weights[i] = thread + i * kStep < width ? norm.weight[thread + i * kStep] : 0.0f;
    // In the order of block_inverse_rms(): zeros beyond the width change no bits.
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < kEach; ++i) squares = fmaf(values[i], values[i], squares);
    const float inverse = inverse_rms(block_sum(squares, place), width, norm.eps);
#pragma unroll
    for (int i = 0; i < kEach; ++i) values[i] = normalized(values[i], inverse, weights[i]);
  }
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int k = thread + i * kStep;
    if (k < stride) to[k] = k < width ? to_bf16(values[i]) : uint16_t{0};
  }
}

template <int kEach>
bool start_round_rows(const Gpu& gpu, Rows x, int64_t rows, int width, int stride, NormView norm, uint16_t* y) {
  if (stride > kEach * static_cast<int>(kThreads)) return false;
  launch(gpu, round_rows_kernel<kEach>, dim3(static_cast<unsigned>(rows)), kThreads, kWarp * sizeof(float), x, width,
         stride, norm, y);
  return true;
}

}  // namespace

void normalize_rows(const Gpu& gpu, Rows x, int64_t rows, int width, NormView norm, Rows y) {
  launch(gpu, normalize_rows_kernel, dim3(static_cast<unsigned>(rows)), kThreads, kWarp * sizeof(float), x, width, norm,
         y);
}

void prepare_rows(const Gpu& gpu, Rows x, int64_t rows, int width, int stride, NormView norm, uint16_t* y,
                  float* row_scales) {
  if (row_scales == nullptr && (start_round_rows<4>(gpu, x, rows, width, stride, norm, y) ||
                                start_round_rows<8>(gpu, x, rows, width, stride, norm, y) ||
                                start_round_rows<16>(gpu, x, rows, width, stride, norm, y))) {
    return;
  }
  launch(gpu, prepare_rows_kernel, dim3(static_cast<unsigned>(rows)), kThreads, kWarp * sizeof(float), x, width, stride,
         norm, row_scales != nullptr, y, row_scales);
}

}  // namespace llama_ext::cuda
