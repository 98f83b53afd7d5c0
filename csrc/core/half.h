// Scalar conversions between float32 and the 16-bit formats. Vector versions live in cpu/simd.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

namespace llama_ext {

static inline float bf16_to_f32(uint16_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }

/// Rounds to nearest, ties to even; a NaN stays a (quiet) NaN.
static inline uint16_t f32_to_bf16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

/// Rounds once, to nearest, ties to even. Through float32 rounded to odd: its last bit records that something was cut off, so the second rounding sees on
/// which side of a tie the value lies. Rounding to nearest twice would not. Source: Boldo & Melquiond, "Emulation of
/// FMA and Correctly Rounded Sums: Proved Algorithms Using Rounding to Odd", 2008.
static inline uint16_t f64_to_bf16(double value) {
  const float nearest = static_cast<float>(value);
  if (std::isnan(value) || static_cast<double>(nearest) == value) return f32_to_bf16(nearest);
  uint32_t bits = std::bit_cast<uint32_t>(nearest);
  if (std::fabs(static_cast<double>(nearest)) > std::fabs(value)) --bits;  // now rounded towards zero
  return f32_to_bf16(std::bit_cast<float>(bits | 1u));
}

/// Exact: every float16 value, denormals included, is a float32 value.
static inline float f16_to_f32(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t exponent = (half >> 10) & 0x1fu;
  const uint32_t mantissa = half & 0x3ffu;
  if (exponent == 0x1fu) return std::bit_cast<float>(sign | 0x7f800000u | (mantissa << 13));
  if (exponent != 0) return std::bit_cast<float>(sign | ((exponent + 112u) << 23) | (mantissa << 13));
  const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
  return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(magnitude));
}

}  // namespace llama_ext
