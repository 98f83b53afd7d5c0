// Rounding rows to codes. Plain loops over groups of at most 128 weights, which the compiler turns into vectors.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "core/checked.h"
#include "core/half.h"
#include "quant/quantized_row.h"

namespace llama_ext {
namespace {

constexpr int kMaxGroup = 128;
constexpr float kLargestF16 = 65504.0f;
// Scales tried around the one that spans a group: the extremes of a group may be worth cutting.
constexpr int kCandidates = 7;
constexpr float kCandidateStep = 0.035f;

/// To nearest, ties to even, for |x| < 2^22: a form that compilers vectorise on any instruction set.
inline float round_even(float x) { return (x + 12582912.0f) - 12582912.0f; }

/// A scale as it is kept: float16, never a zero that was not one.
float rounded_scale(float scale) {
  if (scale == 0.0f) return 0.0f;
  const float kept = f16_to_f32(f32_to_f16(scale));
  return kept != 0.0f ? kept : std::copysign(0x1p-24f, scale);
}

/// One group: `size` weights, of which the importances may all be 1.
struct Group {
  const float* w;
  const float* importance;
  int size;
};

/// What codes of a scale (and a min) leave of a group.
struct Fit {
  float scale = 0.0f;
  float min = 0.0f;
  float error = std::numeric_limits<float>::infinity();
};

/// codes[i] = w / scale, rounded and clamped to [low, high].
void round_codes(const Group& g, float scale, float min, float low, float high, float* codes) {
  const float inverse = scale == 0.0f ? 0.0f : 1.0f / scale;
  for (int i = 0; i < g.size; ++i) {
    const float scaled = std::clamp((g.w[i] - min) * inverse, low - 1.0f, high + 1.0f);
    codes[i] = std::clamp(round_even(scaled), low, high);
  }
}

float error_of(const Group& g, float scale, float min, const float* codes) {
  float lanes[8] = {};
  for (int i = 0; i < g.size; ++i) {
    const float difference = g.w[i] - (scale * codes[i] + min);
    lanes[i & 7] += g.importance[i] * difference * difference;
  }
  return ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
}

/// The best of several scales for w = scale q, q in [low, high].
Fit fit_symmetric(const Group& g, float low, float high) {
  float extreme = 0.0f;
  for (int i = 0; i < g.size; ++i) {
    if (std::fabs(g.w[i]) > std::fabs(extreme)) extreme = g.w[i];
  }
  Fit best;
  if (extreme == 0.0f) return {0.0f, 0.0f, 0.0f};
  // The side with one code more takes the extreme weight. 255 codes need no search.
  const float spanning = high > 100.0f ? std::fabs(extreme) / high : extreme / low;
  const int half = high > 100.0f ? 0 : kCandidates / 2;
  float codes[kMaxGroup];
  for (int candidate = -half; candidate <= half; ++candidate) {
    const float scale = rounded_scale(spanning * (1.0f + kCandidateStep * static_cast<float>(candidate)));
    round_codes(g, scale, 0.0f, low, high, codes);
    const float error = error_of(g, scale, 0.0f, codes);
    if (error < best.error) best = {scale, 0.0f, error};
  }
  return best;
}

/// The best of several fits for w = scale q + min, q in [0, high].
Fit fit_with_min(const Group& g, float high) {
  float lowest = g.w[0];
  float highest = g.w[0];
  for (int i = 1; i < g.size; ++i) {
    lowest = std::min(lowest, g.w[i]);
    highest = std::max(highest, g.w[i]);
  }
  Fit best;
  const float span = highest - lowest;
  const float middle = lowest + 0.5f * span;
  float codes[kMaxGroup];
  const auto offer = [&](float scale, float min) {
    scale = rounded_scale(scale);
    min = f16_to_f32(f32_to_f16(min));
    round_codes(g, scale, min, 0.0f, high, codes);
    const float error = error_of(g, scale, min, codes);
    if (error < best.error) best = {scale, min, error};
  };
  const int half = high > 100.0f ? 0 : kCandidates / 2;
  for (int candidate = 0; candidate <= half; ++candidate) {
    const float part = span * (1.0f - kCandidateStep * static_cast<float>(candidate));
    offer(part / high, middle - 0.5f * part);
  }
  if (half == 0 || span == 0.0f) return best;
  // Once more with the line that fits the best codes in the least squares.
  round_codes(g, best.scale, best.min, 0.0f, high, codes);
  double n = 0, q = 0, qq = 0, w = 0, wq = 0;
  for (int i = 0; i < g.size; ++i) {
    const double weight = static_cast<double>(g.importance[i]);
    const double code = static_cast<double>(codes[i]);
    const double value = static_cast<double>(g.w[i]);
    n += weight;
    q += weight * code;
    qq += weight * code * code;
    w += weight * value;
    wq += weight * value * code;
  }
  const double determinant = n * qq - q * q;
  if (determinant > 0) {
    const double scale = (n * wq - q * w) / determinant;
    if (scale > 0) offer(static_cast<float>(scale), static_cast<float>((w - scale * q) / n));
  }
  return best;
}

}  // namespace

void QuantizedRow::resize(const WeightType& type, int64_t cols) {
  const EncodingInfo& info = info_of(type.encoding);
  const int64_t padded = round_up(cols, type.unit());
  const auto count = [](int64_t n) { return static_cast<size_t>(n); };
  codes.assign(count(padded), static_cast<uint8_t>(info.zero));
  scales.assign(count(padded / type.unit()), 0);
  mins.assign(info.has_min ? scales.size() : 0, 0);
  sub_scales.assign(info.superblock != 0 ? count(padded / type.group) : 0, 0);
  sub_mins.assign(info.has_min ? sub_scales.size() : 0, 0);
}

void check_importance(const TensorView& importance, int64_t cols) {
  if (!importance) return;
  require(importance.dtype() == DType::kF32, ErrorKind::kDType, "quantize: importance must be float32, got ",
          name_of(importance.dtype()));
  require(importance.rank() == 1 && importance.dim(0) == cols && importance.is_contiguous(), ErrorKind::kShape,
          "quantize: importance must have shape ", shape_text({cols}), ", one number for each column, got ",
          importance.shape_text());
  for (int64_t k = 0; k < cols; ++k) {
    const float value = importance.f32()[k];
    require(std::isfinite(value) && value >= 0, ErrorKind::kNumeric, "quantize: importance ", k, " is ", value,
            "; it must be finite and not negative");
  }
}

void quantize_row(const WeightType& type, const float* w, int64_t cols, const float* importance, QuantizedRow& row) {
  const EncodingInfo& info = info_of(type.encoding);
  require(type.is_quantized() && info.superblock == 0, ErrorKind::kDType, "weights cannot be rounded to ", type.text());
  row.resize(type, cols);
  float equal[kMaxGroup];
  std::fill(equal, equal + kMaxGroup, 1.0f);
  const int levels = 1 << info.bits;
  const float high = static_cast<float>(info.has_min ? levels - 1 : levels - 1 - info.zero);
  const float low = info.has_min ? 0.0f : -static_cast<float>(info.zero);
  // The largest weight whose scale float16 can hold.
  const float limit = kLargestF16 * (info.has_min ? 0.5f : high);
  for (int64_t begin = 0; begin < cols; begin += type.group) {
    const int size = static_cast<int>(std::min<int64_t>(type.group, cols - begin));
    for (int i = 0; i < size; ++i) {
      require(std::fabs(w[begin + i]) < limit, ErrorKind::kNumeric, "quantize: weight ", begin + i, " of a row is ",
              w[begin + i], ", which no float16 scale can express");
    }
    const Group group{w + begin, importance == nullptr ? equal : importance + begin, size};
    const Fit fit = info.has_min ? fit_with_min(group, high) : fit_symmetric(group, low, high);
    float codes[kMaxGroup];
    round_codes(group, fit.scale, fit.min, low, high, codes);
    const float offset = info.has_min ? 0.0f : static_cast<float>(info.zero);
    for (int i = 0; i < size; ++i) row.codes[static_cast<size_t>(begin + i)] = static_cast<uint8_t>(codes[i] + offset);
    row.scales[static_cast<size_t>(begin / type.group)] = f32_to_f16(fit.scale);
    if (info.has_min) row.mins[static_cast<size_t>(begin / type.group)] = f32_to_f16(fit.min);
  }
}

void group_factors(const WeightType& type, const QuantizedRow& row, int64_t cols, float* scales, float* mins) {
  const EncodingInfo& info = info_of(type.encoding);
  for (int64_t i = 0; i < ceil_div(cols, type.group); ++i) {
    const size_t group = static_cast<size_t>(i);
    const size_t unit = static_cast<size_t>(i * type.group / type.unit());
    // Products of a float16 with a whole number of 8 bits: exact in float32.
    scales[i] = f16_to_f32(row.scales[unit]);
    if (info.has_min) mins[i] = f16_to_f32(row.mins[unit]);
    if (info.superblock == 0) continue;
    scales[i] *= info.has_min ? static_cast<float>(row.sub_scales[group])
                              : static_cast<float>(static_cast<int8_t>(row.sub_scales[group]));
    if (info.has_min) mins[i] *= -static_cast<float>(row.sub_mins[group]);
  }
}

void dequantize_row(const WeightType& type, const QuantizedRow& row, int64_t cols, double* out) {
  const EncodingInfo& info = info_of(type.encoding);
  for (int64_t k = 0; k < cols; ++k) {
    const size_t unit = static_cast<size_t>(k / type.unit());
    const size_t group = static_cast<size_t>(k / type.group);
    const int code = row.codes[static_cast<size_t>(k)] - info.zero;
    double scale = static_cast<double>(f16_to_f32(row.scales[unit]));
    double min = info.has_min ? static_cast<double>(f16_to_f32(row.mins[unit])) : 0.0;
    if (info.superblock != 0) {
      scale *= info.has_min ? row.sub_scales[group] : static_cast<int8_t>(row.sub_scales[group]);
      if (info.has_min) min *= -static_cast<double>(row.sub_mins[group]);
    }
    out[k] = scale * code + min;
  }
}

}  // namespace llama_ext
