// Float32 numbers transposed: a block turns 32 x 32 of them around in shared memory, so that a warp reads and writes 128 bytes in a row.
// Bound by memory.
#include "cuda/kernels.h"
#include "cuda/launch.h"

namespace llama_ext::cuda {
namespace {

constexpr int kTile = 32;
constexpr int kPitch = kTile + 1;  // a column lies in 32 banks

__global__ void __launch_bounds__(kThreads) transpose_kernel(Rows x, int64_t rows, int64_t width, Rows y) {
  auto* tile = reinterpret_cast<float*>(shared_memory());  // (kTile rows of x, kPitch)
  const int64_t across = blocks_for(width, kTile);
  const int64_t first_row = int64_t{blockIdx.x} / across * kTile;
  const int64_t first_column = int64_t{blockIdx.x} % across * kTile;
  const int lane = static_cast<int>(threadIdx.x) % kTile;
  const int warp = static_cast<int>(threadIdx.x) / kTile;
  constexpr int kWarps = static_cast<int>(kThreads) / kTile;
#pragma unroll
  for (int i = warp; i < kTile; i += kWarps) {
    if (first_row + i < rows && first_column + lane < width) {
      tile[i * kPitch + lane] = x.row(first_row + i)[first_column + lane];
    }
  }
  __syncthreads();
#pragma unroll
  for (int i = warp; i < kTile; i += kWarps) {
    if (first_column + i < width && first_row + lane < rows) {
      y.row(first_column + i)[first_row + lane] = tile[lane * kPitch + i];
    }
  }
}

}  // namespace

void transpose(const Gpu& gpu, Rows x, int64_t rows, int64_t width, Rows y) {
  const int64_t tiles = blocks_for(rows, kTile) * blocks_for(width, kTile);
  launch(gpu, transpose_kernel, dim3(static_cast<unsigned>(tiles)), kThreads, kTile * kPitch * sizeof(float), x, rows,
         width, y);
}

}  // namespace llama_ext::cuda
