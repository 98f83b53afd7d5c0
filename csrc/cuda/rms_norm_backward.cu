// Gradients of rms_norm: a block for a row gives d_x and keeps 1 / rms; those of the weight are sums over rows, which a thread for
// a column runs through 64 at a time, and then through those sums, in order. Bound by memory.
#include "cuda/kernels.h"
#include "cuda/numeric.h"

namespace llama_ext::cuda {
namespace {

constexpr int64_t kRowsPerSum = 64;

__global__ void inverse_rms_kernel(Rows x, int width, float eps, float* inverse_rms) {
  auto* place = reinterpret_cast<float*>(shared_memory());
  const float inverse = block_inverse_rms(x.row(blockIdx.x), width, eps, place);
  if (threadIdx.x == 0) inverse_rms[blockIdx.x] = inverse;
}

__global__ void weight_sums_kernel(NormGradients g, int64_t rows, int width, const float* inverse_rms, float* sums) {
  const int c = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (c >= width) return;
  const int64_t begin = int64_t{blockIdx.y} * kRowsPerSum;
  float sum = 0.0f;
  for (int64_t row = begin; row < begin + kRowsPerSum && row < rows; ++row) {
    sum = fmaf(g.d_y.row(row)[c], g.x.row(row)[c] * inverse_rms[row], sum);
  }
  sums[int64_t{blockIdx.y} * width + c] = sum;
}

__global__ void add_sums_kernel(const float* sums, int64_t count, int width, float* to) {
  const int c = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (c >= width) return;
  float sum = 0.0f;
  for (int64_t i = 0; i < count; ++i) sum += sums[i * width + c];
  to[c] += sum;
}

__global__ void d_x_kernel(NormGradients g, int width, const float* inverse_rms) {
  auto* place = reinterpret_cast<float*>(shared_memory());
  const float* x = g.x.row(blockIdx.x);
  const float* d_y = g.d_y.row(blockIdx.x);
  float* d_x = g.d_x.row(blockIdx.x);
  const float inverse = inverse_rms[blockIdx.x];
  float dots = 0.0f;
  for (int c = static_cast<int>(threadIdx.x); c < width; c += static_cast<int>(blockDim.x)) {
    dots = fmaf(g.norm.weight[c] * d_y[c], x[c] * inverse, dots);
  }
  const float mean = block_sum(dots, place) / static_cast<float>(width);
  for (int c = static_cast<int>(threadIdx.x); c < width; c += static_cast<int>(blockDim.x)) {
    // d_x may be d_y: each thread writes what it alone reads.
    const float gradient = inverse * fmaf(g.norm.weight[c], d_y[c], -(x[c] * inverse * mean));
    d_x[c] = g.accumulate ? d_x[c] + gradient : gradient;
  }
}

}  // namespace

void rms_norm_backward(const Gpu& gpu, const NormGradients& g, int64_t rows, int width) {
  if (rows == 0 || width == 0) return;
  const Scratch inverse(gpu, static_cast<size_t>(rows) * sizeof(float));
  auto* inverse_rms = inverse.as<float>();
  const dim3 all(static_cast<unsigned>(rows));
  launch(gpu, inverse_rms_kernel, all, kThreads, kWarp * sizeof(float), g.x, width, g.norm.eps, inverse_rms);
  if (g.d_weight != nullptr) {
    const int64_t count = blocks_for(rows, kRowsPerSum);
    const Scratch sums(gpu, static_cast<size_t>(count * width) * sizeof(float));
    const unsigned columns = static_cast<unsigned>(blocks_for(width, kThreads));
    launch(gpu, weight_sums_kernel, dim3(columns, static_cast<unsigned>(count)), kThreads, 0, g, rows, width,
           inverse_rms, sums.as<float>());
    launch(gpu, add_sums_kernel, dim3(columns), kThreads, 0, sums.as<float>(), count, width, g.d_weight);
  }
  launch(gpu, d_x_kernel, all, kThreads, kWarp * sizeof(float), g, width, inverse_rms);
}

}  // namespace llama_ext::cuda
