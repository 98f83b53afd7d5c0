// Rows of GGUF tensors: ggml's block types, re-ordered into ours without loss.
#pragma once

#include <cstdint>
#include <string_view>

#include "quant/quantized_row.h"

namespace llama_ext {

/// A block type of ggml and the type that holds it exactly. Source of the layouts: the GGUF specification and ggml's
/// definitions of its blocks.
struct GgmlType {
  std::string_view name;  // "Q4_K"
  WeightType type;
  int64_t block;        // weights of a block
  int64_t block_bytes;  // bytes of a block
};

/// Throws DTypeError, listing what there is, for a name that is not one of the quantised types.
const GgmlType& ggml_type(std::string_view name);

/// Bytes of a row. Throws ShapeError when `cols` is not a number of whole blocks.
int64_t ggml_row_bytes(const GgmlType& type, int64_t cols);

/// blocks: cols / block blocks. Throws CheckpointError for a scale that is not finite.
void decode_ggml_row(const GgmlType& type, const uint8_t* blocks, int64_t cols, QuantizedRow& row);

}  // namespace llama_ext
