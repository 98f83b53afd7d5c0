// Rounding to bf16 where no vector instruction does it.
#pragma once

#include <cstdint>

namespace llama_ext::LLAMA_EXT_ISA_NAMESPACE {

/// To nearest, ties to even; a NaN stays one. As core/half.h, which no kernel may include (its functions are inline for all).
static inline uint16_t round_to_bf16(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

}  // namespace llama_ext::LLAMA_EXT_ISA_NAMESPACE
