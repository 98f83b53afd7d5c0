// One row of a quantised matrix, laid out plainly: what encoders make, decoders read, and each backend packs in its own way.
#pragma once

#include <cstdint>
#include <vector>

#include "core/tensor_view.h"
#include "quant/rounding.h"
#include "quant/weight_type.h"

namespace llama_ext {

/// Everything covers K rounded up to `type.unit()`; codes beyond K are `zero`. Float16 numbers are their bits, and finite.
struct QuantizedRow {
  std::vector<uint8_t> codes;       // (K)
  std::vector<uint16_t> scales;     // per group, or per superblock
  std::vector<uint16_t> mins;       // the same, with has_min (of superblocks: d_min)
  std::vector<uint8_t> sub_scales;  // per group of a superblock; q6_k: the bits of int8
  std::vector<uint8_t> sub_mins;    // the same, with has_min

  /// Sizes for K = cols, all zero.
  void resize(const WeightType& type, int64_t cols);
};

/// Rounds a row to the nearest codes. type: an encoding without superblocks. w: (cols) f32, finite.
/// importance: (cols) weights of the squared errors, or nullptr for equal ones.
/// Without minima a group's scale is the one of several candidates around |w|max / (the largest code) that leaves the least
/// squared error; with them, min and scale are fitted to the codes by least squares, starting from the group's range.
/// Throws NumericError for a weight that is not finite or too large for float16 scales, naming its index.
void quantize_row(const WeightType& type, const float* w, int64_t cols, const float* importance, QuantizedRow& row,
                  const RoundingLoops& loops = kPlainRounding);

/// Rows of codes that somebody else has chosen, each array contiguous: codes (n, K), less the lowest code, scales (n, groups)
/// float16, and, with has_min, mins (n, groups).
struct CodeRows {
  int64_t rows = 0;
  const uint8_t* codes = nullptr;
  const uint16_t* scales = nullptr;
  const uint16_t* mins = nullptr;
};

/// Row `index` of them. type: an encoding without superblocks. Throws DTypeError for another one, NumericError for a code that the type
/// does not have, or a scale or minimum that is not finite.
void take_codes(const WeightType& type, const CodeRows& rows, int64_t index, int64_t cols, QuantizedRow& row);

/// Throws unless `importance` is empty or (cols) f32, contiguous, finite and not negative: ShapeError, DTypeError, NumericError.
void check_importance(const TensorView& importance, int64_t cols);

/// What a group's codes are multiplied by and what is added, exactly: w = scale (code - zero) + min. scales and, with minima, mins:
/// (groups) of a row of `cols`.
void group_factors(const WeightType& type, const QuantizedRow& row, int64_t cols, float* scales, float* mins);

/// The exact weights. out: (cols).
void dequantize_row(const WeightType& type, const QuantizedRow& row, int64_t cols, double* out);
/// Rounded to float32.
void dequantize_row(const WeightType& type, const QuantizedRow& row, int64_t cols, float* out);

}  // namespace llama_ext
