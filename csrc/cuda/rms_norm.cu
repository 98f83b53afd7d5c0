// A block for a row: one pass for the sum of squares, one for the product, which the cache serves. Bound by memory.
#include "cuda/kernels.h"
#include "cuda/numeric.h"

namespace llama_ext::cuda {
namespace {

__global__ void rms_norm_kernel(Rows x, int width, NormView norm, Rows y, float* inverse_rms) {
  wait_for_predecessors();
  auto* place = reinterpret_cast<float*>(shared_memory());
  const float* from = x.row(blockIdx.x);
  float* to = y.row(blockIdx.x);
  const float inverse = block_inverse_rms(from, width, norm.eps, place);
  for (int i = static_cast<int>(threadIdx.x); i < width; i += static_cast<int>(blockDim.x)) {
    to[i] = normalized(from[i], inverse, norm.weight[i]);
  }
  if (inverse_rms != nullptr && threadIdx.x == 0) inverse_rms[blockIdx.x] = inverse;
}

}  // namespace

void rms_norm(const Gpu& gpu, Rows x, int64_t rows, int width, NormView norm, Rows y, float* inverse_rms) {
  launch<Start::kEarly>(gpu, rms_norm_kernel, dim3(static_cast<unsigned>(rows)), kThreads, kWarp * sizeof(float), x,
                        width, norm, y, inverse_rms);
}

}  // namespace llama_ext::cuda
