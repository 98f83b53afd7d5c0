// Exact scores from logits.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace llama_ext {

/// log(sum(exp(logits))) in float64: float32 would lose digits of a sum over a large vocabulary. count >= 1, all
/// finite.
inline double log_sum_exp(const float* logits, int64_t count) {
  const double largest = static_cast<double>(*std::max_element(logits, logits + count));
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += std::exp(static_cast<double>(logits[i]) - largest);
  return largest + std::log(sum);
}

}  // namespace llama_ext
