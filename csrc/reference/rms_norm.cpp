#include <cmath>
#include <vector>

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

void ReferenceBackend::rms_norm_backward(const RmsNormBackwardArgs& args) {
  check(args);
  const int64_t width = args.x.dim(1);
  const auto weight = [&](int64_t c) { return static_cast<double>(args.weight.f32()[c]); };
  std::vector<double> d_weight(static_cast<size_t>(width));
  InterruptPoll interrupt;
  for (int64_t row = 0; row < args.x.rows(); ++row) {
    interrupt.advance(4 * width + 1);
    const auto x = [&](int64_t c) { return static_cast<double>(args.x.row<float>(row)[c]); };
    const auto d_y = [&](int64_t c) { return static_cast<double>(args.d_y.row<float>(row)[c]); };
    double squares = 0;
    double dots = 0;
    for (int64_t c = 0; c < width; ++c) {
      squares += x(c) * x(c);
      dots += weight(c) * d_y(c) * x(c);
    }
    const double count = static_cast<double>(width);  // no element divides by 0
    const double inv_rms = 1.0 / std::sqrt(squares / count + args.eps);
    const double mean = dots / count;
    for (int64_t c = 0; c < width; ++c) {
      // Before d_x is written, which may be d_y.
      d_weight[static_cast<size_t>(c)] += d_y(c) * x(c) * inv_rms;
      const double gradient = inv_rms * (weight(c) * d_y(c) - x(c) * inv_rms * inv_rms * mean);
      float& d_x = args.d_x.row<float>(row)[c];
      d_x = static_cast<float>(args.accumulate ? static_cast<double>(d_x) + gradient : gradient);
    }
  }
  if (!args.d_weight) return;
  for (int64_t c = 0; c < width; ++c) {
    float& sum = args.d_weight.f32()[c];
    sum = static_cast<float>(static_cast<double>(sum) + d_weight[static_cast<size_t>(c)]);
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
