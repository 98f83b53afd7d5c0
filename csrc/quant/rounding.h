// The inner loops of rounding weights to codes, which a backend may have vectors for: whoever runs them, the bits are the same.
#pragma once

#include <cstdint>

namespace llama_ext {

/// The most weights that share a scale.
inline constexpr int kMaxRoundingGroup = 128;

/// Weights that share a scale, finite.
struct RoundingGroup {
  const float* w;
  const float* importance;  // of their squared errors, or nullptr for equal ones
  int size;                 // in [1, kMaxRoundingGroup]
};

/// w = scale q + min, with a whole q in [low, high].
struct RoundingFit {
  float scale;
  float min;
  float low;
  float high;
};

struct RoundingLoops {
  /// The smallest and the largest weight. False when one does not lie within (-limit, limit), as NaN does not.
  bool (*range)(const float* w, int size, float limit, float* lowest, float* highest);
  /// The sum of importance (w - (scale q + min))^2, q = (w - min) / scale clamped to [low, high] and rounded to nearest, ties to
  /// even. Float32, in eight lanes, weight i in lane i % 8, which are added ((0 + 1) + (2 + 3)) + ((4 + 5) + (6 + 7)); no product
  /// and sum in one step.
  float (*error)(const RoundingGroup& group, const RoundingFit& fit);
  /// The same q, less `low`.
  void (*codes)(const RoundingGroup& group, const RoundingFit& fit, uint8_t* codes);
};

/// Plain loops.
extern const RoundingLoops kPlainRounding;

}  // namespace llama_ext
