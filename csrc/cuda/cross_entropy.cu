// A block for a row: exponentials in float32, their sum in float64; and, for training, the gradient in the logits' place. Labels
// travel as an argument of the kernel, so that nothing is copied and nobody waits. Bound by memory.
#include <algorithm>

#include "cuda/kernels.h"
#include "cuda/numeric.h"

namespace llama_ext::cuda {
namespace {

constexpr int64_t kLabels = 512;
constexpr int32_t kIgnored = -100;  // ops/cross_entropy.h

struct Labels {
  int32_t of[kLabels];
};

struct Gradient {
  bool is_wanted;
  double scale;
};

__global__ void cross_entropy_kernel(Rows logits, int64_t width, const __grid_constant__ Labels labels, float* losses,
                                     Gradient gradient) {
  auto* place = reinterpret_cast<double*>(shared_memory());
  float* x = logits.row(blockIdx.x);
  const int32_t label = labels.of[blockIdx.x];
  if (label == kIgnored) {
    if (threadIdx.x == 0) losses[blockIdx.x] = 0.0f;
    if (!gradient.is_wanted) return;
    for (int64_t i = threadIdx.x; i < width; i += blockDim.x) x[i] = 0.0f;
    return;
  }
  float largest = -INFINITY;
  for (int64_t i = threadIdx.x; i < width; i += blockDim.x) largest = max_or_nan(largest, x[i]);
  largest = block_max(largest, reinterpret_cast<float*>(place));
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < width; i += blockDim.x) sum += static_cast<double>(expf(x[i] - largest));
  sum = block_sum(sum, place);
  if (threadIdx.x == 0) {
    losses[blockIdx.x] = static_cast<float>(static_cast<double>(largest) - static_cast<double>(x[label]) + log(sum));
  }
  if (!gradient.is_wanted) return;
  __syncthreads();  // the label's logit has been read
  const double share = gradient.scale / sum;
  for (int64_t i = threadIdx.x; i < width; i += blockDim.x) {
    const float power = expf(x[i] - largest);
    // Where p - 1 is small, float32 would lose digits.
    x[i] = i == label ? static_cast<float>(gradient.scale * (static_cast<double>(power) / sum - 1.0))
                      : static_cast<float>(share) * power;
  }
}

}  // namespace

void cross_entropy(const Gpu& gpu, Rows logits, int64_t rows, int64_t width, const int32_t* labels, float* losses,
                   const double* scale) {
  for (int64_t begin = 0; begin < rows; begin += kLabels) {
    const int64_t count = std::min(kLabels, rows - begin);
    Labels some{};
    std::copy_n(labels + begin, count, some.of);
    launch(gpu, cross_entropy_kernel, dim3(static_cast<unsigned>(count)), kThreads, kWarp * sizeof(double),
           Rows{logits.row(begin), logits.stride}, width, some, losses + begin,
           Gradient{scale != nullptr, scale == nullptr ? 0.0 : *scale});
  }
}

}  // namespace llama_ext::cuda
