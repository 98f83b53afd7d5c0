// Codes that somebody else has chosen, as calibration does: each arrives where it belongs, or is refused before it is kept. Sources
// have exactly the bytes that may be read, so that a sanitizer notices one more.
#include <cstdint>
#include <limits>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "check.h"
#include "core/checked.h"
#include "core/half.h"
#include "cpu/cpu_backend.h"
#include "model/transformer.h"
#include "quant/quantized_row.h"
#include "reference/reference_backend.h"

namespace llama_ext::test {
namespace {

struct Codes {
  int64_t rows, cols, groups;
  std::vector<uint8_t> codes;
  std::vector<uint16_t> scales, mins;

  Codes(const WeightType& type, int64_t row_count, int64_t col_count)
      : rows(row_count), cols(col_count), groups(ceil_div(col_count, type.group)) {
    const EncodingInfo& info = info_of(type.encoding);
    uint32_t state = 1;
    const auto next = [&] { return (state = state * 1664525u + 1013904223u) >> 8; };
    for (int64_t i = 0; i < rows * cols; ++i) codes.push_back(static_cast<uint8_t>(next() & ((1u << info.bits) - 1)));
    // Anything finite: both zeros, denormals and the largest.
    const auto half = [&] {
      const uint16_t bits = static_cast<uint16_t>(next());
      return static_cast<uint16_t>((bits & 0x7c00u) == 0x7c00u ? bits & 0xbfffu : bits);
    };
    for (int64_t i = 0; i < rows * groups; ++i) scales.push_back(half());
    for (int64_t i = 0; info.has_min && i < rows * groups; ++i) mins.push_back(half());
  }

  CodeRows view() const { return {rows, codes.data(), scales.data(), mins.empty() ? nullptr : mins.data()}; }

