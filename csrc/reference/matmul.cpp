#include <vector>

#include "reference/interrupt_poll.h"
#include "reference/reference_ops.h"
#include "reference/storage.h"

namespace llama_ext::reference {

void ReferenceBackend::matmul(const MatmulArgs& args) {
  check(args);
  const ReferenceMatrix& weight = own(*args.weight, "matmul");
  const int64_t size = weight.cols();
  std::vector<double> w(static_cast<size_t>(size));
  std::vector<float> memory;
  const TensorView input = normalized(args.norm, args.x, memory);
  InterruptPoll interrupt;
  for (int64_t n = 0; n < weight.rows(); ++n) {
    weight.load_row(n, w.data());
    const double bias = args.bias ? static_cast<double>(args.bias.f32()[n]) : 0.0;
    for (int64_t m = 0; m < input.rows(); ++m) {
      const float* x = input.row<float>(m);
      double sum = bias;
      for (int64_t k = 0; k < size; ++k) sum += static_cast<double>(x[k]) * w[static_cast<size_t>(k)];
      float& y = args.y.row<float>(m)[n];
      y = static_cast<float>(args.accumulate ? static_cast<double>(y) + sum : sum);
      interrupt.advance(size + 1);
    }
  }
}

void ReferenceBackend::matmul_backward(const MatmulBackwardArgs& args) {
  check(args);
  const TensorView& d_y = args.d_y;
  const int64_t rows = d_y.rows();
  const int64_t outputs = d_y.dim(1);
  InterruptPoll interrupt;
  if (args.d_x) {
    const ReferenceMatrix& weight = own(*args.weight, "matmul_backward");
    const int64_t size = weight.cols();
    std::vector<double> sums(static_cast<size_t>(rows * size));
    std::vector<double> w(static_cast<size_t>(size));
    for (int64_t n = 0; n < outputs; ++n) {
      weight.load_row(n, w.data());
      for (int64_t m = 0; m < rows; ++m) {
        const double d = static_cast<double>(d_y.row<float>(m)[n]);
        for (int64_t k = 0; k < size; ++k) sums[static_cast<size_t>(m * size + k)] += d * w[static_cast<size_t>(k)];
        interrupt.advance(size + 1);
      }
    }
    for (int64_t m = 0; m < rows; ++m) {
      for (int64_t k = 0; k < size; ++k) {
        const double sum = sums[static_cast<size_t>(m * size + k)];
        float& d_x = args.d_x.row<float>(m)[k];
        d_x = static_cast<float>(args.accumulate ? static_cast<double>(d_x) + sum : sum);
      }
    }
  }
  if (args.d_weight != nullptr) {
    const ReferenceMatrix& d_weight = own(*args.d_weight, "matmul_backward");
    const int64_t size = d_weight.cols();
    std::vector<double> sums(static_cast<size_t>(size));
    for (int64_t n = 0; n < outputs; ++n) {
      d_weight.load_row(n, sums.data());
      for (int64_t m = 0; m < rows; ++m) {
        const double d = static_cast<double>(d_y.row<float>(m)[n]);
        const float* x = args.x.row<float>(m);
        for (int64_t k = 0; k < size; ++k) sums[static_cast<size_t>(k)] += d * static_cast<double>(x[k]);
        interrupt.advance(size + 1);
      }
      for (int64_t k = 0; k < size; ++k) {
        store_element(d_weight.data(), d_weight.dtype(), n * size + k, sums[static_cast<size_t>(k)]);
      }
    }
  }
  if (args.d_bias) {
    for (int64_t n = 0; n < outputs; ++n) {
      float& d_bias = args.d_bias.f32()[n];
      double sum = static_cast<double>(d_bias);
      for (int64_t m = 0; m < rows; ++m) sum += static_cast<double>(d_y.row<float>(m)[n]);
      d_bias = static_cast<float>(sum);
      interrupt.advance(rows + 1);
    }
  }
}

}  // namespace llama_ext::reference
