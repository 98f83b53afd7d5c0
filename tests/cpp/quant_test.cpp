// float16, GGUF's blocks and the panels of quantised weights: every code, scale and minimum comes back out.
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "check.h"
#include "core/half.h"
#include "cpu/cpu_backend.h"
#include "cpu/isa.h"
#include "cpu/panels.h"
#include "quant/ggml_blocks.h"

namespace llama_ext::test {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

/// A generator of numbers that need not be good.
class Numbers {
 public:
  uint32_t next() { return state_ = state_ * 1664525u + 1013904223u; }
  uint8_t byte() { return static_cast<uint8_t>(next() >> 24); }

 private:
  uint32_t state_ = 1;
};

void test_f16_round_trip_is_exact() {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const float value = f16_to_f32(static_cast<uint16_t>(bits));
    if (std::isnan(value)) {
      CHECK(std::isnan(f16_to_f32(f32_to_f16(value))));
      CHECK(std::isnan(f16_to_f32(f64_to_f16(static_cast<double>(value)))));
    } else {
      CHECK(f32_to_f16(value) == bits);
      CHECK(f64_to_f16(static_cast<double>(value)) == bits);
    }
  }
}

void test_f16_rounds_to_nearest_even() {
  // Between each two neighbours, denormals among them; 65,520 is halfway from the largest to where a next one would be.
  for (uint32_t bits = 0; bits < 0x7c00; ++bits) {
    const double low = static_cast<double>(f16_to_f32(static_cast<uint16_t>(bits)));
    const double high = bits == 0x7bff ? 65536.0 : static_cast<double>(f16_to_f32(static_cast<uint16_t>(bits + 1)));
    const double middle = (low + high) / 2;
    for (uint32_t sign : {0u, 0x8000u}) {
      const double s = sign != 0 ? -1.0 : 1.0;
      const float tie = static_cast<float>(s * middle);
      CHECK(f32_to_f16(std::nextafter(tie, 0.0f)) == (bits | sign));
      CHECK(f32_to_f16(tie) == ((bits + (bits & 1)) | sign));
      CHECK(f32_to_f16(std::nextafter(tie, static_cast<float>(s) * kInf)) == ((bits + 1) | sign));
      // Twice rounded, through float32, these would be ties.
      CHECK(f64_to_f16(s * std::nextafter(middle, 0.0)) == (bits | sign));
      CHECK(f64_to_f16(s * middle) == ((bits + (bits & 1)) | sign));
      CHECK(f64_to_f16(s * std::nextafter(middle, 1e30)) == ((bits + 1) | sign));
    }
  }
  for (float large : {65520.0f, 1e6f, 3e38f, kInf}) {
    CHECK(f32_to_f16(large) == 0x7c00 && f32_to_f16(-large) == 0xfc00);
    CHECK(f64_to_f16(static_cast<double>(large)) == 0x7c00);
  }
  CHECK(f64_to_f16(1e300) == 0x7c00 && f64_to_f16(-1e300) == 0xfc00);
  CHECK(f32_to_f16(1e-30f) == 0 && f32_to_f16(-1e-30f) == 0x8000 && f32_to_f16(0x1p-25f) == 0);
  CHECK(f64_to_f16(1e-300) == 0 && f64_to_f16(-1e-300) == 0x8000);
}

std::vector<WeightType> all_types() {
  std::vector<WeightType> types;
  for (const EncodingInfo& info : kEncodings) {
    if (info.encoding < Encoding::kInt8) continue;
    if (info.group != 0) {
      types.push_back({info.encoding, info.group});
    } else {
      for (int32_t group : {32, 64, 128}) types.push_back({info.encoding, group});
    }
  }
  return types;
}

/// Any codes and scales at all; codes beyond K and what they belong to as `resize` leaves them.
QuantizedRow random_row(const WeightType& type, int64_t cols, Numbers& numbers) {
  QuantizedRow row;
  row.resize(type, cols);
  const EncodingInfo& info = info_of(type.encoding);
  for (int64_t k = 0; k < cols; ++k) {
    row.codes[static_cast<size_t>(k)] = static_cast<uint8_t>(numbers.byte() & ((1 << info.bits) - 1));
  }
  for (uint16_t& scale : row.scales) scale = static_cast<uint16_t>(numbers.next() >> 16);
  for (uint16_t& min : row.mins) min = static_cast<uint16_t>(numbers.next() >> 16);
  for (uint8_t& scale : row.sub_scales) scale = numbers.byte();
  for (uint8_t& min : row.sub_mins) min = numbers.byte();
  return row;
}

