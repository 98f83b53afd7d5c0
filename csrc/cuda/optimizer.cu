// Steps of optimisers: a thread for an element, everything read and written once. Bound by memory. The sum of squares runs in float64
// over a number of blocks that depends on nothing, and a second kernel adds those in order.
#include "cuda/kernels.h"
#include "cuda/numeric.h"

namespace llama_ext::cuda {
namespace {

constexpr unsigned kSumBlocks = 256;

__global__ void adam_kernel(AdamView step, int64_t size, float* parameter, const float* gradient, float* first,
                            float* second) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= size) return;
  float p = parameter[i];
  const float scaled = step.gradient_scale * gradient[i];
  const float g = fmaf(step.added_decay, p, scaled);
  const float m = fmaf(step.beta1, first[i], step.one_less_beta1 * g);
  const float v = fmaf(step.beta2, second[i], step.one_less_beta2 * g * g);
  first[i] = m;
  second[i] = v;
  p = fmaf(-step.parameter_decay, p, p);  // p (1 - lr decay), without rounding 1 - lr decay
  const float root = sqrtf(v * step.second_scale) + step.eps;
  // Padding and weights that never had a gradient: 0 / 0 with eps = 0 would be NaN.
  parameter[i] = p - step.step_size * m / fmaxf(root, 1e-38f);
}

__global__ void sgd_kernel(SgdView step, int64_t size, float* parameter, const float* gradient, float* velocity) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= size) return;
  const float p = parameter[i];
  const float g = fmaf(step.decay, p, step.gradient_scale * gradient[i]);
  float change = g;
  if (velocity != nullptr) {
    const float v = fmaf(step.momentum, velocity[i], g);
    velocity[i] = v;
    change = step.nesterov ? fmaf(step.momentum, v, g) : v;
  }
  parameter[i] = fmaf(-step.lr, change, p);
}

__global__ void squares_kernel(const float* x, int64_t size, double* partial) {
  auto* place = reinterpret_cast<double*>(shared_memory());
  double sum = 0.0;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < size; i += int64_t{gridDim.x} * blockDim.x) {
    const double value = static_cast<double>(x[i]);
    sum += value * value;
  }
  sum = block_sum(sum, place);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

__global__ void total_kernel(const double* partial, double* total) {
  auto* place = reinterpret_cast<double*>(shared_memory());
  const double sum = block_sum(partial[threadIdx.x], place);
  if (threadIdx.x == 0) *total = sum;
}

dim3 grid_for(int64_t size) { return dim3(static_cast<unsigned>(blocks_for(size, kThreads))); }

}  // namespace

void adam(const Gpu& gpu, const AdamView& step, int64_t size, float* parameter, const float* gradient, float* first,
          float* second) {
  launch(gpu, adam_kernel, grid_for(size), kThreads, 0, step, size, parameter, gradient, first, second);
}

void sgd(const Gpu& gpu, const SgdView& step, int64_t size, float* parameter, const float* gradient, float* velocity) {
  launch(gpu, sgd_kernel, grid_for(size), kThreads, 0, step, size, parameter, gradient, velocity);
}

double sum_of_squares(const Gpu& gpu, const float* x, int64_t size) {
  static_assert(kSumBlocks == kThreads);
  const Scratch sums(gpu, (kSumBlocks + 1) * sizeof(double));
  auto* partial = sums.as<double>();
  launch(gpu, squares_kernel, dim3(kSumBlocks), kThreads, kWarp * sizeof(double), x, size, partial);
  launch(gpu, total_kernel, dim3(1), kThreads, kWarp * sizeof(double), partial, partial + kSumBlocks);
  double total = 0.0;
  gpu.copy_to_host(&total, partial + kSumBlocks, sizeof total);
  gpu.synchronize();
  return total;
}

}  // namespace llama_ext::cuda
