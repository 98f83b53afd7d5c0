// Keys and values as int8: one position of one head with a scale of its own.
#pragma once

#include <cstdint>

namespace llama_ext {

/// Rounds x (size) to codes in [-127, 127] and returns their scale: |x|max / 127, rounded up to 16 significant
/// bits, so that code x scale is exact in float32, and rounding what was read back changes nothing. A NaN, with codes of 0,
/// when an entry is not finite.
float quantize_kv(const float* x, int64_t size, int8_t* codes);

}  // namespace llama_ext
