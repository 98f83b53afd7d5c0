#include "ops/optimizer.h"

#include <cmath>

#include "ops/argument_checks.h"

namespace llama_ext {
namespace {

void require_flat(const TensorView& view, int64_t size, const char* op, const char* what) {
  require_tensor(view, DType::kF32, {size}, Rows::kContiguous, op, what);
}

/// As kernels use it: infinity would make NaN of a gradient of 0.
void require_finite(double value, const char* op, const char* what) {
  require(std::isfinite(static_cast<float>(value)), ErrorKind::kOption, op, ": ", what,
          " must be finite in float32, got ", value);
}

void require_fraction(double value, const char* op, const char* what) {
  require(value >= 0.0 && value < 1.0, ErrorKind::kOption, op, ": ", what, " must be in [0, 1), got ", value);
}

}  // namespace

void check(const AdamArgs& args) {
  const char* op = "adam";
  require_flat(args.parameter, -1, op, "parameter");
  const int64_t size = args.parameter.dim(0);
  require_flat(args.gradient, size, op, "gradient");
  require_flat(args.first, size, op, "first");
  require_flat(args.second, size, op, "second");
  require_finite(args.gradient_scale, op, "gradient_scale");
  require_finite(args.lr, op, "lr");
  require_finite(args.decay, op, "decay");
  require_fraction(args.beta1, op, "beta1");
  require_fraction(args.beta2, op, "beta2");
  const auto eps = static_cast<float>(args.eps);
  require(std::isfinite(eps) && (eps > 0.0f || args.eps == 0.0), ErrorKind::kOption, op,
          ": eps must be 0, or a number above 0 in float32, got ", args.eps);
  require(args.step >= 1, ErrorKind::kOption, op, ": step counts from 1, got ", args.step);
  // What kernels take in place of lr.
  require_finite(args.lr / (1.0 - std::pow(args.beta1, static_cast<double>(args.step))), op, "lr / (1 - beta1^step)");
  if (args.decoupled) require_finite(args.lr * args.decay, op, "lr times decay");
}

void check(const SgdArgs& args) {
  const char* op = "sgd";
  require_flat(args.parameter, -1, op, "parameter");
  const int64_t size = args.parameter.dim(0);
  require_flat(args.gradient, size, op, "gradient");
  require_finite(args.gradient_scale, op, "gradient_scale");
  require_finite(args.lr, op, "lr");
  require_finite(args.decay, op, "decay");
  require_fraction(args.momentum, op, "momentum");
  if (args.momentum != 0.0 || args.velocity || args.velocity.rank() != 0)
    require_flat(args.velocity, size, op, "velocity");
}

}  // namespace llama_ext
