#include <cmath>

#include "reference/interrupt_poll.h"
#include "reference/reference_ops.h"

namespace llama_ext::reference {

void ReferenceBackend::adam(const AdamArgs& args) {
  check(args);
  const double step = static_cast<double>(args.step);
  const double first_correction = 1.0 - std::pow(args.beta1, step);
  const double second_correction = 1.0 - std::pow(args.beta2, step);
  InterruptPoll interrupt;
  for (int64_t i = 0; i < args.parameter.rows(); ++i) {
    interrupt.advance(12);
    double parameter = static_cast<double>(args.parameter.f32()[i]);
    double gradient = args.gradient_scale * static_cast<double>(args.gradient.f32()[i]);
    if (args.decoupled) {
      parameter *= 1.0 - args.lr * args.decay;
    } else {
      gradient += args.decay * parameter;
    }
    const double first = args.beta1 * static_cast<double>(args.first.f32()[i]) + (1.0 - args.beta1) * gradient;
    const double second =
        args.beta2 * static_cast<double>(args.second.f32()[i]) + (1.0 - args.beta2) * gradient * gradient;
    parameter -= args.lr * (first / first_correction) / (std::sqrt(second / second_correction) + args.eps);
    args.parameter.f32()[i] = static_cast<float>(parameter);
    args.first.f32()[i] = static_cast<float>(first);
    args.second.f32()[i] = static_cast<float>(second);
  }
}

void ReferenceBackend::sgd(const SgdArgs& args) {
  check(args);
  InterruptPoll interrupt;
  for (int64_t i = 0; i < args.parameter.rows(); ++i) {
    interrupt.advance(6);
    const double parameter = static_cast<double>(args.parameter.f32()[i]);
    const double gradient = args.gradient_scale * static_cast<double>(args.gradient.f32()[i]) + args.decay * parameter;
    double velocity = gradient;
    if (args.velocity) {
      velocity += args.momentum * static_cast<double>(args.velocity.f32()[i]);
      args.velocity.f32()[i] = static_cast<float>(velocity);
    }
    const double direction = args.nesterov ? gradient + args.momentum * velocity : velocity;
    args.parameter.f32()[i] = static_cast<float>(parameter - args.lr * direction);
  }
}

double ReferenceBackend::sum_of_squares(const TensorView& x) {
  require_shape(x, {-1}, "sum_of_squares", "x");
  require_dtype(x, DType::kF32, "sum_of_squares", "x");
  require(x.is_contiguous(), ErrorKind::kShape, "sum_of_squares: x must be contiguous");
  double sum = 0;
  for (int64_t i = 0; i < x.rows(); ++i) sum += static_cast<double>(x.f32()[i]) * static_cast<double>(x.f32()[i]);
  return sum;
}

}  // namespace llama_ext::reference
