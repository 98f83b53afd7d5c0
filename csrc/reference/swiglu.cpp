#include <cmath>

#include "reference/interrupt_poll.h"
#include "reference/reference_ops.h"

namespace llama_ext::reference {
namespace {

double sigmoid(double z) { return 1.0 / (1.0 + std::exp(-z)); }

}  // namespace

void ReferenceBackend::swiglu(const SwigluArgs& args) {
  check(args);
  const int64_t width = args.gate.dim(1);
  InterruptPoll interrupt;
  for (int64_t m = 0; m < args.gate.rows(); ++m) {
    interrupt.advance(2 * width + 1);
    for (int64_t f = 0; f < width; ++f) {
      const double gate = static_cast<double>(args.gate.row<float>(m)[f]);
      const double up = static_cast<double>(args.up.row<float>(m)[f]);
      args.y.row<float>(m)[f] = static_cast<float>(gate * sigmoid(gate) * up);
    }
  }
}

void ReferenceBackend::swiglu_backward(const SwigluBackwardArgs& args) {
  check(args);
  const int64_t width = args.gate.dim(1);
  InterruptPoll interrupt;
  for (int64_t m = 0; m < args.gate.rows(); ++m) {
    interrupt.advance(6 * width + 1);
    for (int64_t f = 0; f < width; ++f) {
      const double gate = static_cast<double>(args.gate.row<float>(m)[f]);
      const double up = static_cast<double>(args.up.row<float>(m)[f]);
      const double d_y = static_cast<double>(args.d_y.row<float>(m)[f]);
      const double s = sigmoid(gate);
      args.d_gate.row<float>(m)[f] = static_cast<float>(d_y * up * s * (1.0 + gate * (1.0 - s)));
      args.d_up.row<float>(m)[f] = static_cast<float>(d_y * gate * s);
      if (args.y) args.y.row<float>(m)[f] = static_cast<float>(gate * s * up);
    }
  }
}

}  // namespace llama_ext::reference
