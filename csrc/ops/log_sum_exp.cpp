#include "ops/log_sum_exp.h"

#include <algorithm>
#include <array>
#include <cmath>

namespace llama_ext {

double log_sum_exp(const float* values, int64_t size, float largest) {
  // In blocks: first the exponentials, independent of each other, then their sum, in lanes that are spelled out so that
  // the compiler may use SIMD without being allowed to reorder sums.
  constexpr size_t kLanes = 8;
  constexpr int64_t kBlock = 256;
  const double shift = static_cast<double>(largest);
  std::array<double, kBlock> terms;
  std::array<double, kLanes> sums{};
  for (int64_t begin = 0; begin < size; begin += kBlock) {
    const int64_t count = std::min(kBlock, size - begin);
    double* const out = terms.data();
    for (int64_t i = 0; i < count; ++i) out[i] = exp_nonpositive(static_cast<double>(values[begin + i]) - shift);
    std::fill(out + count, out + kBlock, 0.0);
    for (size_t i = 0; i < kBlock; i += kLanes) {
      for (size_t lane = 0; lane < kLanes; ++lane) sums[lane] += terms[i + lane];
    }
  }
  double sum = 0;
  for (double lane_sum : sums) sum += lane_sum;
  return shift + std::log(sum);
}

}  // namespace llama_ext
