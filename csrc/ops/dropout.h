#pragma once

#include <cstdint>
#include <string_view>

#include "core/tensor_view.h"

namespace llama_ext {

/// y = scale x keep / (1 - p), or y += ... with `accumulate` (a residual connection); keep is 0 with probability p, else 1
/// x, y: (M, N) f32, rows may be strided. y may be x itself unless it accumulates. 0 <= p < 1; p = 0 copies, scales or adds.
/// Whether an element is kept is a function of (seed, its index m N + n) alone (dropout_bits). So the gradient is the same operation
/// on d_y, nothing is saved, and threads change nothing. Throws ShapeError, DTypeError, OptionError.
/// Source: Srivastava et al., "Dropout", 2014.
struct DropoutArgs {
  TensorView x;
  TensorView y;
  double p = 0.0;
  uint64_t seed = 0;
  bool accumulate = false;
  double scale = 1.0;
};

void check(const DropoutArgs& args);
/// Throws OptionError unless 0 <= p < 1.
void require_dropout(double p, std::string_view op);

/// The seed of a place in a computation, from the seed of the whole and a number for the place.
constexpr uint64_t dropout_seed(uint64_t seed, uint64_t place) {
  // Steele, Lea & Flood, "Fast Splittable Pseudorandom Number Generators", 2014 (SplitMix64).
  uint64_t z = seed + (place + 1) * 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

/// 32 random bits of element `index`: a mixing function with two rounds of multiplications, so that loops over it vectorise.
/// Source of the constants: Wellons' search for low-bias 32-bit hashes ("lowbias32", public domain).
constexpr uint32_t dropout_bits(uint64_t seed, uint64_t index) {
  uint32_t x = static_cast<uint32_t>(index) ^ static_cast<uint32_t>(seed);
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= (x >> 15) ^ static_cast<uint32_t>(seed >> 32) ^ static_cast<uint32_t>(index >> 32);
  x *= 0x846ca68bu;
  return x ^ (x >> 16);
}

/// An element is kept when its bits are at least this.
constexpr uint32_t dropout_threshold(double p) { return static_cast<uint32_t>(p * 4294967296.0); }

}  // namespace llama_ext
