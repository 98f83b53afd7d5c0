// Weights in and out of their panels.
#include <algorithm>
#include <utility>
#include <vector>

#include "core/half.h"
#include "cpu/cpu_backend_internal.h"
#include "cpu/thread_pool.h"
#include "ops/argument_checks.h"

namespace llama_ext {
namespace {

// Rows handled by one task: those of one panel, so that no two threads write the same cache line.
constexpr int64_t kRowsPerTask = kPanel;
// k handled at a time: keeps the strided side of the transposition in the L1 cache.
constexpr int64_t kBlock = 128;

template <DType kFrom>
struct Source;
template <>
struct Source<DType::kF32> {
  using Element = float;
  static float widen(float x) { return x; }
  static uint16_t to_bf16(float x) { return f32_to_bf16(x); }
  static uint16_t to_f16(float x) { return f32_to_f16(x); }
};
template <>
struct Source<DType::kBF16> {
  using Element = uint16_t;
  static float widen(uint16_t x) { return bf16_to_f32(x); }
  static uint16_t to_bf16(uint16_t x) { return x; }
  static uint16_t to_f16(uint16_t x) { return f32_to_f16(bf16_to_f32(x)); }
};
template <>
struct Source<DType::kF16> {
  using Element = uint16_t;
  static float widen(uint16_t x) { return f16_to_f32(x); }
  static uint16_t to_bf16(uint16_t x) { return f32_to_bf16(f16_to_f32(x)); }
  static uint16_t to_f16(uint16_t x) { return x; }
};
template <>
struct Source<DType::kF64> {
  using Element = double;
  static float widen(double x) { return static_cast<float>(x); }
  static uint16_t to_bf16(double x) { return f64_to_bf16(x); }
  static uint16_t to_f16(double x) { return f64_to_f16(x); }
};

template <DType kFrom>
void pack_rows(PanelMatrix& matrix, const RowMap& map, const TensorView& source, int64_t begin, int64_t end) {
  using Element = typename Source<kFrom>::Element;
  const int64_t cols = matrix.cols();
  for (int64_t k0 = 0; k0 < cols; k0 += kBlock) {
    const int64_t k_end = cols - k0 < kBlock ? cols : k0 + kBlock;
    for (int64_t i = begin; i < end; ++i) {
      const Element* from = source.row<const Element>(i);
      const int64_t row = map(i);
      if (matrix.type().encoding == Encoding::kBF16) {
        uint16_t* to = matrix.panel<uint16_t>(row / kPanel) + row % kPanel * 2 + k0 * kPanel;
        int64_t k = k0;
        for (; k + 2 <= k_end; k += 2, to += 2 * kPanel) {
          to[0] = Source<kFrom>::to_bf16(from[k]);
          to[1] = Source<kFrom>::to_bf16(from[k + 1]);
        }
        if (k < k_end) to[0] = Source<kFrom>::to_bf16(from[k]);
      } else if (matrix.type().encoding == Encoding::kF16) {
        uint16_t* to = matrix.panel<uint16_t>(row / kPanel) + row % kPanel;
        for (int64_t k = k0; k < k_end; ++k) to[k * kPanel] = Source<kFrom>::to_f16(from[k]);
      } else {
        float* to = matrix.panel<float>(row / kPanel) + row % kPanel;
        for (int64_t k = k0; k < k_end; ++k) to[k * kPanel] = Source<kFrom>::widen(from[k]);
      }
    }
  }
}

template <DType kFrom>
void quantize_rows(PanelMatrix& matrix, const RowMap& map, const TensorView& source, const float* importance,
                   const RoundingLoops& loops, int64_t begin, int64_t end) {
  using Element = typename Source<kFrom>::Element;
  std::vector<float> widened(static_cast<size_t>(matrix.cols()));
  QuantizedRow row;
  for (int64_t i = begin; i < end; ++i) {
    const Element* from = source.row<const Element>(i);
    for (size_t k = 0; k < widened.size(); ++k) widened[k] = Source<kFrom>::widen(from[k]);
    quantize_row(matrix.type(), widened.data(), matrix.cols(), importance, row, loops);
    matrix.store_row(map(i), row);
  }
}

/// Calls visit.template operator()<the dtype>().
template <typename Visit>
void visit_dtype(DType dtype, const Visit& visit) {
  switch (dtype) {
    case DType::kF32:
      return visit.template operator()<DType::kF32>();
    case DType::kBF16:
      return visit.template operator()<DType::kBF16>();
    case DType::kF16:
      return visit.template operator()<DType::kF16>();
    case DType::kF64:
      return visit.template operator()<DType::kF64>();
    case DType::kI32:
    case DType::kI8:
      fail(ErrorKind::kInternal, "matrix: rows of ", name_of(dtype), " are no weights");
  }
}

// What one thread moves in a microsecond, roughly, in weights.
constexpr double kCopied = 500.0;
constexpr double kRounded = 30.0;
constexpr double kMoved = 1500.0;
// Rows of a tensor that a panel's are written to at a time.
constexpr int64_t kLoadedRows = 8;

/// Rows of a tensor that lie side by side in one panel.
struct PanelRows {
  int64_t row;    // of the tensor, the first
  int64_t place;  // of the matrix, likewise
  int64_t count;
};

std::vector<PanelRows> panel_rows(const RowMap& map, int64_t rows) {
  std::vector<PanelRows> parts;
  for_each_run(map, rows, [&](int64_t row, int64_t place, int64_t count) {
    while (count > 0) {
      const int64_t some = std::min(count, kPanel - place % kPanel);
      parts.push_back({row, place, some});
      row += some;
      place += some;
      count -= some;
    }
  });
  return parts;
}

}  // namespace

std::unique_ptr<Matrix> CpuBackend::create_matrix(int64_t rows, int64_t cols, WeightType type) {
  require(rows >= 0 && cols >= 0, ErrorKind::kShape, "matrix: rows and columns must not be negative, got ",
          shape_text({rows, cols}));
  return std::make_unique<PanelMatrix>(rows, cols, type);
}

std::unique_ptr<Matrix> CpuBackend::adopt_matrix(int64_t rows, int64_t cols, WeightType type,
                                                 std::span<const std::byte> packed, std::shared_ptr<const void> owner) {
  return std::make_unique<PanelMatrix>(rows, cols, type, packed, std::move(owner));
}

std::span<const std::byte> CpuBackend::packed_bytes(const Matrix& matrix) const { return panel_matrix(matrix).bytes(); }

void CpuBackend::write_rows(Matrix& matrix, const RowMap& map, const TensorView& source, const TensorView& importance) {
  PanelMatrix& panels = panel_matrix(matrix);
  check_write_rows(matrix, map, source, importance);
  const bool quantizes = matrix.type().is_quantized();
  const int64_t rows = source.rows();
  visit_dtype(source.dtype(), [&]<DType kFrom>() {
    const double microseconds = static_cast<double>(source.size()) / (quantizes ? kRounded : kCopied);
    parallel_for(threads_for(microseconds), ceil_div(rows, kRowsPerTask), [&](int64_t task, int) {
      const int64_t begin = task * kRowsPerTask;
      const int64_t end = std::min(begin + kRowsPerTask, rows);
      if (quantizes) {
        quantize_rows<kFrom>(panels, map, source, importance ? importance.f32() : nullptr, kernels_.rounding, begin,
                             end);
      } else {
        pack_rows<kFrom>(panels, map, source, begin, end);
      }
    });
  });
}

void CpuBackend::write_blocks(Matrix& matrix, const RowMap& map, const GgmlType& ggml, int64_t rows,
                              std::span<const std::byte> blocks) {
  PanelMatrix& panels = panel_matrix(matrix);
  const int64_t row_bytes = check_write_blocks(matrix, map, ggml, rows, blocks.size());
  const auto* bytes = reinterpret_cast<const uint8_t*>(blocks.data());
  const double microseconds = static_cast<double>(rows * matrix.cols()) / kRounded;
  parallel_for(threads_for(microseconds), ceil_div(rows, kRowsPerTask), [&](int64_t task, int) {
    QuantizedRow row;
    const int64_t begin = task * kRowsPerTask;
    for (int64_t i = begin; i < std::min(begin + kRowsPerTask, rows); ++i) {
      decode_ggml_row(ggml, bytes + i * row_bytes, matrix.cols(), row);
      panels.store_row(map(i), row);
    }
  });
}

void CpuBackend::write_codes(Matrix& matrix, const RowMap& map, const CodeRows& source) {
  PanelMatrix& panels = panel_matrix(matrix);
  check_map(matrix, map, source.rows, "write_codes");
  const double microseconds = static_cast<double>(source.rows * matrix.cols()) / kCopied;
  parallel_for(threads_for(microseconds), ceil_div(source.rows, kRowsPerTask), [&](int64_t task, int) {
    QuantizedRow row;
    const int64_t begin = task * kRowsPerTask;
    for (int64_t i = begin; i < std::min(begin + kRowsPerTask, source.rows); ++i) {
      take_codes(matrix.type(), source, i, matrix.cols(), row);
      panels.store_row(map(i), row);
    }
  });
}

void load_row(const PanelMatrix& matrix, int64_t row, float* out) {
  if (matrix.type().is_quantized()) {
    QuantizedRow codes;
    matrix.load_row(row, codes);
    return dequantize_row(matrix.type(), codes, matrix.cols(), out);
  }
  const int64_t panel = row / kPanel;
  const int64_t lane = row % kPanel;
  switch (matrix.type().dtype()) {
    case DType::kBF16: {
      const uint16_t* from = matrix.panel<uint16_t>(panel) + 2 * lane;
      int64_t k = 0;
      for (; k + 2 <= matrix.cols(); k += 2) {
        out[k] = bf16_to_f32(from[k * kPanel]);
        out[k + 1] = bf16_to_f32(from[k * kPanel + 1]);
      }
      if (k < matrix.cols()) out[k] = bf16_to_f32(from[k * kPanel]);
      return;
    }
    case DType::kF16: {
      const uint16_t* from = matrix.panel<uint16_t>(panel) + lane;
      for (int64_t k = 0; k < matrix.cols(); ++k) out[k] = f16_to_f32(from[k * kPanel]);
      return;
    }
    default: {
      const float* from = matrix.panel<float>(panel) + lane;
      for (int64_t k = 0; k < matrix.cols(); ++k) out[k] = from[k * kPanel];
    }
  }
}

void CpuBackend::read_rows(const Matrix& matrix, const RowMap& map, const TensorView& target) {
  const PanelMatrix& panels = panel_matrix(matrix);
  check_read_rows(matrix, map, target);
  const bool widens = target.dtype() == DType::kF32;
  const double microseconds = static_cast<double>(target.size()) / (matrix.type().is_quantized() ? kRounded : kCopied);
  parallel_for(threads_for(microseconds), target.rows(), [&](int64_t i, int) {
    const int64_t row = map(i);
    if (widens) {
      load_row(panels, row, target.row<float>(i));
      return;
    }
    for (int64_t k = 0; k < matrix.cols(); ++k) {
      target.row<uint16_t>(i)[k] = panels.panel<uint16_t>(row / kPanel)[panels.offset_in_panel(row, k)];
    }
  });
}

void CpuBackend::read_codes(const Matrix& matrix, const RowMap& map, int64_t rows,
                            const std::function<void(int64_t, const QuantizedRow&)>& visit) {
  const PanelMatrix& panels = panel_matrix(matrix);
  check_read_codes(matrix, map, rows);
  QuantizedRow row;
  for (int64_t i = 0; i < rows; ++i) {
    panels.load_row(map(i), row);
    visit(i, row);
  }
}

void CpuBackend::copy_rows(Matrix& target, const RowMap& to, const Matrix& source, const RowMap& from, int64_t rows) {
  PanelMatrix& target_panels = panel_matrix(target);
  const PanelMatrix& source_panels = panel_matrix(source);
  check_copy_rows(target, to, source, from, rows);
  const double microseconds = static_cast<double>(rows * source.cols()) / kCopied;
  // Within a matrix a row may be source and target: in order, then.
  const int threads = &target == &source ? 1 : threads_for(microseconds);
  parallel_for(threads, ceil_div(rows, kRowsPerTask), [&](int64_t task, int) {
    QuantizedRow codes;
    const int64_t begin = task * kRowsPerTask;
    for (int64_t i = begin; i < std::min(begin + kRowsPerTask, rows); ++i) {
      const int64_t row = from(i);
      const int64_t place = to(i);
      if (source.type().is_quantized()) {
        source_panels.load_row(row, codes);
        target_panels.store_row(place, codes);
        continue;
      }
      const auto copy = [&](auto* target_panel, const auto* source_panel) {
        for (int64_t k = 0; k < source.cols(); ++k) {
          target_panel[target_panels.offset_in_panel(place, k)] = source_panel[source_panels.offset_in_panel(row, k)];
        }
      };
      if (source.type().encoding == Encoding::kF32) {
        copy(target_panels.panel<float>(place / kPanel), source_panels.panel<float>(row / kPanel));
      } else {
        copy(target_panels.panel<uint16_t>(place / kPanel), source_panels.panel<uint16_t>(row / kPanel));
      }
    }
  });
}

/// Calls move(rows, first k, how many k) for each block of k of each part of a panel.
template <typename Move>
void CpuBackend::for_each_block(const Matrix& matrix, const RowMap& map, int64_t rows, const Move& move) const {
  const std::vector<PanelRows> parts = panel_rows(map, rows);
  const int64_t blocks = ceil_div(matrix.cols(), kBlock);
  const int threads = threads_for(static_cast<double>(rows * matrix.cols()) / kMoved);
  parallel_for(threads, static_cast<int64_t>(parts.size()) * blocks, [&](int64_t task, int) {
    const int64_t k = task % blocks * kBlock;
    move(parts[static_cast<size_t>(task / blocks)], k, std::min(kBlock, matrix.cols() - k));
  });
}

void CpuBackend::load_rows(const Matrix& matrix, const RowMap& map, const TensorView& target, bool transposes) {
  const int64_t rows = check_tensor_rows(matrix, map, target, transposes, "load_rows");
  const PanelMatrix& panels = panel_matrix(matrix);
  for_each_block(matrix, map, rows, [&](const PanelRows& part, int64_t k, int64_t depth) {
    const float* from = panels.panel<float>(part.place / kPanel) + k * kPanel + part.place % kPanel;
    if (transposes) {
      for (int64_t i = 0; i < depth; ++i)
        std::copy_n(from + i * kPanel, part.count, target.row<float>(k + i) + part.row);
      return;
    }
    // Few rows of the target at a time: where they start a power of two apart, more would push each other out of the L1 cache.
    for (int64_t lane = 0; lane < part.count; lane += kLoadedRows) {
      kernels_.training.transpose(from + lane, kPanel, depth, std::min(kLoadedRows, part.count - lane),
                                  target.row<float>(part.row + lane) + k, target.row_stride());
    }
  });
}

void CpuBackend::store_rows(Matrix& matrix, const RowMap& map, const TensorView& source, bool transposes) {
  const int64_t rows = check_tensor_rows(matrix, map, source, transposes, "store_rows");
  PanelMatrix& panels = panel_matrix(matrix);
  for_each_block(matrix, map, rows, [&](const PanelRows& part, int64_t k, int64_t depth) {
    float* to = panels.panel<float>(part.place / kPanel) + k * kPanel + part.place % kPanel;
    if (transposes) {
      for (int64_t i = 0; i < depth; ++i) std::copy_n(source.row<float>(k + i) + part.row, part.count, to + i * kPanel);
      return;
    }
    kernels_.training.transpose(source.row<float>(part.row) + k, source.row_stride(), part.count, depth, to, kPanel);
  });
}

TensorView CpuBackend::values(Matrix& matrix) {
  PanelMatrix& panels = panel_matrix(matrix);
  check_values(matrix, "values");
  require(panels.owns_memory(), ErrorKind::kUnsupported,
          "matrix: these weights are a file's own pages and cannot be changed. Load them without sharing.");
  return TensorView(panels.panel<float>(0), DType::kF32, {panels.nbytes() / static_cast<int64_t>(sizeof(float))});
}

}  // namespace llama_ext
