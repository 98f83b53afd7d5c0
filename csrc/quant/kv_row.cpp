#include "quant/kv_row.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

namespace llama_ext {

float quantize_kv(const float* x, int64_t size, int8_t* codes) {
  uint32_t top = 0;  // the bits of the largest magnitude: a NaN's are the largest of all
  for (int64_t i = 0; i < size; ++i) top = std::max(top, std::bit_cast<uint32_t>(x[i]) & 0x7fffffffu);
  const float largest = std::bit_cast<float>(top);
  // Below the first bound the scale would lose its bits; nothing notices such numbers.
  if (largest < 1e-30f || !std::isfinite(largest)) {
    std::fill(codes, codes + size, int8_t{0});
    return std::isfinite(largest) ? 0.0f : std::numeric_limits<float>::quiet_NaN();
  }
  const float scale = std::bit_cast<float>((std::bit_cast<uint32_t>(largest / 127.0f) + 0xffu) & ~0xffu);
  const float inverse = 1.0f / scale;
  for (int64_t i = 0; i < size; ++i) {
    // To nearest, ties to even: a form that compilers vectorise on any instruction set.
    const float code = (x[i] * inverse + 12582912.0f) - 12582912.0f;
    codes[i] = static_cast<int8_t>(std::clamp(code, -127.0f, 127.0f));
  }
  return scale;
}

}  // namespace llama_ext
