// quantize: codes and scales as plain arrays, in no backend's layout.
#include <algorithm>
#include <string_view>
#include <vector>

#include "bindings/bindings.h"
#include "core/checked.h"
#include "quant/quantized_row.h"

namespace llama_ext {
namespace {

/// A fresh array of uint8, not filled. Throws OutOfMemoryError.
py::array new_bytes(const std::vector<int64_t>& shape, std::string_view what) {
  return new_array(DType::kI8, shape, what).attr("view")("uint8");
}

/// (codes, scales, mins): int8 or, with minima, uint8 (N, K); float16 (N, groups); the same, or None.
py::tuple quantize(const py::object& source, const std::string& dtype, int64_t group, const py::object& importance) {
  const TensorView view = read_view(source, DType::kF32, 2, "quantize", "source");
  const WeightType type = weight_type(dtype, group, "quantize");
  const EncodingInfo& info = info_of(type.encoding);
  require(type.is_quantized() && info.superblock == 0, ErrorKind::kDType, "quantize: weights cannot be rounded to ",
          type.text());
  const TensorView weights = optional_view(importance, 1, "quantize", "importance");
  check_importance(weights, view.dim(1));
  const int64_t rows = view.dim(0);
  const int64_t cols = view.dim(1);
  const int64_t groups = ceil_div(cols, type.group);
  py::array codes =
      info.has_min ? new_bytes({rows, cols}, "quantize") : new_array(DType::kI8, {rows, cols}, "quantize");
  py::array scales = new_array(DType::kF16, {rows, groups}, "quantize");
  py::array mins = new_array(DType::kF16, {info.has_min ? rows : 0, groups}, "quantize");
  auto* code = static_cast<uint8_t*>(codes.mutable_data());
  auto* scale = static_cast<uint16_t*>(scales.mutable_data());
  auto* min = static_cast<uint16_t*>(mins.mutable_data());
  without_gil([&] {
    QuantizedRow row;
    for (int64_t i = 0; i < rows; ++i) {
      quantize_row(type, view.row<float>(i), cols, weights ? weights.f32() : nullptr, row);
      for (int64_t k = 0; k < cols; ++k) {
        *code++ = static_cast<uint8_t>(row.codes[static_cast<size_t>(k)] - info.zero);  // the bits of int8
      }
      scale = std::copy_n(row.scales.data(), groups, scale);
      if (info.has_min) min = std::copy_n(row.mins.data(), groups, min);
    }
  });
  return py::make_tuple(codes, scales, info.has_min ? py::object(mins) : py::none());
}

/// Codes of ggml blocks, (rows, bytes of a row), as `read_codes` gives them.
py::tuple decode_blocks(const py::object& blocks, const std::string& ggml_name, int64_t cols) {
  const GgmlType& ggml = ggml_type(ggml_name);
  const std::span<const std::byte> bytes = byte_view(blocks, "decode_blocks", "blocks");
  const int64_t row_bytes = ggml_row_bytes(ggml, cols);
  const int64_t size = static_cast<int64_t>(bytes.size());
  require(row_bytes > 0 && size % row_bytes == 0, ErrorKind::kShape, "decode_blocks: rows of ", cols, " ", ggml.name,
          " weights take ", row_bytes, " bytes, got ", size, " in all");
  CodeArrays arrays(ggml.type, size / row_bytes, cols);
  without_gil([&] {
    QuantizedRow row;
    for (int64_t i = 0; i < size / row_bytes; ++i) {
      decode_ggml_row(ggml, reinterpret_cast<const uint8_t*>(bytes.data()) + i * row_bytes, cols, row);
      arrays.store(i, row);
    }
  });
  return arrays.tuple();
}

}  // namespace

CodeArrays::CodeArrays(const WeightType& type, int64_t rows, int64_t cols)
    : type_(type),
      cols_(cols),
      groups_(ceil_div(cols, type.group)),
      codes_(new_bytes({rows, cols}, "codes")),
      scales_(new_array(DType::kF32, {rows, groups_}, "codes")),
      mins_(new_array(DType::kF32, {info_of(type.encoding).has_min ? rows : 0, groups_}, "codes")),
      code_data_(static_cast<uint8_t*>(codes_.mutable_data())),
      scale_data_(float_data(scales_)),
      min_data_(float_data(mins_)) {}

void CodeArrays::store(int64_t index, const QuantizedRow& row) {
  std::copy_n(row.codes.data(), cols_, code_data_ + index * cols_);
  float* mins = info_of(type_.encoding).has_min ? min_data_ + index * groups_ : nullptr;
  group_factors(type_, row, cols_, scale_data_ + index * groups_, mins);
}

py::tuple CodeArrays::tuple() const {
  return py::make_tuple(codes_, scales_, info_of(type_.encoding).has_min ? py::object(mins_) : py::none());
}

void bind_quantize(py::module_& module) {
  module.def("quantize", &quantize, py::arg("source"), py::arg("dtype"), py::arg("group"),
             py::arg("importance") = py::none());
  module.def("decode_blocks", &decode_blocks, py::arg("blocks"), py::arg("ggml_type"), py::arg("cols"));
}

}  // namespace llama_ext
