// A thread for an element. Bound by memory.
#include "cuda/kernels.h"
#include "cuda/numeric.h"
#include "ops/dropout.h"

namespace llama_ext::cuda {
namespace {

__global__ void dropout_kernel(Rows x, Rows y, int64_t count, int64_t width, DropoutView how) {
  const int64_t number = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (number >= count) return;
  const int64_t row = number / width;
  const int64_t column = number % width;
  const bool is_kept = how.threshold == 0 || dropout_bits(how.seed, static_cast<uint64_t>(number)) >= how.threshold;
  const float kept = is_kept ? how.scale * x.row(row)[column] : 0.0f;
  float& out = y.row(row)[column];
  out = how.accumulate ? out + kept : kept;
}

}  // namespace

void dropout(const Gpu& gpu, Rows x, Rows y, int64_t rows, int64_t width, DropoutView how) {
  const int64_t count = rows * width;
  launch(gpu, dropout_kernel, dim3(static_cast<unsigned>(blocks_for(count, kThreads))), kThreads, 0, x, y, count, width,
         how);
}

}  // namespace llama_ext::cuda
