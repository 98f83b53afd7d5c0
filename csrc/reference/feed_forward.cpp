#include <cmath>
#include <vector>

#include "reference/interrupt_poll.h"
#include "reference/reference_ops.h"
#include "reference/storage.h"

namespace llama_ext::reference {
namespace {

double silu(double z) { return z / (1.0 + std::exp(-z)); }

double dot(const float* x, const std::vector<double>& w) {
  double sum = 0;
  for (size_t k = 0; k < w.size(); ++k) sum += static_cast<double>(x[k]) * w[k];
  return sum;
}

}  // namespace

void ReferenceBackend::feed_forward(const FeedForwardArgs& args) {
  check(args);
  const bool is_split = args.gate_up == nullptr;
  const ReferenceMatrix& gates = own(is_split ? *args.gate : *args.gate_up, "feed_forward");
  const ReferenceMatrix& ups = own(is_split ? *args.up : *args.gate_up, "feed_forward");
  const TensorView& gate_bias = is_split ? args.gate_bias : args.gate_up_bias;
  const TensorView& up_bias = is_split ? args.up_bias : args.gate_up_bias;
  const ReferenceMatrix& down = own(*args.down, "feed_forward");
  std::vector<float> memory;
  const TensorView input = normalized(args.norm, args.x, memory);
  const int64_t rows = input.rows();
  const int64_t width = down.cols();  // F
  const auto bias = [](const TensorView& view, int64_t i) { return view ? static_cast<double>(view.f32()[i]) : 0.0; };
  InterruptPoll interrupt;

  std::vector<double> hidden(static_cast<size_t>(rows * width));  // (M, F), never rounded
  std::vector<double> gate(static_cast<size_t>(gates.cols()));
  std::vector<double> up(static_cast<size_t>(gates.cols()));
  for (int64_t f = 0; f < width; ++f) {
    const int64_t gate_row = is_split ? f : gate_rows()(f);
    const int64_t up_row = is_split ? f : up_rows()(f);
    gates.load_row(gate_row, gate.data());
    ups.load_row(up_row, up.data());
    for (int64_t m = 0; m < rows; ++m) {
      const float* x = input.row<float>(m);
      const double g = dot(x, gate) + bias(gate_bias, gate_row);
      const double u = dot(x, up) + bias(up_bias, up_row);
      hidden[static_cast<size_t>(m * width + f)] = silu(g) * u;
      interrupt.advance(2 * gates.cols() + 1);
    }
  }

  std::vector<double> w(static_cast<size_t>(width));
  for (int64_t n = 0; n < down.rows(); ++n) {
    down.load_row(n, w.data());
    for (int64_t m = 0; m < rows; ++m) {
      double sum = bias(args.down_bias, n);
      for (int64_t f = 0; f < width; ++f) {
        sum += hidden[static_cast<size_t>(m * width + f)] * w[static_cast<size_t>(f)];
      }
      float& y = args.y.row<float>(m)[n];
      y = static_cast<float>(args.accumulate ? static_cast<double>(y) + sum : sum);
      interrupt.advance(width + 1);
    }
  }
}

}  // namespace llama_ext::reference
