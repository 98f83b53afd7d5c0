// Gradients of what is multiplied, and products whose float32 weights are rounded to bfloat16 on the way.
//
// d_x = d_y W is a product with panels of W^T, which are made in a scratch that the L3 cache holds, a range of n at a time, and
// multiplied as any other weights are. Gradients of weights: cpu_weight_gradients.cpp.
#include <algorithm>

#include "cpu/cpu_backend_internal.h"
#include "cpu/thread_pool.h"

namespace llama_ext {
namespace {

// Bytes of weights made at a time: well within an L3 cache.
constexpr int64_t kSlabBytes = int64_t{4} << 20;
// Transposed or rounded ranges are whole blocks of k of any product.
constexpr int64_t kRangeMultiple = 768;
constexpr WeightType kF32 = {Encoding::kF32};
constexpr WeightType kBF16 = {Encoding::kBF16};

}  // namespace

/// k in [k0, k0 + 32) of a panel as float32, [32][32]; beyond K undefined.
const float* CpuBackend::widened_block(const PanelMatrix& weight, int64_t panel, int64_t k0, float* scratch) const {
  const int64_t depth = std::min(kPanel, weight.cols() - k0);
  switch (weight.type().encoding) {
    case Encoding::kF32:
      return weight.panel<float>(panel) + k0 * kPanel;
    case Encoding::kF16:
      kernels_.training.widen_f16(weight.panel<uint16_t>(panel) + k0 * kPanel, depth, scratch);
      return scratch;
    case Encoding::kBF16:
      kernels_.training.widen_bf16(weight.panel<uint16_t>(panel) + k0 * kPanel, kPanel, scratch);
      return scratch;
    default:
      kernels_.training.widen_codes[code_index(weight.type().encoding)](weight.panel<uint8_t>(panel), k0, kPanel,
                                                                        weight.type().group, scratch);
      return scratch;
  }
}

/// Panels of W^T, for n in [n0, n0 + count): slab is a matrix (K, count) of float32 or bfloat16.
void CpuBackend::transpose_weight(const PanelMatrix& weight, int64_t n0, int64_t count, PanelMatrix& slab) {
  const bool rounds = slab.type() == kBF16;
  const int64_t blocks = ceil_div(count, kPanel);
  const double microseconds = static_cast<double>(weight.cols() * count) / 2000.0;
  parallel_for(threads_for(microseconds), slab.panels() * ceil_div(blocks, 8), [&](int64_t task, int) {
    const int64_t panel = task % slab.panels();
    const int64_t k0 = panel * kPanel;
    const int64_t columns = std::min(kPanel, weight.cols() - k0);
    alignas(64) float widened[kPanel * kPanel];
    alignas(64) float transposed[kPanel * kPanel] = {};
    const int64_t first = task / slab.panels() * 8;
    for (int64_t block = first; block < std::min(blocks, first + 8); ++block) {
      const int64_t n = block * kPanel;
      const int64_t rows = std::min(kPanel, count - n);
      const float* from = widened_block(weight, (n0 + n) / kPanel, k0, widened);
      float* to = rounds ? transposed : slab.panel<float>(panel) + n * kPanel;
      kernels_.training.transpose(from, kPanel, columns, rows, to, kPanel);
      if (!rounds) {
        for (int64_t row = 0; columns < kPanel && row < rows; ++row) {
          std::fill(to + row * kPanel + columns, to + (row + 1) * kPanel, 0.0f);
        }
        continue;
      }
      kernels_.training.round_panel(transposed, rows, kPanel, slab.panel<uint16_t>(panel) + n * kPanel);
    }
  });
}

void CpuBackend::transpose(Matrix& target, const Matrix& source) {
  check_transpose(target, source);
  transpose_weight(panel_matrix(source), 0, source.rows(), panel_matrix(target));
}

/// A product whose float32 weights become bfloat16 first: a range of panels at a time.
void CpuBackend::multiply_rounded(const Product& product) {
  const PanelMatrix& weight = *product.weight;
  const int64_t panel_bytes = std::max<int64_t>(1, PanelMatrix::nbytes_for(kPanel, weight.cols(), kBF16));
  const int64_t range = std::clamp<int64_t>(kSlabBytes / panel_bytes, 1, std::max<int64_t>(1, weight.panels()));
  for (int64_t first = 0; first < weight.panels(); first += range) {
    const int64_t panels = std::min(range, weight.panels() - first);
    const int64_t n0 = first * kPanel;
    const int64_t rows = std::min(panels * kPanel, weight.rows() - n0);
    const auto bytes = static_cast<size_t>(panels * panel_bytes);
    auto* memory = static_cast<std::byte*>(thread_scratch(Scratch::kWeights, bytes));
    const auto used = static_cast<size_t>(PanelMatrix::nbytes_for(rows, weight.cols(), kBF16));
    PanelMatrix slab(rows, weight.cols(), kBF16, {memory, used}, nullptr);
    const int64_t depth = slab.k_padded();
    parallel_for(threads_for(static_cast<double>(rows * depth) / 1000.0), panels, [&](int64_t panel, int) {
      kernels_.training.round_panel(weight.panel<float>(first + panel), weight.cols(), depth,
                                    slab.panel<uint16_t>(panel));
    });
    Product part = product;
    part.weight = &slab;
    part.compute = Compute::kAuto;
    if (part.bias != nullptr) part.bias += n0;
    const int64_t width = product.epilogue == EpilogueKind::kSwiGlu ? kPanel / 2 : kPanel;
    const int64_t columns = std::min(panels * width, product.y.dim(1) - first * width);
    part.y =
        TensorView(product.y.f32() + first * width, DType::kF32, {product.y.dim(0), columns}, product.y.row_stride());
    multiply(part);
  }
}

void CpuBackend::multiply_transposed(const MatmulBackwardArgs& args) {
  const PanelMatrix& weight = panel_matrix(*args.weight);
  // Weights of 8 bits and fewer are multiplied as float32.
  const bool rounds = args.compute != Compute::kExact &&
                      (weight.type() == kBF16 || (args.compute == Compute::kBF16 && weight.type() == kF32));
  const WeightType type = rounds ? kBF16 : kF32;
  const int64_t outputs = weight.rows();
  const int64_t row_bytes = std::max<int64_t>(1, round_up(weight.cols(), kPanel) * (rounds ? 2 : 4));
  const int64_t range = std::max(kRangeMultiple, kSlabBytes / row_bytes / kRangeMultiple * kRangeMultiple);
  int64_t n0 = 0;
  do {  // once even for N = 0, which gives zeros
    const int64_t count = std::min(range, outputs - n0);
    const auto bytes = static_cast<size_t>(PanelMatrix::nbytes_for(weight.cols(), count, type));
    auto* memory = static_cast<std::byte*>(thread_scratch(Scratch::kWeights, bytes));
    PanelMatrix slab(weight.cols(), count, type, {memory, bytes}, nullptr);
    transpose_weight(weight, n0, count, slab);
    const TensorView d_y(args.d_y.f32() + n0, DType::kF32, {args.d_y.dim(0), count}, args.d_y.row_stride());
    multiply({d_y, &slab, nullptr, args.accumulate || n0 > 0 ? EpilogueKind::kAdd : EpilogueKind::kStore, args.d_x,
              Compute::kAuto});
    n0 += count;
  } while (n0 < outputs);
}

void CpuBackend::matmul_backward(const MatmulBackwardArgs& args) {
  check(args);
  if (args.d_x) multiply_transposed(args);
  if (args.d_weight != nullptr || args.d_bias) accumulate_weights({&args, 1});
}

}  // namespace llama_ext
