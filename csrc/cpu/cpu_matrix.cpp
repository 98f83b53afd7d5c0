// Weights in and out of their panels.
#include "core/half.h"
#include "cpu/cpu_backend_internal.h"
#include "cpu/thread_pool.h"

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
};
template <>
struct Source<DType::kBF16> {
  using Element = uint16_t;
  static float widen(uint16_t x) { return bf16_to_f32(x); }
  static uint16_t to_bf16(uint16_t x) { return x; }
};
template <>
struct Source<DType::kF16> {
  using Element = uint16_t;
  static float widen(uint16_t x) { return f16_to_f32(x); }
  static uint16_t to_bf16(uint16_t x) { return f32_to_bf16(f16_to_f32(x)); }
};
template <>
struct Source<DType::kF64> {
  using Element = double;
  static float widen(double x) { return static_cast<float>(x); }
  static uint16_t to_bf16(double x) { return f64_to_bf16(x); }
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
      if (matrix.dtype() == DType::kBF16) {
        uint16_t* to = matrix.panel<uint16_t>(row / kPanel) + row % kPanel * 2 + k0 * kPanel;
        int64_t k = k0;
        for (; k + 2 <= k_end; k += 2, to += 2 * kPanel) {
          to[0] = Source<kFrom>::to_bf16(from[k]);
          to[1] = Source<kFrom>::to_bf16(from[k + 1]);
        }
        if (k < k_end) to[0] = Source<kFrom>::to_bf16(from[k]);
      } else {
        float* to = matrix.panel<float>(row / kPanel) + row % kPanel;
        for (int64_t k = k0; k < k_end; ++k) to[k * kPanel] = Source<kFrom>::widen(from[k]);
      }
    }
  }
}

void check_rows(const Matrix& matrix, const RowMap& map, const TensorView& rows, const char* what) {
  require_shape(rows, {-1, matrix.cols()}, "matrix", what);
  require(rows.is_contiguous(), ErrorKind::kShape, "matrix: ", what, " must be contiguous");
  if (rows.rows() == 0) return;
  const int64_t last = map(rows.rows() - 1);
  require(map.begin >= 0 && last >= 0 && last < matrix.rows(), ErrorKind::kShape, "matrix: ", what, " has ",
          rows.rows(), " rows, the last of which would be row ", last, " of ", matrix.rows());
}

double copy_microseconds(const TensorView& view) { return static_cast<double>(view.size()) / 500.0; }

}  // namespace

std::unique_ptr<Matrix> CpuBackend::create_matrix(int64_t rows, int64_t cols, DType dtype) {
  require(rows >= 0 && cols >= 0, ErrorKind::kShape, "matrix: rows and columns must not be negative, got ",
          shape_text({rows, cols}));
  require(dtype == DType::kF32 || dtype == DType::kBF16, ErrorKind::kDType,
          "matrix: weights are kept as float32 or bfloat16, got ", name_of(dtype));
  return std::make_unique<PanelMatrix>(rows, cols, dtype);
}

void CpuBackend::write_rows(Matrix& matrix, const RowMap& map, const TensorView& source) {
  PanelMatrix& panels = panel_matrix(matrix);
  check_rows(matrix, map, source, "source");
  auto pack = pack_rows<DType::kF32>;
  switch (source.dtype()) {
    case DType::kF32:
      break;
    case DType::kBF16:
      pack = pack_rows<DType::kBF16>;
      break;
    case DType::kF16:
      pack = pack_rows<DType::kF16>;
      break;
    case DType::kF64:
      pack = pack_rows<DType::kF64>;
      break;
    case DType::kI32:
      fail(ErrorKind::kDType, "matrix: source must be float32, float16, bfloat16 or float64, got int32");
  }
  const int64_t rows = source.rows();
  parallel_for(threads_for(copy_microseconds(source)), ceil_div(rows, kRowsPerTask), [&](int64_t task, int) {
    const int64_t begin = task * kRowsPerTask;
    pack(panels, map, source, begin, begin + kRowsPerTask < rows ? begin + kRowsPerTask : rows);
  });
}

void CpuBackend::read_rows(const Matrix& matrix, const RowMap& map, const TensorView& target) {
  const PanelMatrix& panels = panel_matrix(matrix);
  check_rows(matrix, map, target, "target");
  require(target.dtype() == DType::kF32 || target.dtype() == matrix.dtype(), ErrorKind::kDType,
          "matrix: target must be float32 or ", name_of(matrix.dtype()), ", got ", name_of(target.dtype()));
  const bool is_bf16 = matrix.dtype() == DType::kBF16;
  const bool widens = is_bf16 && target.dtype() == DType::kF32;
  parallel_for(threads_for(copy_microseconds(target)), target.rows(), [&](int64_t i, int) {
    const int64_t row = map(i);
    for (int64_t k = 0; k < matrix.cols(); ++k) {
      const int64_t offset = panels.offset_in_panel(row, k);
      if (!is_bf16) {
        target.row<float>(i)[k] = panels.panel<float>(row / kPanel)[offset];
      } else if (widens) {
        target.row<float>(i)[k] = bf16_to_f32(panels.panel<uint16_t>(row / kPanel)[offset]);
      } else {
        target.row<uint16_t>(i)[k] = panels.panel<uint16_t>(row / kPanel)[offset];
      }
    }
  });
}

}  // namespace llama_ext
