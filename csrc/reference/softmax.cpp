#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "reference/interrupt_poll.h"
#include "reference/reference_ops.h"

namespace llama_ext::reference {

void ReferenceBackend::softmax(const SoftmaxArgs& args) {
  check(args);
  const int64_t size = args.x.dim(1);
  std::vector<double> terms(static_cast<size_t>(size));
  InterruptPoll interrupt;
  for (int64_t row = 0; row < args.x.rows(); ++row) {
    interrupt.advance(size + 1);
    const float* x = args.x.row<float>(row);
    float* y = args.y.row<float>(row);
    double largest = -std::numeric_limits<double>::infinity();
    for (int64_t i = 0; i < size; ++i) largest = std::max(largest, static_cast<double>(x[i]));
    // inf - inf is NaN: a row with +inf, or with nothing but -inf, becomes NaN through the sum, as one with a NaN does.
    double sum = 0;
    for (int64_t i = 0; i < size; ++i) {
      terms[static_cast<size_t>(i)] = std::exp(static_cast<double>(x[i]) - largest);
      sum += terms[static_cast<size_t>(i)];
    }
    for (int64_t i = 0; i < size; ++i) y[i] = static_cast<float>(terms[static_cast<size_t>(i)] / sum);
  }
}

}  // namespace llama_ext::reference
