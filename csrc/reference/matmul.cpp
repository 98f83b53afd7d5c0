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

}  // namespace llama_ext::reference
