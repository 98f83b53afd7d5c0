#pragma once

#include <cstdint>
#include <vector>

#include "core/tensor_view.h"

namespace llama_ext {

/// Rotates each pair (x[i], x[i + D/2]) of every head by the angle of its token and of i, in place ("half-split", the
/// layout of Hugging Face checkpoints):
///   x[i] <- x[i] cos[t, i] - x[i + D/2] sin[t, i];   x[i + D/2] <- x[i + D/2] cos[t, i] + x[i] sin[t, i]
/// x: (T, heads, D) f32, rows may be strided, D even. cos, sin: (T, D/2) f32, contiguous.
/// With `inverse` by the opposite angle, which is what the gradient needs: d_x from d_y, in place. Throws ShapeError, DTypeError.
/// Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021.
struct RopeArgs {
  TensorView x;
  TensorView cos;
  TensorView sin;
  bool inverse = false;
};

void check(const RopeArgs& args);

enum class RopeKind : uint8_t { kDefault, kLinear, kLlama3, kYarn };

/// Frequencies of a model, resolved: every default is filled in by whoever reads the config.
struct RopeConfig {
  RopeKind kind = RopeKind::kDefault;
  int64_t head_dim = 0;  // even, > 0
  double theta = 10000.0;
  double factor = 1.0;            // linear, llama3, yarn
  double low_freq_factor = 1.0;   // llama3
  double high_freq_factor = 4.0;  // llama3
  int64_t original_context = 0;   // llama3, yarn: positions
  double attention_factor = 1.0;  // yarn: scales cos and sin
  double beta_fast = 32.0;        // yarn: rotations
  double beta_slow = 1.0;         // yarn: rotations
  bool truncate = true;           // yarn: round the ramp's ends to whole dimensions
};

/// The angle of pair i at position p is p * result[i]; D/2 values, computed in float64. Throws OptionError.
/// Sources: default as above; linear: Chen et al., "Extending Context Window of Large Language Models via Positional
/// Interpolation", 2023; llama3: the Llama 3.1 reference code; yarn: Peng et al., "YaRN", 2023.
std::vector<double> rope_inverse_frequencies(const RopeConfig& config);

/// cos, sin: (count, D/2) f32 for positions[0 .. count), each angle and its cosine computed in float64 and rounded once.
void rope_angles(const RopeConfig& config, const std::vector<double>& inverse_frequencies, const int64_t* positions,
                 int64_t count, float* cos, float* sin);

}  // namespace llama_ext
