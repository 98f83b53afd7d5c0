// Steps of optimisers: a thread for four elements, everything read and written once. Bound by memory. The sum of squares runs in float64
// over a number of blocks that depends on nothing, and a second kernel adds those in order.
#include "cuda/kernels.h"
#include "cuda/numeric.h"
#include "cuda/vectors.h"

namespace llama_ext::cuda {
namespace {

constexpr unsigned kSumBlocks = 1024;

/// Alignment is the allocation's.
__device__ __forceinline__ int64_t first_element() {
  return (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * kVector;
}

template <bool kVectors>
__global__ void adam_kernel(AdamView step, int64_t size, float* parameter, const float* gradient, float* first,
                            float* second) {
  const int64_t at = first_element();
  if (at >= size) return;
  float p[kVector];
  float g[kVector];
  float m[kVector];
  float v[kVector];
  read_vector<kVectors>(parameter, at, size, p);
  read_vector<kVectors>(gradient, at, size, g);
  read_vector<kVectors>(first, at, size, m);
  read_vector<kVectors>(second, at, size, v);
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    g[i] = fmaf(step.added_decay, p[i], step.gradient_scale * g[i]);
    m[i] = fmaf(step.beta1, m[i], step.one_less_beta1 * g[i]);
    v[i] = fmaf(step.beta2, v[i], step.one_less_beta2 * g[i] * g[i]);
    p[i] = fmaf(-step.parameter_decay, p[i], p[i]);  // p (1 - lr decay), without rounding 1 - lr decay
    const float root = sqrtf(v[i] * step.second_scale) + step.eps;
    // Padding and weights that never had a gradient: 0 / 0 with eps = 0 would be NaN.
    p[i] -= step.step_size * m[i] / fmaxf(root, 1e-38f);
  }
  write_vector<kVectors>(parameter, at, size, p);
  write_vector<kVectors>(first, at, size, m);
  write_vector<kVectors>(second, at, size, v);
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

template <bool kVectors>
__global__ void squares_kernel(const float* x, int64_t size, double* partial) {
  auto* place = reinterpret_cast<double*>(shared_memory());
  double sum = 0.0;
  for (int64_t at = first_element(); at < size; at += int64_t{gridDim.x} * blockDim.x * kVector) {
    float values[kVector];
    read_vector<kVectors>(x, at, size, values);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const double value = static_cast<double>(values[i]);
      sum += value * value;
    }
  }
  sum = block_sum(sum, place);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

__global__ void total_kernel(const double* partial, double* total) {
  auto* place = reinterpret_cast<double*>(shared_memory());
  double sum = 0.0;
  for (unsigned i = threadIdx.x; i < kSumBlocks; i += blockDim.x) sum += partial[i];
  sum = block_sum(sum, place);
  if (threadIdx.x == 0) *total = sum;
}

dim3 grid_for(int64_t size) { return dim3(static_cast<unsigned>(blocks_for(size, kThreads))); }

}  // namespace

void adam(const Gpu& gpu, const AdamView& step, int64_t size, float* parameter, const float* gradient, float* first,
          float* second) {
  bool is_aligned = true;
  for (const float* each : {static_cast<const float*>(parameter), gradient, static_cast<const float*>(first),
                            static_cast<const float*>(second)}) {
    is_aligned = is_aligned && has_vectors(each, 0);
  }
  const dim3 grid = grid_for(blocks_for(size, kVector));
  launch(gpu, is_aligned ? adam_kernel<true> : adam_kernel<false>, grid, kThreads, 0, step, size, parameter, gradient,
         first, second);
}

void sgd(const Gpu& gpu, const SgdView& step, int64_t size, float* parameter, const float* gradient, float* velocity) {
  launch(gpu, sgd_kernel, grid_for(size), kThreads, 0, step, size, parameter, gradient, velocity);
}

void sum_of_squares(const Gpu& gpu, const float* x, int64_t size, double* total) {
  const Scratch sums(gpu, kSumBlocks * sizeof(double));
  auto* partial = sums.as<double>();
  launch(gpu, has_vectors(x, 0) ? squares_kernel<true> : squares_kernel<false>, dim3(kSumBlocks), kThreads,
         kWarp * sizeof(double), x, size, partial);
  launch(gpu, total_kernel, dim3(1), kThreads, kWarp * sizeof(double), partial, total);
}

}  // namespace llama_ext::cuda
