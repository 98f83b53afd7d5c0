// Rounding rows to codes: the search for scales and minima. Its loops over weights come from rounding.h.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "core/checked.h"
#include "core/half.h"
#include "quant/quantized_row.h"

namespace llama_ext {
namespace {

constexpr float kLargestF16 = 65504.0f;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
// Scales tried around the one that spans a group: the extremes of a group may be worth cutting.
constexpr int kCandidates = 7;
constexpr float kCandidateStep = 0.035f;

// ---------------------------------------------------------------------------------------------------------------------
// Plain loops.

/// To nearest, ties to even, for |x| < 2^22, however the processor rounds elsewhere.
inline float round_even(float x) { return (x + 12582912.0f) - 12582912.0f; }

inline float inverse_of(float scale) { return scale == 0.0f ? 0.0f : 1.0f / scale; }

inline float code_of(float w, const RoundingFit& fit, float inverse) {
  return round_even(std::clamp((w - fit.min) * inverse, fit.low, fit.high));
}

bool plain_range(const float* w, int size, float limit, float* lowest, float* highest) {
  *lowest = *highest = w[0];
  bool within = true;
  for (int i = 0; i < size; ++i) {
    *lowest = std::min(*lowest, w[i]);
    *highest = std::max(*highest, w[i]);
    within = within && std::fabs(w[i]) < limit;
  }
  return within;
}

float plain_error(const RoundingGroup& g, const RoundingFit& fit) {
  const float inverse = inverse_of(fit.scale);
  float lanes[8] = {};
  for (int i = 0; i < g.size; ++i) {
    const float difference = g.w[i] - (fit.scale * code_of(g.w[i], fit, inverse) + fit.min);
    lanes[i & 7] += (g.importance == nullptr ? 1.0f : g.importance[i]) * difference * difference;
  }
  return ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
}

void plain_codes(const RoundingGroup& g, const RoundingFit& fit, uint8_t* codes) {
  const float inverse = inverse_of(fit.scale);
  for (int i = 0; i < g.size; ++i) codes[i] = static_cast<uint8_t>(code_of(g.w[i], fit, inverse) - fit.low);
}

// ---------------------------------------------------------------------------------------------------------------------
// The search.

/// A scale as it is kept: float16, never a zero that was not one.
float rounded_scale(float scale) {
  if (scale == 0.0f) return 0.0f;
  const float kept = f16_to_f32(f32_to_f16(scale));
  return kept != 0.0f ? kept : std::copysign(0x1p-24f, scale);
}

/// A group of a row, and the range of its weights.
struct Weights {
  RoundingGroup group;
  float lowest;
  float highest;
};

/// The weight that lies farthest from zero, the first of those.
float extreme_of(const Weights& weights) {
  const float low = std::fabs(weights.lowest);
  const float high = std::fabs(weights.highest);
  if (low != high) return low > high ? weights.lowest : weights.highest;
  const float* const end = weights.group.w + weights.group.size;
  return *std::find_if(weights.group.w, end, [&](float w) { return std::fabs(w) == high; });
}

/// The best of several scales for w = scale q, q in [low, high].
RoundingFit fit_symmetric(const Weights& weights, float low, float high, const RoundingLoops& loops) {
  const float extreme = extreme_of(weights);
  if (extreme == 0.0f) return {0.0f, 0.0f, low, high};
  const auto fit_of = [&](float scale) { return RoundingFit{rounded_scale(scale), 0.0f, low, high}; };
  // The side with one code more takes the extreme weight. 255 codes need no search.
  if (high > 100.0f) return fit_of(std::fabs(extreme) / high);
  const float spanning = extreme / low;
  RoundingFit best = fit_of(spanning);  // also where importance makes every error infinite
  float least = kInfinity;
  for (int candidate = -(kCandidates / 2); candidate <= kCandidates / 2; ++candidate) {
    const RoundingFit fit = fit_of(spanning * (1.0f + kCandidateStep * static_cast<float>(candidate)));
    const float error = loops.error(weights.group, fit);
    if (error < least) {
      least = error;
      best = fit;
    }
  }
  return best;
}

/// The best of several fits for w = scale q + min, q in [0, high].
RoundingFit fit_with_min(const Weights& weights, float high, const RoundingLoops& loops) {
  const RoundingGroup& g = weights.group;
  const float span = weights.highest - weights.lowest;
  const float middle = weights.lowest + 0.5f * span;
  const auto fit_of = [&](float scale, float min) {
    return RoundingFit{rounded_scale(scale), f16_to_f32(f32_to_f16(min)), 0.0f, high};
  };
  RoundingFit best = fit_of(span / high, middle - 0.5f * span);
  if (high > 100.0f || span == 0.0f) return best;
  float least = kInfinity;
  const auto offer = [&](const RoundingFit& fit) {
    const float error = loops.error(g, fit);
    if (error < least) {
      least = error;
      best = fit;
    }
  };
  for (int candidate = 0; candidate <= kCandidates / 2; ++candidate) {
    const float part = span * (1.0f - kCandidateStep * static_cast<float>(candidate));
    offer(fit_of(part / high, middle - 0.5f * part));
  }
  // Once more with the line that fits the best codes in the least squares.
  uint8_t codes[kMaxRoundingGroup];
  loops.codes(g, best, codes);
  double n = 0, q = 0, qq = 0, w = 0, wq = 0;
  for (int i = 0; i < g.size; ++i) {
    const double weight = g.importance == nullptr ? 1.0 : static_cast<double>(g.importance[i]);
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
    if (scale > 0) offer(fit_of(static_cast<float>(scale), static_cast<float>((w - scale * q) / n)));
  }
  return best;
}

}  // namespace

const RoundingLoops kPlainRounding = {plain_range, plain_error, plain_codes};

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

void quantize_row(const WeightType& type, const float* w, int64_t cols, const float* importance, QuantizedRow& row,
                  const RoundingLoops& loops) {
  const EncodingInfo& info = info_of(type.encoding);
  require(type.is_quantized() && info.superblock == 0, ErrorKind::kDType, "weights cannot be rounded to ", type.text());
  row.resize(type, cols);
  const int levels = 1 << info.bits;
  const float high = static_cast<float>(info.has_min ? levels - 1 : levels - 1 - info.zero);
  const float low = info.has_min ? 0.0f : -static_cast<float>(info.zero);
  // The largest weight whose scale float16 can hold.
  const float limit = kLargestF16 * (info.has_min ? 0.5f : high);
  for (int64_t begin = 0; begin < cols; begin += type.group) {
    const int size = static_cast<int>(std::min<int64_t>(type.group, cols - begin));
    Weights weights{{w + begin, importance == nullptr ? nullptr : importance + begin, size}, 0.0f, 0.0f};
    if (!loops.range(weights.group.w, size, limit, &weights.lowest, &weights.highest)) {
      const float* const bad =
          std::find_if_not(w + begin, w + begin + size, [&](float x) { return std::fabs(x) < limit; });
      fail(ErrorKind::kNumeric, "quantize: weight ", bad - w, " of a row is ", *bad,
           ", which no float16 scale can express");
    }
    const RoundingFit fit =
        info.has_min ? fit_with_min(weights, high, loops) : fit_symmetric(weights, low, high, loops);
    loops.codes(weights.group, fit, row.codes.data() + begin);
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

void take_codes(const WeightType& type, const CodeRows& rows, int64_t index, int64_t cols, QuantizedRow& row) {
  const EncodingInfo& info = info_of(type.encoding);
  require(type.is_quantized() && info.superblock == 0, ErrorKind::kDType, "codes cannot be kept as ", type.text());
  require(!info.has_min || rows.mins != nullptr || cols == 0, ErrorKind::kInternal, "codes: minima are missing");
  row.resize(type, cols);
  const uint8_t* const codes = rows.codes + index * cols;
  for (int64_t k = 0; k < cols; ++k) {
    require(codes[k] >> info.bits == 0, ErrorKind::kNumeric, "codes: ", info.name, " has ", 1 << info.bits,
            " codes, and weight ", k, " of row ", index, " is code ", int{codes[k]});
    row.codes[static_cast<size_t>(k)] = codes[k];
  }
  const int64_t groups = ceil_div(cols, type.group);
  const auto take = [&](const uint16_t* from, std::vector<uint16_t>& to, const char* what) {
    for (int64_t group = 0; group < groups; ++group) {
      const uint16_t bits = from[index * groups + group];
      require((bits & 0x7c00u) != 0x7c00u, ErrorKind::kNumeric, "codes: the ", what, " of group ", group, " of row ",
              index, " is not a finite number");
      to[static_cast<size_t>(group)] = bits;
    }
  };
  take(rows.scales, row.scales, "scale");
  if (info.has_min) take(rows.mins, row.mins, "minimum");
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

void dequantize_row(const WeightType& type, const QuantizedRow& row, int64_t cols, float* out) {
  std::vector<double> exact(static_cast<size_t>(cols));
  dequantize_row(type, row, cols, exact.data());
  for (size_t k = 0; k < exact.size(); ++k) out[k] = static_cast<float>(exact[k]);
}

}  // namespace llama_ext
