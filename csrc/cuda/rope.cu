// A block for a token, a thread for a pair of one head. Bound by memory.
#include "cuda/kernels.h"
#include "cuda/numeric.h"
#include "cuda/rotation.h"

namespace llama_ext::cuda {
namespace {

__global__ void rope_kernel(Rows x, int pairs, int half, const float* cosines, const float* sines, float sign) {
  const int64_t token = blockIdx.x;
  float* row = x.row(token);
  for (int pair = static_cast<int>(threadIdx.x); pair < pairs; pair += static_cast<int>(blockDim.x)) {
    const int i = pair % half;
    float* head = row + pair / half * 2 * half;
    rotate(head[i], head[i + half], cosines[token * half + i], sign * sines[token * half + i]);
  }
}

}  // namespace

void rope(const Gpu& gpu, Rows x, int64_t tokens, int heads, int head_dim, const float* cosines, const float* sines,
          bool inverse) {
  const int half = head_dim / 2;
  const int pairs = heads * half;
  if (pairs == 0) return;
  const unsigned warps = static_cast<unsigned>(blocks_for(pairs, kWarp));
  launch(gpu, rope_kernel, dim3(static_cast<unsigned>(tokens)), warps < kThreads / kWarp ? warps * kWarp : kThreads, 0,
         x, pairs, half, cosines, sines, inverse ? -1.0f : 1.0f);
}

}  // namespace llama_ext::cuda
