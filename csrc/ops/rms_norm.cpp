#include "ops/rms_norm.h"

#include <cmath>

#include "ops/argument_checks.h"

namespace llama_ext {

namespace {

/// As kernels use it: what is 0 in float32 would make NaN of a row of zeros.
void require_eps(double eps, const char* op) {
  const auto rounded = static_cast<float>(eps);
  require(std::isfinite(rounded) && rounded > 0, ErrorKind::kOption, op,
          ": eps must be a number above 0 in float32, got ", eps);
}

}  // namespace

void check(const InputNorm& norm, const TensorView& x, const char* op) {
  if (!norm && norm.weight.rank() == 0) return;
  require_vector(norm.weight, x.dim(1), op, "the norm's weight");
  require_eps(norm.eps, op);
}

void check(const RmsNormArgs& args) {
  require_tensor(args.x, DType::kF32, {-1, -1}, Rows::kStrided, "rms_norm", "x");
  const int64_t rows = args.x.dim(0);
  const int64_t width = args.x.dim(1);
  require_vector(args.weight, width, "rms_norm", "weight");
  require_eps(args.eps, "rms_norm");
  require_tensor(args.y, DType::kF32, {rows, width}, Rows::kStrided, "rms_norm", "y");
  require_same_or_disjoint(args.y, args.x, "rms_norm", "y", "x");
  if (args.inv_rms || args.inv_rms.rank() != 0) {
    require_tensor(args.inv_rms, DType::kF32, {rows}, Rows::kContiguous, "rms_norm", "inv_rms");
    // Whoever saves inv_rms is going to run the backward, which needs x as it was.
    require_disjoint(args.y, args.x, "rms_norm", "y", "x when inv_rms is saved for the backward");
    require_disjoint(args.inv_rms, args.x, "rms_norm", "inv_rms", "x");
    require_disjoint(args.inv_rms, args.y, "rms_norm", "inv_rms", "y");
  }
}

void check(const RmsNormBackwardArgs& args) {
  const char* op = "rms_norm_backward";
  require_tensor(args.x, DType::kF32, {-1, -1}, Rows::kStrided, op, "x");
  const int64_t rows = args.x.dim(0);
  const int64_t width = args.x.dim(1);
  require_vector(args.weight, width, op, "weight");
  require_eps(args.eps, op);
  require_tensor(args.d_y, DType::kF32, {rows, width}, Rows::kStrided, op, "d_y");
  require_tensor(args.d_x, DType::kF32, {rows, width}, Rows::kStrided, op, "d_x");
  require_disjoint(args.d_x, args.x, op, "d_x", "x");
  if (args.accumulate) {
    require_disjoint(args.d_x, args.d_y, op, "d_x", "d_y");
  } else {
    require_same_or_disjoint(args.d_x, args.d_y, op, "d_x", "d_y");
  }
  require_optional_vector(args.d_weight, width, op, "d_weight");
}

}  // namespace llama_ext
