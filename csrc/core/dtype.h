// Element types of tensors.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

#include "core/errors.h"

namespace llama_ext {

enum class DType : uint8_t { kF32, kBF16, kF16, kI32, kF64, kI8 };

constexpr size_t size_of(DType dtype) {
  switch (dtype) {
    case DType::kF64:
      return 8;
    case DType::kF32:
    case DType::kI32:
      return 4;
    case DType::kBF16:
    case DType::kF16:
      return 2;
    case DType::kI8:
      return 1;
  }
  return 0;
}

constexpr std::string_view name_of(DType dtype) {
  switch (dtype) {
    case DType::kF64:
      return "float64";
    case DType::kF32:
      return "float32";
    case DType::kBF16:
      return "bfloat16";
    case DType::kF16:
      return "float16";
    case DType::kI32:
      return "int32";
    case DType::kI8:
      return "int8";
  }
  return "unknown";
}

/// The DType that `name` spells ("float32", ...). Throws DTypeError, naming `what`, for any other word.
inline DType dtype_from_name(std::string_view name, std::string_view what) {
  for (DType dtype : {DType::kF32, DType::kBF16, DType::kF16, DType::kI32, DType::kF64, DType::kI8}) {
    if (name_of(dtype) == name) return dtype;
  }
  fail(ErrorKind::kDType, what, ": unknown dtype '", name,
       "'; known: float32, bfloat16, float16, float64, int32, int8");
}

}  // namespace llama_ext
