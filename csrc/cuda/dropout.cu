// A thread for four elements of a row. Bound by memory.
#include "cuda/kernels.h"
#include "cuda/numeric.h"
#include "cuda/vectors.h"
#include "ops/dropout.h"

namespace llama_ext::cuda {
namespace {

template <bool kVectors>
__global__ void dropout_kernel(Rows x, Rows y, int64_t width, DropoutView how) {
  const int64_t row = blockIdx.x;
  const int64_t at = (int64_t{blockIdx.y} * blockDim.x + threadIdx.x) * kVector;
  if (at >= width) return;
  float values[kVector];
  float sums[kVector] = {};
  read_vector<kVectors>(x.row(row), at, width, values);
  if (how.accumulate) read_vector<kVectors>(y.row(row), at, width, sums);
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    const auto number = static_cast<uint64_t>(row * width + at + i);
    const bool is_kept = how.threshold == 0 || dropout_bits(how.seed, number) >= how.threshold;
    const float kept = is_kept ? how.scale * values[i] : 0.0f;
    values[i] = how.accumulate ? sums[i] + kept : kept;
  }
  write_vector<kVectors>(y.row(row), at, width, values);
}

}  // namespace

void dropout(const Gpu& gpu, Rows x, Rows y, int64_t rows, int64_t width, DropoutView how) {
  const dim3 grid(static_cast<unsigned>(rows), static_cast<unsigned>(blocks_for(width, kThreads * kVector)));
  const bool is_aligned = has_vectors(x.data, x.stride) && has_vectors(y.data, y.stride);
  launch(gpu, is_aligned ? dropout_kernel<true> : dropout_kernel<false>, grid, kThreads, 0, x, y, width, how);
}

}  // namespace llama_ext::cuda
