// How the weights of a matrix are kept: as floating-point numbers, or as small whole numbers with scales along k.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>

#include "core/dtype.h"

namespace llama_ext {

/// Quantised encodings keep an unsigned code q for each weight w. What a code means, by group of k of one row of the matrix:
///   int8, int5, int4                 w = scale (q - zero), zero = 128, 16, 8
///   int8_min, int5_min, int4_min     w = scale q + min
///   q4_k, q5_k                       w = d s q - d_min m: groups of 32 with whole s and m in [0, 63], d and d_min for 256 k
///   q6_k                             w = d s (q - 32): groups of 16 with a whole s in [-128, 127], d for 256 k
/// scale, min, d and d_min are float16. GGUF's Q8_0, Q5_0, Q4_0 are int8, int5 and int4 with groups of 32, its Q5_1 and Q4_1
/// the same with minima.
enum class Encoding : uint8_t {
  kF32,
  kF16,
  kBF16,
  kInt8,
  kInt8Min,
  kInt5,
  kInt5Min,
  kInt4,
  kInt4Min,
  kQ4K,
  kQ5K,
  kQ6K,
};

struct EncodingInfo {
  Encoding encoding;
  std::string_view name;
  int bits;  // of a code, or of a floating-point number
  int zero;  // what is subtracted from a code
  bool has_min;
  int group;       // k that share a scale, where the encoding fixes it
  int superblock;  // k that share a float16 scale of whole scales, or 0
};

inline constexpr std::array<EncodingInfo, 12> kEncodings = {{
    {Encoding::kF32, "float32", 32, 0, false, 0, 0},
    {Encoding::kF16, "float16", 16, 0, false, 0, 0},
    {Encoding::kBF16, "bfloat16", 16, 0, false, 0, 0},
    {Encoding::kInt8, "int8", 8, 128, false, 0, 0},
    {Encoding::kInt8Min, "int8_min", 8, 0, true, 0, 0},
    {Encoding::kInt5, "int5", 5, 16, false, 0, 0},
    {Encoding::kInt5Min, "int5_min", 5, 0, true, 0, 0},
    {Encoding::kInt4, "int4", 4, 8, false, 0, 0},
    {Encoding::kInt4Min, "int4_min", 4, 0, true, 0, 0},
    {Encoding::kQ4K, "q4_k", 4, 0, true, 32, 256},
    {Encoding::kQ5K, "q5_k", 5, 0, true, 32, 256},
    {Encoding::kQ6K, "q6_k", 6, 32, false, 16, 256},
}};

constexpr const EncodingInfo& info_of(Encoding encoding) { return kEncodings[static_cast<size_t>(encoding)]; }

/// An encoding, and how many k share a scale: 0 for floating point, 32, 64 or 128, or what the encoding fixes.
struct WeightType {
  Encoding encoding = Encoding::kF32;
  int32_t group = 0;

  bool operator==(const WeightType&) const = default;
  bool is_quantized() const { return encoding >= Encoding::kInt8; }
  /// The element type of floating-point weights. Throws DTypeError for others.
  DType dtype() const;
  /// k that lie together in memory and cannot be parted: 1, or a group, or a superblock.
  int64_t unit() const;
  /// "bfloat16", "int4 (groups of 128)".
  std::string text() const;
};

/// The type that a dtype is. Throws DTypeError for one that no weights are kept in, naming `what`.
WeightType weight_type(DType dtype, std::string_view what);
/// `group` 0 for floating point and where the encoding fixes it. Throws DTypeError for an unknown name, OptionError for
/// another group than 32, 64 or 128, naming `what`.
WeightType weight_type(std::string_view name, int64_t group, std::string_view what);

}  // namespace llama_ext
