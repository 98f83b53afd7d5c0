// A thread for a pair of one head. Bound by memory.
#include "cuda/kernels.h"
#include "cuda/numeric.h"
#include "cuda/rotation.h"

namespace llama_ext::cuda {
namespace {

__global__ void rope_kernel(Rows x, int64_t pairs, int heads, int head_dim, const float* cosines, const float* sines,
                            float sign) {
  const int64_t number = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (number >= pairs) return;
  const int half = head_dim / 2;
  const int i = static_cast<int>(number % half);
  const int64_t token = number / half / heads;
  float* head = x.row(token) + number / half % heads * head_dim;
  rotate(head[i], head[i + half], cosines[token * half + i], sign * sines[token * half + i]);
}

}  // namespace

void rope(const Gpu& gpu, Rows x, int64_t tokens, int heads, int head_dim, const float* cosines, const float* sines,
          bool inverse) {
  const int64_t pairs = tokens * heads * (head_dim / 2);
  launch(gpu, rope_kernel, dim3(static_cast<unsigned>(blocks_for(pairs, kThreads))), kThreads, 0, x, pairs, heads,
         head_dim, cosines, sines, inverse ? -1.0f : 1.0f);
}

}  // namespace llama_ext::cuda
