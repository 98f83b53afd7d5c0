// Integer arithmetic that refuses to wrap. Every size that comes from a file, a config or a caller goes through here.
#pragma once

#include <cstdint>
#include <string_view>

#include "core/errors.h"

namespace llama_ext {

inline int64_t checked_mul(int64_t a, int64_t b, std::string_view what) {
  int64_t product = 0;
  require(a >= 0 && b >= 0 && !__builtin_mul_overflow(a, b, &product), ErrorKind::kLimit, what, ": ", a, " x ", b,
          " is out of range");
  return product;
}

inline int64_t checked_add(int64_t a, int64_t b, std::string_view what) {
  int64_t sum = 0;
  require(!__builtin_add_overflow(a, b, &sum), ErrorKind::kLimit, what, ": ", a, " + ", b, " is out of range");
  return sum;
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t multiple) { return ceil_div(a, multiple) * multiple; }

}  // namespace llama_ext
