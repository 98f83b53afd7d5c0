// A block for a row, which is read once for its largest number and the sum of exponentials (float32, four at a time summed in float64);
// and, for training, once more for the gradient in the logits' place. Labels travel as an argument of the kernel, so that nothing is
// copied and nobody waits. Bound by memory.
#include <algorithm>

#include "cuda/kernels.h"
#include "cuda/numeric.h"
#include "cuda/vectors.h"

namespace llama_ext::cuda {
namespace {

constexpr int64_t kLabels = 512;
constexpr int64_t kWide = 8192;  // a row that more threads share
constexpr unsigned kWideThreads = 1024;
constexpr int32_t kIgnored = -100;  // ops/cross_entropy.h

struct Labels {
  int32_t of[kLabels];
};

struct Gradient {
  bool is_wanted;
  double scale;
};

/// The largest of what a thread has met, and the sum of the exponentials of how far the others lie below it.
struct Running {
  float largest = -INFINITY;
  double sum = 0.0;

  /// The exponent's origin: a finite one as long as nothing was met.
  __device__ __forceinline__ float origin() const { return largest == -INFINITY ? 0.0f : largest; }
  __device__ __forceinline__ void add(const float values[kVector]) {
    float top = values[0];
#pragma unroll
    for (int i = 1; i < kVector; ++i) top = max_or_nan(top, values[i]);
    if (!(top <= largest)) {
      sum *= static_cast<double>(expf(largest - top));
      largest = top;
    }
    float powers = 0.0f;
#pragma unroll
    for (int i = 0; i < kVector; ++i) powers += expf(values[i] - origin());
    sum += static_cast<double>(powers);
  }
};

template <bool kVectors>
__global__ void __launch_bounds__(kWideThreads)
    cross_entropy_kernel(Rows logits, int64_t width, const __grid_constant__ Labels labels, float* losses, float* hits,
                         Gradient gradient) {
  auto* place = reinterpret_cast<double*>(shared_memory());
  float* x = logits.row(blockIdx.x);
  const int32_t label = labels.of[blockIdx.x];
  const int64_t first = int64_t{threadIdx.x} * kVector;
  const int64_t step = int64_t{blockDim.x} * kVector;
  if (label == kIgnored) {
    if (threadIdx.x == 0) losses[blockIdx.x] = 0.0f;
    if (threadIdx.x == 0 && hits != nullptr) hits[blockIdx.x] = 0.0f;
    if (!gradient.is_wanted) return;
    const float zeros[kVector] = {};
    for (int64_t at = first; at < width; at += step) write_vector<kVectors>(x, at, width, zeros);
    return;
  }
  Running mine;
  const float label_logit = x[label];
  bool is_largest = true;  // and the first of those
  for (int64_t at = first; at < width; at += step) {
    float values[kVector];
    read_vector<kVectors>(x, at, width, values);
#pragma unroll
    for (int i = 1; i < kVector; ++i) values[i] = at + i < width ? values[i] : -INFINITY;
    mine.add(values);
    if (hits == nullptr) continue;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (values[i] > label_logit || (values[i] == label_logit && at + i < label)) is_largest = false;
    }
  }
  if (hits != nullptr) {
    const float beaten = block_max(is_largest ? 0.0f : 1.0f, reinterpret_cast<float*>(place));
    if (threadIdx.x == 0) hits[blockIdx.x] = 1.0f - beaten;
  }
  const float largest = block_max(mine.largest, reinterpret_cast<float*>(place));
  // Who has met nothing adds nothing: far below 0, the distance from its origin is infinity as a power.
  const double own = mine.sum == 0.0 ? 0.0 : mine.sum * static_cast<double>(expf(mine.origin() - largest));
  const double sum = block_sum(own, place);
  if (threadIdx.x == 0) {
    losses[blockIdx.x] = static_cast<float>(static_cast<double>(largest) - static_cast<double>(label_logit) + log(sum));
  }
  if (!gradient.is_wanted) return;
  __syncthreads();  // the label's logit has been read by all
  const double share = gradient.scale / sum;
  for (int64_t at = first; at < width; at += step) {
    float values[kVector];
    read_vector<kVectors>(x, at, width, values);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const float power = expf(values[i] - largest);
      // Where p - 1 is small, float32 would lose digits.
      values[i] = at + i == label ? static_cast<float>(gradient.scale * (static_cast<double>(power) / sum - 1.0))
                                  : static_cast<float>(share) * power;
    }
    write_vector<kVectors>(x, at, width, values);
  }
}

}  // namespace

void cross_entropy(const Gpu& gpu, Rows logits, int64_t rows, int64_t width, const int32_t* labels, float* losses,
                   float* hits, const double* scale) {
  for (int64_t begin = 0; begin < rows; begin += kLabels) {
    const int64_t count = std::min(kLabels, rows - begin);
    Labels some{};
    std::copy_n(labels + begin, count, some.of);
    const bool is_aligned = has_vectors(logits.data, logits.stride);
    launch(gpu, is_aligned ? cross_entropy_kernel<true> : cross_entropy_kernel<false>,
           dim3(static_cast<unsigned>(count)), width < kWide ? kThreads : kWideThreads, kWarp * sizeof(double),
           Rows{logits.row(begin), logits.stride}, width, some, losses + begin,
           hits == nullptr ? nullptr : hits + begin, Gradient{scale != nullptr, scale == nullptr ? 0.0 : *scale});
  }
}

}  // namespace llama_ext::cuda
