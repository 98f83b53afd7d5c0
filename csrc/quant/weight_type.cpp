#include "quant/weight_type.h"

#include <algorithm>

namespace llama_ext {

DType WeightType::dtype() const {
  switch (encoding) {
    case Encoding::kF32:
      return DType::kF32;
    case Encoding::kF16:
      return DType::kF16;
    case Encoding::kBF16:
      return DType::kBF16;
    default:
      fail(ErrorKind::kDType, "weights kept as ", text(), " have no element type");
  }
}

int64_t WeightType::unit() const {
  const EncodingInfo& info = info_of(encoding);
  return !is_quantized() ? 1 : info.superblock != 0 ? info.superblock : group;
}

std::string WeightType::text() const {
  const EncodingInfo& info = info_of(encoding);
  if (!is_quantized()) return std::string(info.name);
  return std::string(info.name) + " (groups of " + std::to_string(group) + ")";
}

WeightType weight_type(DType dtype, std::string_view what) {
  switch (dtype) {
    case DType::kF32:
      return {Encoding::kF32, 0};
    case DType::kF16:
      return {Encoding::kF16, 0};
    case DType::kBF16:
      return {Encoding::kBF16, 0};
    default:
      fail(ErrorKind::kDType, what, ": weights are not kept as ", name_of(dtype));
  }
}

WeightType weight_type(std::string_view name, int64_t group, std::string_view what) {
  const auto found =
      std::find_if(kEncodings.begin(), kEncodings.end(), [&](const EncodingInfo& info) { return info.name == name; });
  if (found == kEncodings.end()) {
    std::string known;
    for (const EncodingInfo& info : kEncodings) known += (known.empty() ? "" : ", ") + std::string(info.name);
    fail(ErrorKind::kDType, what, ": weights are not kept as '", name, "'; known: ", known);
  }
  const WeightType type{found->encoding, found->group};
  if (!type.is_quantized() || found->group != 0) {
    require(group == 0 || group == found->group, ErrorKind::kOption, what, ": ", name, " has no groups of ", group);
    return type;
  }
  require(group == 32 || group == 64 || group == 128, ErrorKind::kOption, what,
          ": weights are quantised in groups of 32, 64 or 128, got ", group);
  return {found->encoding, static_cast<int32_t>(group)};
}

}  // namespace llama_ext
