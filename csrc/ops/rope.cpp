#include "ops/rope.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include "ops/argument_checks.h"

namespace llama_ext {

void check(const RopeArgs& args) {
  require_tensor(args.x, DType::kF32, {-1, -1, -1}, Rows::kStrided, "rope", "x");
  const int64_t tokens = args.x.dim(0);
  const int64_t head_dim = args.x.dim(2);
  require(head_dim % 2 == 0, ErrorKind::kShape, "rope: the last dimension of x must be even, got ", head_dim);
  require_tensor(args.cos, DType::kF32, {tokens, head_dim / 2}, Rows::kContiguous, "rope", "cos");
  require_tensor(args.sin, DType::kF32, {tokens, head_dim / 2}, Rows::kContiguous, "rope", "sin");
  require_disjoint(args.x, args.cos, "rope", "x", "cos");
  require_disjoint(args.x, args.sin, "rope", "x", "sin");
}

namespace {

void require_positive(double value, const char* field) {
  require(std::isfinite(value) && value > 0, ErrorKind::kOption, "rope: ", field, " must be a number above 0, got ",
          value);
}

void check(const RopeConfig& config) {
  require(config.head_dim > 0 && config.head_dim % 2 == 0, ErrorKind::kOption,
          "rope: head_dim must be even and above 0, got ", config.head_dim);
  require_positive(config.theta, "theta");
  if (config.kind == RopeKind::kDefault) return;
  require_positive(config.factor, "factor");
  if (config.kind == RopeKind::kLinear) return;
  require(config.original_context > 0, ErrorKind::kOption, "rope: original_context must be above 0, got ",
          config.original_context);
  if (config.kind == RopeKind::kLlama3) {
    require_positive(config.low_freq_factor, "low_freq_factor");
    require_positive(config.high_freq_factor, "high_freq_factor");
    require(config.low_freq_factor < config.high_freq_factor, ErrorKind::kOption,
            "rope: high_freq_factor must be above low_freq_factor, got ", config.high_freq_factor, " and ",
            config.low_freq_factor);
    return;
  }
  require(config.theta > 1, ErrorKind::kOption, "rope: yarn needs a theta above 1, got ", config.theta);
  require_positive(config.attention_factor, "attention_factor");
  require_positive(config.beta_fast, "beta_fast");
  require_positive(config.beta_slow, "beta_slow");
}

/// Short wavelengths stay, long ones are divided by `factor`, those between are blended.
double llama3_frequency(const RopeConfig& config, double frequency) {
  const double context = static_cast<double>(config.original_context);
  const double wavelength = 2.0 * std::numbers::pi / frequency;
  if (wavelength < context / config.high_freq_factor) return frequency;
  if (wavelength > context / config.low_freq_factor) return frequency / config.factor;
  const double smooth =
      (context / wavelength - config.low_freq_factor) / (config.high_freq_factor - config.low_freq_factor);
  return (1.0 - smooth) * frequency / config.factor + smooth * frequency;
}

/// The pairs between which YaRN goes from extrapolation to interpolation.
struct YarnRamp {
  double low;
  double high;
};

YarnRamp yarn_ramp(const RopeConfig& config) {
  const double dim = static_cast<double>(config.head_dim);
  // The (fractional) pair that makes this many turns over the original context.
  const auto pair_of = [&](double rotations) {
    return dim * std::log(static_cast<double>(config.original_context) / (rotations * 2.0 * std::numbers::pi)) /
           (2.0 * std::log(config.theta));
  };
  double low = pair_of(config.beta_fast);
  double high = pair_of(config.beta_slow);
  if (config.truncate) {
    low = std::floor(low);
    high = std::ceil(high);
  }
  // The bound is D - 1, though there are only D/2 pairs: that is what models were trained with.
  low = std::max(low, 0.0);
  high = std::min(high, dim - 1.0);
  if (low == high) high += 0.001;
  return {low, high};
}

double yarn_frequency(const RopeConfig& config, const YarnRamp& ramp, int64_t pair, double frequency) {
  const double position = (static_cast<double>(pair) - ramp.low) / (ramp.high - ramp.low);
  const double interpolated = std::clamp(position, 0.0, 1.0);
  return frequency / config.factor * interpolated + frequency * (1.0 - interpolated);
}

}  // namespace

std::vector<double> rope_inverse_frequencies(const RopeConfig& config) {
  check(config);
  const int64_t pairs = config.head_dim / 2;
  const YarnRamp ramp = config.kind == RopeKind::kYarn ? yarn_ramp(config) : YarnRamp{};
  std::vector<double> frequencies;
  frequencies.reserve(static_cast<size_t>(pairs));
  for (int64_t i = 0; i < pairs; ++i) {
    const double exponent = static_cast<double>(2 * i) / static_cast<double>(config.head_dim);
    double frequency = 1.0 / std::pow(config.theta, exponent);
    switch (config.kind) {
      case RopeKind::kDefault:
        break;
      case RopeKind::kLinear:
        frequency /= config.factor;
        break;
      case RopeKind::kLlama3:
        frequency = llama3_frequency(config, frequency);
        break;
      case RopeKind::kYarn:
        frequency = yarn_frequency(config, ramp, i, frequency);
        break;
    }
    require(std::isfinite(frequency), ErrorKind::kOption, "rope: the frequency of pair ", i,
            " is not finite; theta is ", config.theta, ", factor ", config.factor);
    frequencies.push_back(frequency);
  }
  return frequencies;
}

void rope_angles(const RopeConfig& config, const std::vector<double>& inverse_frequencies, const int64_t* positions,
                 int64_t count, float* cos, float* sin) {
  const int64_t pairs = static_cast<int64_t>(inverse_frequencies.size());
  require(pairs * 2 == config.head_dim, ErrorKind::kInternal, "rope: ", pairs, " frequencies for a head dimension of ",
          config.head_dim);
  const double scale = config.kind == RopeKind::kYarn ? config.attention_factor : 1.0;
  for (int64_t t = 0; t < count; ++t) {
    const double position = static_cast<double>(positions[t]);
    for (int64_t i = 0; i < pairs; ++i) {
      const double angle = position * inverse_frequencies[static_cast<size_t>(i)];
      cos[t * pairs + i] = static_cast<float>(std::cos(angle) * scale);
      sin[t * pairs + i] = static_cast<float>(std::sin(angle) * scale);
    }
  }
}

}  // namespace llama_ext
