// Loops over a row's vectors, the last of which may be shorter.
#pragma once

#include <cstdint>

namespace llama_ext::LLAMA_EXT_ISA_NAMESPACE {

/// Calls function(first element, lanes) for each vector of a row. Lanes are the constant kWidth but for the last one, so that
/// take and put cost no branch.
template <typename Function>
static inline __attribute__((always_inline)) void for_each_vector(int64_t size, const Function& function) {
  int64_t i = 0;
  for (; i + kWidth <= size; i += kWidth) function(i, static_cast<int64_t>(kWidth));
  if (i < size) function(i, size - i);
}

static inline __attribute__((always_inline)) vf take(const float* p, int64_t n, float fill = 0.0f) {
  return n >= kWidth ? vload(p) : vload_n(p, n, fill);
}

static inline __attribute__((always_inline)) void put(float* p, vf x, int64_t n) {
  if (n >= kWidth) {
    vstore(p, x);
  } else {
    vstore_n(p, x, n);
  }
}

}  // namespace llama_ext::LLAMA_EXT_ISA_NAMESPACE
