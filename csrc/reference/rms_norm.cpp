#include <cmath>

#include "reference/interrupt_poll.h"
#include "reference/reference_ops.h"

namespace llama_ext::reference {

void ReferenceBackend::rms_norm(const RmsNormArgs& args) {
  check(args);
  const int64_t width = args.x.dim(1);
  const float* weight = args.weight.f32();
  InterruptPoll interrupt;
  for (int64_t row = 0; row < args.x.rows(); ++row) {
    interrupt.advance(width + 1);
    const float* x = args.x.row<float>(row);
    float* y = args.y.row<float>(row);
    double squares = 0;
    for (int64_t c = 0; c < width; ++c) squares += static_cast<double>(x[c]) * static_cast<double>(x[c]);
    const double mean = width > 0 ? squares / static_cast<double>(width) : 0.0;
    const double inv_rms = 1.0 / std::sqrt(mean + args.eps);
    for (int64_t c = 0; c < width; ++c) {
      y[c] = static_cast<float>(static_cast<double>(x[c]) * inv_rms * static_cast<double>(weight[c]));
    }
    if (args.inv_rms) args.inv_rms.f32()[row] = static_cast<float>(inv_rms);
  }
}

TensorView ReferenceBackend::normalized(const InputNorm& norm, const TensorView& x, std::vector<float>& memory) {
  if (!norm) return x;
  memory.resize(static_cast<size_t>(x.size()));
  const TensorView y(memory.data(), DType::kF32, {x.rows(), x.dim(1)});
  rms_norm({.x = x, .weight = norm.weight, .eps = norm.eps, .y = y, .inv_rms = {}});
  return y;
}

}  // namespace llama_ext::reference
