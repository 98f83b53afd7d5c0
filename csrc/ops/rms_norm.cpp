#include "ops/rms_norm.h"

#include <cmath>

#include "ops/argument_checks.h"

namespace llama_ext {

void check(const RmsNormArgs& args) {
  require_tensor(args.x, DType::kF32, {-1, -1}, Rows::kStrided, "rms_norm", "x");
  const int64_t rows = args.x.dim(0);
  const int64_t width = args.x.dim(1);
  require_vector(args.weight, width, "rms_norm", "weight");
  require(std::isfinite(args.eps) && args.eps > 0, ErrorKind::kOption, "rms_norm: eps must be a number above 0, got ",
          args.eps);
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

}  // namespace llama_ext
