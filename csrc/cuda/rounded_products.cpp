#include "cuda/rounded_products.h"

#include <algorithm>

namespace llama_ext::cuda {
namespace {

/// Rows of bfloat16 numbers in scratch memory.
struct Operand {
  int64_t stride;
  Scratch memory;

  Operand(const Gpu& gpu, int64_t rows, int64_t width)
      : stride(round_up(width, kPad)), memory(gpu, static_cast<size_t>(rows * stride) * sizeof(uint16_t)) {}
  RoundedOperand rows() const { return {memory.as<uint16_t>(), stride}; }
  const uint16_t* data() const { return memory.as<uint16_t>(); }
  WeightView as_weight(int64_t count, int64_t width) const {
    WeightView view;
    view.data = memory.as<unsigned char>();
    view.kind = Kind::kBF16;
    view.rows = static_cast<int>(count);
    view.cols = static_cast<int>(width);
    view.stride = static_cast<int>(stride);
    view.nbytes = count * view.row_bytes();
    return view;
  }
};

Rows float_rows(const WeightView& weight) {
  return {reinterpret_cast<float*>(const_cast<unsigned char*>(weight.data)), weight.stride};
}

}  // namespace

void rounded_product(const Gpu& gpu, const ProductView& p) {
  const Operand weight(gpu, p.weight.rows, p.weight.stride);
  round_rows(gpu, float_rows(p.weight), p.weight.rows, p.weight.stride, weight.rows());
  const Operand x(gpu, p.rows, p.weight.cols);
  if (p.norm.weight == nullptr) {
    round_rows(gpu, p.x, p.rows, p.weight.cols, x.rows());
  } else {
    prepare_rows(gpu, p.x, p.rows, p.weight.cols, static_cast<int>(x.stride), p.norm, x.memory.as<uint16_t>(), nullptr);
  }
  MmaView view;
  view.x = x.data();
  view.rows = p.rows;
  view.weight = weight.as_weight(p.weight.rows, p.weight.cols);
  view.bias = p.bias;
  view.y = p.y;
  view.accumulate = p.accumulate;
  matmul_mma(gpu, view);
}

void for_each_strip(const Gpu& gpu, const WeightView& weight, int64_t rows,
                    const std::function<void(const WeightView& strip, int64_t first)>& multiply) {
  if (!unpacks_weights(weight, rows)) return multiply(weight, 0);
  const int64_t most = std::min<int64_t>(strip_rows(operand_stride(weight, rows)), weight.rows);
  const Operand strip(gpu, most, weight.cols);
  for (int64_t first = 0; first < weight.rows; first += most) {
    const int64_t count = std::min(most, weight.rows - first);
    unpack_rows(gpu, weight, first, count, strip.rows());
    multiply(strip.as_weight(count, weight.cols), first);
  }
}

void rounded_gradients(const Gpu& gpu, const ProductGradients& g) {
  const bool wants_x = g.weight != nullptr;
  const bool wants_weight = g.d_weight != nullptr;
  // d_y is read once for both.
  const Operand along(gpu, wants_x ? g.rows : 0, g.width);
  const Operand across(gpu, wants_weight ? g.width : 0, g.rows);
  if (wants_weight) {
    round_transposed(gpu, g.d_y, g.rows, g.width, across.rows(), wants_x ? along.rows() : RoundedOperand{});
  } else {
    round_rows(gpu, g.d_y, g.rows, g.width, along.rows());
  }
  if (wants_x) {
    MmaView view;
    view.x = along.data();
    view.rows = g.rows;
    view.accumulate = g.accumulate;
    const int64_t columns = g.weight->cols;
    const bool unpacks = is_quantized(g.weight->kind);
    const int64_t most = unpacks ? std::min(strip_rows(along.stride), columns) : columns;
    const Operand weight(gpu, most, g.width);
    for (int64_t first = 0; first < columns; first += most) {
      const int64_t count = std::min(most, columns - first);
      if (unpacks) {
        unpack_transposed(gpu, *g.weight, first, count, weight.rows());
      } else {
        round_transposed(gpu, *g.weight, weight.rows());
      }
      view.weight = weight.as_weight(count, g.width);
      view.y = {g.d_x.data + first, g.d_x.stride};
      matmul_mma(gpu, view);
    }
  }
  if (wants_weight) {
    // The products of a matrix's columns with each other need it once (a step of Muon).
    const bool is_same = g.x.data == g.d_y.data && g.x.stride == g.d_y.stride && g.d_weight->cols == g.width;
    const Operand x(gpu, is_same ? 0 : g.d_weight->cols, g.rows);
    if (!is_same) round_transposed(gpu, g.x, g.rows, g.d_weight->cols, x.rows(), {});
    MmaView view;
    view.x = across.data();
    view.rows = g.width;
    view.weight = (is_same ? across : x).as_weight(g.d_weight->cols, g.rows);
    view.y = float_rows(*g.d_weight);
    view.accumulate = true;
    matmul_mma(gpu, view);
  }
}

}  // namespace llama_ext::cuda