bool same(const QuantizedRow& a, const QuantizedRow& b) {
  return a.codes == b.codes && a.scales == b.scales && a.mins == b.mins && a.sub_scales == b.sub_scales &&
         a.sub_mins == b.sub_mins;
}

void test_panels_keep_every_row() {
  Numbers numbers;
  for (const WeightType& type : all_types()) {
    for (const auto& [rows, wanted] : {std::pair<int64_t, int64_t>{1, 1}, {33, 31}, {32, 257}, {70, 300}, {3, 0}}) {
      const int64_t cols = info_of(type.encoding).superblock != 0 ? round_up(wanted, 256) : wanted;
      PanelMatrix matrix(rows, cols, type);
      CHECK(matrix.nbytes() == PanelMatrix::nbytes_for(rows, cols, type));
      CHECK(static_cast<int64_t>(matrix.bytes().size()) == matrix.nbytes());
      std::vector<QuantizedRow> kept;
      for (int64_t row = 0; row < rows; ++row) kept.push_back(random_row(type, cols, numbers));
      // Last row first: no row may touch another one.
      for (int64_t row = rows; row-- > 0;) matrix.store_row(row, kept[static_cast<size_t>(row)]);
      QuantizedRow found;
      for (int64_t row = 0; row < rows; ++row) {
        matrix.load_row(row, found);
        CHECK(same(found, kept[static_cast<size_t>(row)]));
      }
      // Written once more, over what is there.
      for (int64_t row = 0; row < rows; row += 2) {
        kept[static_cast<size_t>(row)] = random_row(type, cols, numbers);
        matrix.store_row(row, kept[static_cast<size_t>(row)]);
      }
      // The same bytes where a file has them.
      std::shared_ptr<void> owner(std::aligned_alloc(64, static_cast<size_t>(round_up(matrix.nbytes(), 64) + 64)),
                                  std::free);
      if (matrix.nbytes() > 0) std::memcpy(owner.get(), matrix.bytes().data(), matrix.bytes().size());
      const PanelMatrix mapped(
          rows, cols, type, {static_cast<const std::byte*>(owner.get()), static_cast<size_t>(matrix.nbytes())}, owner);
      for (int64_t row = 0; row < rows; ++row) {
        mapped.load_row(row, found);
        CHECK(same(found, kept[static_cast<size_t>(row)]));
      }
    }
  }
}

/// Rows that rounding finds hard: large and small, ties, one sign, constant, zeros of both signs, a single outlier.
std::vector<float> hard_row(int64_t cols, uint32_t kind, Numbers& numbers) {
  std::vector<float> row(static_cast<size_t>(cols));
  const auto uniform = [&] { return static_cast<float>(numbers.next() >> 8) * 0x1p-23f - 1.0f; };
  for (size_t k = 0; k < row.size(); ++k) {
    const float x = uniform() + uniform() + uniform();
    switch (kind % 8) {
      case 0:
        row[k] = 0.02f * x;
        break;
      case 1:
        row[k] = 20000.0f * uniform();
        break;
      case 2:
        row[k] = 1e-7f * x;
        break;
      case 3:
        row[k] = static_cast<float>(static_cast<int>(numbers.next() >> 28) - 8) * 0.25f;
        break;
      case 4:
        row[k] = 0.5f + 0.01f * x;
        break;
      case 5:
        row[k] = -0.375f;
        break;
      case 6:
        row[k] = numbers.next() >> 31 == 0 ? 0.0f : -0.0f;
        break;
      default:
        row[k] = numbers.next() >> 26 == 0 ? 3.0f * uniform() : 1e-3f * x;
    }
  }
  return row;
}

void test_every_isa_rounds_to_the_same_bits() {
  Numbers numbers;
  for (const std::string& isa : available_isas()) {
    const RoundingLoops& loops = kernel_table(isa).rounding;
    for (const WeightType& type : all_types()) {
      if (info_of(type.encoding).superblock != 0) continue;
      for (const int64_t cols : {1, 7, 8, 9, 31, 32, 33, 63, 100, 127, 128, 129, 256, 300, 1025}) {
        for (uint32_t kind = 0; kind < 16; ++kind) {
          const std::vector<float> w = hard_row(cols, kind, numbers);
          std::vector<float> importance(w.size());
          for (float& each : importance) {
            // Even where every error is infinite.
            each = kind == 15 ? 3e38f : static_cast<float>(numbers.next() >> 8) * 0x1p-20f;
          }
          const float* weights = kind < 8 ? nullptr : importance.data();
          QuantizedRow plain;
          QuantizedRow found;
          quantize_row(type, w.data(), cols, weights, plain);
          quantize_row(type, w.data(), cols, weights, found, loops);
          CHECK(same(plain, found));
          // And what a backend keeps is that.
          PanelMatrix matrix(1, cols, type);
          matrix.store_row(0, found);
          matrix.load_row(0, found);
          CHECK(same(plain, found));
        }
      }
    }
  }
}

