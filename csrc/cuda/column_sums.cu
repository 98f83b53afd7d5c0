// Sums over rows, of each column: for biases, and of what blocks of rows leave of a norm's weight. A warp has 32 columns of every
// eighth row of 256; the eight meet in order, and so do the sums of each 256 rows in a second kernel. Bound by memory.
#include "cuda/kernels.h"
#include "cuda/launch.h"

namespace llama_ext::cuda {
namespace {

constexpr int64_t kRowsPerSum = 256;
constexpr int kColumns = static_cast<int>(kWarp);
constexpr int kGroups = static_cast<int>(kThreads / kWarp);

__global__ void column_sums_kernel(Rows x, int64_t rows, int64_t width, int64_t rows_per_block, Rows to,
                                   bool accumulate) {
  auto* sums = reinterpret_cast<float*>(shared_memory());  // (kGroups, kColumns)
  const int lane = static_cast<int>(threadIdx.x % kWarp);
  const int group = static_cast<int>(threadIdx.x / kWarp);
  const int64_t column = int64_t{blockIdx.x} * kColumns + lane;
  const int64_t begin = int64_t{blockIdx.y} * rows_per_block;
  const int64_t end = begin + rows_per_block < rows ? begin + rows_per_block : rows;
  float sum = 0.0f;
  if (column < width) {
#pragma unroll 4
    for (int64_t row = begin + group; row < end; row += kGroups) sum += x.row(row)[column];
  }
  sums[group * kColumns + lane] = sum;
  __syncthreads();
  if (group != 0 || column >= width) return;
  for (int i = 1; i < kGroups; ++i) sum += sums[i * kColumns + lane];
  float& out = to.row(blockIdx.y)[column];
  out = accumulate ? out + sum : sum;
}

}  // namespace

void add_column_sums(const Gpu& gpu, Rows x, int64_t rows, int64_t width, float* sums) {
  const auto columns = static_cast<unsigned>(blocks_for(width, kColumns));
  const size_t shared = kThreads * sizeof(float);
  const int64_t parts = blocks_for(rows, kRowsPerSum);
  if (parts <= 1 || parts > 65535) {
    return launch(gpu, column_sums_kernel, dim3(columns), kThreads, shared, x, rows, width, rows, Rows{sums, width},
                  /*accumulate=*/true);
  }
  const Scratch memory(gpu, static_cast<size_t>(parts * width) * sizeof(float));
  const Rows partial{memory.as<float>(), width};
  launch(gpu, column_sums_kernel, dim3(columns, static_cast<unsigned>(parts)), kThreads, shared, x, rows, width,
         kRowsPerSum, partial, /*accumulate=*/false);
  launch(gpu, column_sums_kernel, dim3(columns), kThreads, shared, partial, parts, width, parts, Rows{sums, width},
         /*accumulate=*/true);
}

}  // namespace llama_ext::cuda