  double weight(const WeightType& type, int64_t row, int64_t k) const {
    const size_t group = static_cast<size_t>(row * groups + k / type.group);
    const int code = codes[static_cast<size_t>(row * cols + k)] - info_of(type.encoding).zero;
    return static_cast<double>(f16_to_f32(scales[group])) * code +
           (mins.empty() ? 0.0 : static_cast<double>(f16_to_f32(mins[group])));
  }
};

std::vector<WeightType> types() {
  std::vector<WeightType> all;
  for (const EncodingInfo& info : kEncodings) {
    if (info.encoding < Encoding::kInt8 || info.superblock != 0) continue;
    for (const int32_t group : {32, 64, 128}) all.push_back({info.encoding, group});
  }
  return all;
}

std::vector<std::unique_ptr<Backend>> backends() {
  std::vector<std::unique_ptr<Backend>> all;
  all.push_back(make_reference_backend());
  all.push_back(make_cpu_backend(1));
  all.push_back(make_cpu_backend(3));
  return all;
}

void test_codes_arrive_where_they_belong() {
  for (const auto& backend : backends()) {
    for (const WeightType& type : types()) {
      for (const auto& [rows, cols] :
           {std::pair<int64_t, int64_t>{1, 1}, {31, 127}, {33, 129}, {65, 300}, {3, 0}, {0, 40}}) {
        const Codes source(type, rows, cols);
        // As they are; and every second eight of rows, between zeros, as gate and up lie.
        for (const RowMap& map : {RowMap{}, RowMap{.begin = 5, .group = 8, .stride = 16}}) {
          const int64_t height = rows == 0 ? 2 : map(rows - 1) + 1;
          const auto matrix = backend->create_matrix(height, cols, type);
          backend->write_codes(*matrix, map, source.view());
          std::vector<float> kept(static_cast<size_t>(height * cols));
          backend->read_rows(*matrix, {}, {kept.data(), DType::kF32, {height, cols}});
          std::vector<float> expected(kept.size());
          for (int64_t i = 0; i < rows * cols; ++i) {
            expected[static_cast<size_t>(map(i / cols) * cols + i % cols)] =
                static_cast<float>(source.weight(type, i / cols, i % cols));
          }
          CHECK(kept == expected);
        }
      }
    }
  }
}

void test_bad_codes_are_refused() {
  for (const auto& backend : backends()) {
    for (const WeightType& type : types()) {
      const EncodingInfo& info = info_of(type.encoding);
      constexpr int64_t kRows = 33;
      const Codes good(type, kRows, 129);
      const auto matrix = backend->create_matrix(kRows, good.cols, type);
      const auto write = [&](const Codes& source) { backend->write_codes(*matrix, {}, source.view()); };
      if (info.bits < 8) {
        for (const int code : {1 << info.bits, 255}) {
          Codes bad = good;
          bad.codes.back() = static_cast<uint8_t>(code);
          CHECK_ERROR(ErrorKind::kNumeric, cat("weight 128 of row 32 is code ", code), write(bad));
        }
      }
      for (const int number : {0x7c00, 0xfc00, 0x7c01, 0xffff}) {
        const auto bits = static_cast<uint16_t>(number);
        Codes bad = good;
        bad.scales.back() = bits;
        CHECK_ERROR(ErrorKind::kNumeric, cat("the scale of group ", good.groups - 1, " of row 32 is not"), write(bad));
        if (!info.has_min) continue;
        bad = good;
        bad.mins.front() = bits;
        CHECK_ERROR(ErrorKind::kNumeric, "the minimum of group 0 of row 0 is not", write(bad));
      }
      if (info.has_min) {
        Codes bad = good;
        bad.mins.clear();
        CHECK_ERROR(ErrorKind::kInternal, "minima are missing", write(bad));
      }
      CHECK_ERROR(ErrorKind::kShape, "row 33 of", backend->write_codes(*matrix, {.begin = 1}, good.view()));
      CHECK_ERROR(ErrorKind::kShape, "33", backend->write_codes(*matrix, {.group = 8, .stride = 16}, good.view()));
    }
    const Codes codes({Encoding::kInt8, 32}, 2, 256);
    for (const WeightType& type : {WeightType{Encoding::kF32, 0}, WeightType{Encoding::kBF16, 0},
                                   WeightType{Encoding::kQ4K, 32}, WeightType{Encoding::kQ6K, 16}}) {
      const auto matrix = backend->create_matrix(2, 256, type);
      CHECK_ERROR(ErrorKind::kDType, "codes cannot be kept as", backend->write_codes(*matrix, {}, codes.view()));
    }
  }
}

void test_slots_take_codes() {
  ModelConfig config;
  config.vocabulary = 37;
  config.width = 48;
  config.ffn_width = 80;
  config.layers = 1;
  config.heads = 3;
  config.kv_heads = 1;
  config.head_dim = 16;
  config.context = 8;
  config.rope.head_dim = 16;
  const WeightType type{Encoding::kInt4Min, 32};
  for (const bool is_cpu : {false, true}) {
    const std::shared_ptr<Backend> backend = is_cpu ? make_cpu_backend(2) : make_reference_backend();
    const WeightPlan plan{{Encoding::kInt8, 128}, {{"layers.0.up", type}, {"layers.0.gate", type}}};
    Model model(backend, config, plan, PackedWeights(), Compute::kAuto);
    Weights& weights = model.weights();
    for (const Weights::Slot& slot : weights.slots()) {
      if (!slot.is_matrix) {
        const Codes codes(type, 1, slot.shape[0]);
        CHECK_ERROR(ErrorKind::kDType, "has no codes", weights.load_codes(slot.name, codes.view()));
        continue;
      }
      const Codes codes(slot.type, slot.shape[0], slot.shape[1]);
      for (const int64_t rows : {int64_t{0}, slot.shape[0] - 1, slot.shape[0] + 1}) {
        const Codes other(slot.type, rows, slot.shape[1]);
        CHECK_ERROR(ErrorKind::kShape, cat("got codes of ", rows), weights.load_codes(slot.name, other.view()));
      }
      weights.load_codes(slot.name, codes.view());
      std::vector<float> kept(codes.codes.size());
      weights.read(slot.name, {kept.data(), DType::kF32, {codes.rows, codes.cols}});
      for (size_t i = 0; i < kept.size(); ++i) {
        const int64_t at = static_cast<int64_t>(i);
        CHECK(kept[i] == static_cast<float>(codes.weight(slot.type, at / codes.cols, at % codes.cols)));
      }
    }
    const Codes codes(type, 1, 1);
    CHECK_ERROR(ErrorKind::kCheckpoint, "no slot 'layers.1.q'", weights.load_codes("layers.1.q", codes.view()));
    CHECK(weights.missing().size() == 3);  // the norms
  }
}

}  // namespace

void test_codes() {
  test_codes_arrive_where_they_belong();
  test_bad_codes_are_refused();
  test_slots_take_codes();
}

}  // namespace llama_ext::test