void test_importance_that_overflows_costs_no_weights() {
  const std::vector<float> importance(32, 3e38f);
  std::vector<float> w(32);
  for (size_t k = 0; k < w.size(); ++k) w[k] = 10.0f * std::sin(static_cast<float>(k));
  for (Encoding encoding : {Encoding::kInt8, Encoding::kInt8Min, Encoding::kInt4, Encoding::kInt4Min}) {
    QuantizedRow row;
    quantize_row({encoding, 32}, w.data(), 32, importance.data(), row);
    std::vector<double> kept(32);
    dequantize_row({encoding, 32}, row, 32, kept.data());
    for (size_t k = 0; k < w.size(); ++k) CHECK_NEAR(kept[k], w[k], 1.3);
  }
}

void test_packed_weights_are_checked() {
  const std::unique_ptr<Backend> backend = make_cpu_backend(1);
  const WeightType type{Encoding::kInt4, 64};
  const int64_t nbytes = backend->matrix_nbytes(33, 100, type);
  // Two panels of two units of a scale for each column and 32 columns of 64 nibbles.
  CHECK(nbytes == 2 * 2 * (64 + 1024));
  const std::shared_ptr<std::byte> memory(
      static_cast<std::byte*>(std::aligned_alloc(64, static_cast<size_t>(nbytes) + 64)), std::free);
  std::memset(memory.get(), 0, static_cast<size_t>(nbytes) + 64);
  const auto adopt = [&](size_t at, int64_t size, int64_t rows = 33, int64_t cols = 100) {
    return backend->adopt_matrix(rows, cols, type, {memory.get() + at, static_cast<size_t>(size)}, memory);
  };
  CHECK(adopt(0, nbytes)->nbytes() == nbytes);
  CHECK(adopt(64, nbytes)->rows() == 33);
  CHECK_ERROR(ErrorKind::kCheckpoint, "as int4 (groups of 64) take 4352 bytes, got 4351", adopt(0, nbytes - 1));
  CHECK_ERROR(ErrorKind::kCheckpoint, "got 4353", adopt(0, nbytes + 1));
  CHECK_ERROR(ErrorKind::kCheckpoint, "got 0", adopt(0, 0));
  CHECK_ERROR(ErrorKind::kCheckpoint, "got 4352", adopt(0, nbytes, 65));
  for (size_t at : {size_t{1}, size_t{2}, size_t{32}, size_t{63}}) {
    CHECK_ERROR(ErrorKind::kCheckpoint, "multiple of 64 bytes", adopt(at, nbytes));
  }
  constexpr int64_t kHuge = int64_t{1} << 40;
  CHECK_ERROR(ErrorKind::kLimit, "out of range", adopt(0, nbytes, kHuge, kHuge));
}

void test_names_of_types() {
  CHECK((weight_type("int8", 64, "x") == WeightType{Encoding::kInt8, 64}));
  CHECK((weight_type("q6_k", 0, "x") == WeightType{Encoding::kQ6K, 16}));
  CHECK((weight_type("float16", 0, "x") == WeightType{Encoding::kF16, 0}));
  CHECK_ERROR(ErrorKind::kDType, "known: float32, float16", weight_type("int7", 32, "x"));
  CHECK_ERROR(ErrorKind::kOption, "32, 64 or 128, got 16", weight_type("int8", 16, "x"));
  CHECK_ERROR(ErrorKind::kOption, "no groups of 64", weight_type("q4_k", 64, "x"));
  CHECK_ERROR(ErrorKind::kOption, "no groups of 32", weight_type("bfloat16", 32, "x"));
  CHECK((WeightType{Encoding::kQ4K, 32}.unit() == 256 && WeightType{Encoding::kInt5, 64}.unit() == 64));
  CHECK_ERROR(ErrorKind::kDType, "no element type", (WeightType{Encoding::kInt8, 32}.dtype()));
}

