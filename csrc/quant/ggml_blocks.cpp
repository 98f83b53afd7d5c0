#include "quant/ggml_blocks.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <string>

#include "core/checked.h"
#include "core/half.h"

namespace llama_ext {
namespace {

constexpr std::array<GgmlType, 8> kTypes = {{
    {"Q8_0", {Encoding::kInt8, 32}, 32, 34},
    {"Q4_0", {Encoding::kInt4, 32}, 32, 18},
    {"Q4_1", {Encoding::kInt4Min, 32}, 32, 20},
    {"Q5_0", {Encoding::kInt5, 32}, 32, 22},
    {"Q5_1", {Encoding::kInt5Min, 32}, 32, 24},
    {"Q4_K", {Encoding::kQ4K, 32}, 256, 144},
    {"Q5_K", {Encoding::kQ5K, 32}, 256, 176},
    {"Q6_K", {Encoding::kQ6K, 16}, 256, 210},
}};

uint16_t f16_at(const uint8_t* bytes, const GgmlType& type) {
  uint16_t bits = 0;
  std::memcpy(&bits, bytes, sizeof bits);
  require((bits & 0x7c00u) != 0x7c00u, ErrorKind::kCheckpoint, "GGUF: a scale of a ", type.name,
          " block is not a finite number. Is the file damaged?");
  return bits;
}

/// Blocks of 32: [scale][min][32 fifth bits][codes: the low nibbles are 0-15, the high ones 16-31], each where there is one.
void decode_simple(const GgmlType& type, const uint8_t* block, size_t index, QuantizedRow& row) {
  const EncodingInfo& info = info_of(type.type.encoding);
  uint8_t* codes = row.codes.data() + index * 32;
  row.scales[index] = f16_at(block, type);
  block += 2;
  if (info.has_min) {
    row.mins[index] = f16_at(block, type);
    block += 2;
  }
  if (info.bits == 8) {
    for (int i = 0; i < 32; ++i) codes[i] = static_cast<uint8_t>(block[i] ^ 0x80u);  // signed in the file
    return;
  }
  uint32_t fifth = 0;
  if (info.bits == 5) {
    std::memcpy(&fifth, block, sizeof fifth);
    block += sizeof fifth;
  }
  for (int i = 0; i < 16; ++i) {
    codes[i] = static_cast<uint8_t>((block[i] & 15u) | ((fifth >> i & 1u) << 4));
    codes[i + 16] = static_cast<uint8_t>((block[i] >> 4) | ((fifth >> (i + 16) & 1u) << 4));
  }
}

/// [d][d_min][8 scales and 8 minima of 6 bits][256 fifth bits][nibbles]: of each 64 weights the low nibbles are the first 32.
void decode_k45(const GgmlType& type, const uint8_t* block, size_t index, QuantizedRow& row) {
  row.scales[index] = f16_at(block, type);
  row.mins[index] = f16_at(block + 2, type);
  const uint8_t* packed = block + 4;
  uint8_t* scales = row.sub_scales.data() + index * 8;
  uint8_t* mins = row.sub_mins.data() + index * 8;
  for (int i = 0; i < 4; ++i) {
    scales[i] = packed[i] & 63;
    mins[i] = packed[i + 4] & 63;
    scales[i + 4] = static_cast<uint8_t>((packed[i + 8] & 15) | (packed[i] >> 6 << 4));
    mins[i + 4] = static_cast<uint8_t>((packed[i + 8] >> 4) | (packed[i + 4] >> 6 << 4));
  }
  const bool has_fifth = info_of(type.type.encoding).bits == 5;
  const uint8_t* fifth = block + 16;
  const uint8_t* nibbles = fifth + (has_fifth ? 32 : 0);
  uint8_t* codes = row.codes.data() + index * 256;
  for (int pair = 0; pair < 4; ++pair, nibbles += 32, codes += 64) {
    for (int i = 0; i < 32; ++i) {
      const int low = has_fifth ? (fifth[i] >> (2 * pair) & 1) << 4 : 0;
      const int high = has_fifth ? (fifth[i] >> (2 * pair + 1) & 1) << 4 : 0;
      codes[i] = static_cast<uint8_t>((nibbles[i] & 15) | low);
      codes[i + 32] = static_cast<uint8_t>((nibbles[i] >> 4) | high);
    }
  }
}

/// [128 bytes of low nibbles][64 bytes of high pairs][16 signed scales][d]: two halves of 128 weights, each four rows of 32.
void decode_k6(const GgmlType& type, const uint8_t* block, size_t index, QuantizedRow& row) {
  std::memcpy(row.sub_scales.data() + index * 16, block + 192, 16);
  row.scales[index] = f16_at(block + 208, type);
  uint8_t* codes = row.codes.data() + index * 256;
  for (int half = 0; half < 2; ++half, codes += 128) {
    const uint8_t* low = block + 64 * half;
    const uint8_t* high = block + 128 + 32 * half;
    for (int i = 0; i < 32; ++i) {
      codes[i] = static_cast<uint8_t>((low[i] & 15) | (high[i] & 3) << 4);
      codes[i + 32] = static_cast<uint8_t>((low[i + 32] & 15) | (high[i] >> 2 & 3) << 4);
      codes[i + 64] = static_cast<uint8_t>((low[i] >> 4) | (high[i] >> 4 & 3) << 4);
      codes[i + 96] = static_cast<uint8_t>((low[i + 32] >> 4) | (high[i] >> 6 & 3) << 4);
    }
  }
}

}  // namespace

const GgmlType& ggml_type(std::string_view name) {
  const auto found =
      std::find_if(kTypes.begin(), kTypes.end(), [&](const GgmlType& type) { return type.name == name; });
  if (found != kTypes.end()) return *found;
  std::string known;
  for (const GgmlType& type : kTypes) known += (known.empty() ? "" : ", ") + std::string(type.name);
  fail(ErrorKind::kDType, "GGUF: blocks of type '", name, "' are not supported; supported: ", known);
}

int64_t ggml_row_bytes(const GgmlType& type, int64_t cols) {
  require(cols % type.block == 0, ErrorKind::kShape, "GGUF: a row of ", cols, " weights is not a number of ", type.name,
          " blocks of ", type.block);
  return checked_mul(cols / type.block, type.block_bytes, "GGUF");
}

void decode_ggml_row(const GgmlType& type, const uint8_t* blocks, int64_t cols, QuantizedRow& row) {
  ggml_row_bytes(type, cols);
  row.resize(type.type, cols);
  for (int64_t index = 0; index < cols / type.block; ++index, blocks += type.block_bytes) {
    const size_t at = static_cast<size_t>(index);
    switch (type.type.encoding) {
      case Encoding::kQ4K:
      case Encoding::kQ5K:
        decode_k45(type, blocks, at, row);
        break;
      case Encoding::kQ6K:
        decode_k6(type, blocks, at, row);
        break;
      default:
        decode_simple(type, blocks, at, row);
    }
  }
}

}  // namespace llama_ext
