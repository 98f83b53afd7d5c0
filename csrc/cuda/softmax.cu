// A block for a row: the largest, the sum of exponentials, and the quotients. Bound by memory, or by the exponentials of rows that
// the cache holds.
#include "cuda/kernels.h"
#include "cuda/numeric.h"

namespace llama_ext::cuda {
namespace {

__global__ void softmax_kernel(Rows x, int64_t width, Rows y) {
  auto* place = reinterpret_cast<float*>(shared_memory());
  const float* from = x.row(blockIdx.x);
  float* to = y.row(blockIdx.x);
  float largest = -INFINITY;
  for (int64_t i = threadIdx.x; i < width; i += blockDim.x) largest = max_or_nan(largest, from[i]);
  largest = block_max(largest, place);
  float sum = 0.0f;
  for (int64_t i = threadIdx.x; i < width; i += blockDim.x) sum += expf(from[i] - largest);
  sum = block_sum(sum, place);
  // y may be x: each thread writes what it alone reads.
  for (int64_t i = threadIdx.x; i < width; i += blockDim.x) to[i] = expf(from[i] - largest) / sum;
}

}  // namespace

void softmax(const Gpu& gpu, Rows x, int64_t rows, int64_t width, Rows y) {
  launch(gpu, softmax_kernel, dim3(static_cast<unsigned>(rows)), kThreads, kWarp * sizeof(float), x, width, y);
}

}  // namespace llama_ext::cuda