/// The value of one weight of a block, straight from ggml's formulas.
double ggml_value(std::string_view name, const uint8_t* b, int i) {
  const auto half = [&](int at) {
    return static_cast<double>(f16_to_f32(static_cast<uint16_t>(b[at] | b[at + 1] << 8)));
  };
  const auto nibble = [&](int at) { return i < 16 ? b[at + i] & 15 : b[at + i - 16] >> 4; };
  const auto fifth = [&](int at) { return (b[at + i / 8] >> (i % 8) & 1) << 4; };
  if (name == "Q8_0") return half(0) * static_cast<int8_t>(b[2 + i]);
  if (name == "Q4_0") return half(0) * (nibble(2) - 8);
  if (name == "Q4_1") return half(0) * nibble(4) + half(2);
  if (name == "Q5_0") return half(0) * ((nibble(6) | fifth(2)) - 16);
  if (name == "Q5_1") return half(0) * (nibble(8) | fifth(4)) + half(2);
  if (name == "Q6_K") {
    const int part = i / 128, in = i % 128;
    const int low = b[64 * part + in % 64] >> (in / 64 * 4) & 15;
    const int high = b[128 + 32 * part + in % 32] >> (in / 32 * 2) & 3;
    return half(208) * static_cast<int8_t>(b[192 + i / 16]) * ((low | high << 4) - 32);
  }
  const int group = i / 32;
  const uint8_t* s = b + 4;
  const int scale = group < 4 ? s[group] & 63 : (s[group + 4] & 15) | (s[group - 4] >> 6) << 4;
  const int min = group < 4 ? s[group + 4] & 63 : (s[group + 4] >> 4) | (s[group] >> 6) << 4;
  const uint8_t* nibbles = b + (name == "Q5_K" ? 48 : 16);
  int code = nibbles[32 * (group / 2) + i % 32] >> (group % 2 * 4) & 15;
  if (name == "Q5_K") code |= (b[16 + i % 32] >> group & 1) << 4;
  return half(0) * scale * code - half(2) * min;
}

void test_ggml_blocks_are_decoded_exactly() {
  Numbers numbers;
  for (const char* name : {"Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K"}) {
    const GgmlType& type = ggml_type(name);
    constexpr int64_t kBlocks = 20;
    std::vector<uint8_t> bytes(static_cast<size_t>(kBlocks * type.block_bytes));
    for (uint8_t& byte : bytes) byte = numbers.byte();
    const std::vector<size_t> halves = type.name == "Q6_K" ? std::vector<size_t>{208} : std::vector<size_t>{0, 2};
    const size_t used = info_of(type.type.encoding).has_min ? 2 : 1;
    for (int64_t block = 0; block < kBlocks; ++block) {
      for (size_t i = 0; i < used && i < halves.size(); ++i) {
        bytes[static_cast<size_t>(block * type.block_bytes) + halves[i] + 1] &= 0xbb;  // no infinity, no NaN
      }
    }
    const int64_t cols = kBlocks * type.block;
    QuantizedRow row;
    decode_ggml_row(type, bytes.data(), cols, row);
    std::vector<double> exact(static_cast<size_t>(cols));
    dequantize_row(type.type, row, cols, exact.data());
    for (int64_t k = 0; k < cols; ++k) {
      const uint8_t* block = bytes.data() + k / type.block * type.block_bytes;
      CHECK(exact[static_cast<size_t>(k)] == ggml_value(type.name, block, static_cast<int>(k % type.block)));
    }
    bytes[halves[0] + 1] |= 0x7c;
    CHECK_ERROR(ErrorKind::kCheckpoint, "not a finite number", decode_ggml_row(type, bytes.data(), cols, row));
    CHECK_ERROR(ErrorKind::kShape, "not a number of", ggml_row_bytes(type, type.block + 1));
  }
  CHECK_ERROR(ErrorKind::kDType, "'Q2_K' are not supported; supported: Q8_0", ggml_type("Q2_K"));
}

/// Every float16 of a block at every value that is no number, or the largest there are; sub-scales, minima and codes at their
/// extremes: refused, or exact numbers, on every backend.
void test_blocks_of_any_bytes_are_refused_or_kept() {
  const std::unique_ptr<Backend> backend = make_cpu_backend(2);
  for (const char* name : {"Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K"}) {
    const GgmlType& type = ggml_type(name);
    const bool has_min = info_of(type.type.encoding).has_min;
    const std::vector<size_t> halves = type.name == "Q6_K" ? std::vector<size_t>{208}
                                       : has_min           ? std::vector<size_t>{0, 2}
                                                           : std::vector<size_t>{0};
    constexpr int64_t kRows = 33;
    const int64_t cols = 2 * type.block;
    const size_t row_bytes = static_cast<size_t>(2 * type.block_bytes);
    const auto matrix = backend->create_matrix(kRows, cols, type.type);
    const auto write = [&](const std::vector<uint8_t>& bytes, int64_t rows) {
      backend->write_blocks(*matrix, {}, type, rows, std::as_bytes(std::span(bytes)));
    };
    for (const int fill : {0x00, 0xff, 0x7f, 0x80, 0x3f, 0xc0}) {
      for (const int half : {0x0000, 0x8000, 0x0001, 0x83ff, 0x7bff, 0xfbff, 0x7c00, 0xfc00, 0x7c01, 0x7e00, 0xffff}) {
        std::vector<uint8_t> bytes(row_bytes * kRows, static_cast<uint8_t>(fill));
        for (size_t block = 0; block < 2 * kRows; ++block) {
          for (const size_t at : halves) {
            // The last block alone has it: those before it are good.
            const int value = block + 1 == 2 * kRows ? half : 0x3c00;
            bytes[block * static_cast<size_t>(type.block_bytes) + at] = static_cast<uint8_t>(value & 255);
            bytes[block * static_cast<size_t>(type.block_bytes) + at + 1] = static_cast<uint8_t>(value >> 8);
          }
        }
        if ((half & 0x7c00) == 0x7c00) {
          CHECK_ERROR(ErrorKind::kCheckpoint, "not a finite number", write(bytes, kRows));
          continue;
        }
        write(bytes, kRows);
        std::vector<float> kept(static_cast<size_t>(kRows * cols));
        backend->read_rows(*matrix, {}, {kept.data(), DType::kF32, {kRows, cols}});
        for (size_t i = 0; i < kept.size(); ++i) {
          const size_t row = i / static_cast<size_t>(cols);
          const size_t k = i % static_cast<size_t>(cols);
          const uint8_t* block = bytes.data() + row * row_bytes +
                                 k / static_cast<size_t>(type.block) * static_cast<size_t>(type.block_bytes);
          const double exact = ggml_value(type.name, block, static_cast<int>(k % static_cast<size_t>(type.block)));
          CHECK(kept[i] == static_cast<float>(exact) && std::isfinite(kept[i]));
        }
      }
    }
    // Bytes that are not those rows: one too few, one too many, none, and rows that there are not.
    std::vector<uint8_t> bytes(row_bytes * kRows);
    CHECK_ERROR(ErrorKind::kShape, "bytes, got", write({bytes.begin(), bytes.end() - 1}, kRows));
    bytes.push_back(0);
    CHECK_ERROR(ErrorKind::kShape, "bytes, got", write(bytes, kRows));
    CHECK_ERROR(ErrorKind::kShape, "bytes, got", write({}, kRows));
    bytes.resize(row_bytes * (kRows + 1));
    CHECK_ERROR(ErrorKind::kShape, "row 33 belongs at row 33 of a matrix with 33 rows", write(bytes, kRows + 1));
    write({}, 0);
    for (const int64_t wrong : {int64_t{1}, type.block - 1, type.block + 1}) {
      const auto odd = backend->create_matrix(1, wrong, type.type);
      CHECK_ERROR(ErrorKind::kShape, "is not a number of", backend->write_blocks(*odd, {}, type, 1, {}));
    }
    const auto empty = backend->create_matrix(3, 0, type.type);
    backend->write_blocks(*empty, {}, type, 3, {});
    const auto other = backend->create_matrix(kRows, cols, {Encoding::kF32, 0});
    CHECK_ERROR(
        ErrorKind::kDType, "blocks are kept as",
        backend->write_blocks(*other, {}, type, kRows, std::as_bytes(std::span(bytes).first(row_bytes * kRows))));
  }
}

}  // namespace

void test_quant() {
  test_f16_round_trip_is_exact();
  test_f16_rounds_to_nearest_even();
  test_panels_keep_every_row();
  test_every_isa_rounds_to_the_same_bits();
  test_importance_that_overflows_costs_no_weights();
  test_packed_weights_are_checked();
  test_names_of_types();
  test_ggml_blocks_are_decoded_exactly();
  test_blocks_of_any_bytes_are_refused_or_kept();
}

}  // namespace llama_ext::test
