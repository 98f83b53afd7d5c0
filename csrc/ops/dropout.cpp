#include "ops/dropout.h"

#include <cmath>

#include "ops/argument_checks.h"

namespace llama_ext {

void require_dropout(double p, std::string_view op) {
  require(p >= 0.0 && p < 1.0, ErrorKind::kOption, op, ": the probability of dropout must be in [0, 1), got ", p);
}

void check(const DropoutArgs& args) {
  require_dropout(args.p, "dropout");
  // Kernels multiply by it in float32, where infinity would make NaN of 0.
  require(std::isfinite(static_cast<float>(args.scale / (1.0 - args.p))), ErrorKind::kOption,
          "dropout: scale must be finite in float32, and so must scale / (1 - p), got ", args.scale);
  require_tensor(args.x, DType::kF32, {-1, -1}, Rows::kStrided, "dropout", "x");
  require_tensor(args.y, DType::kF32, {args.x.dim(0), args.x.dim(1)}, Rows::kStrided, "dropout", "y");
  if (args.accumulate) {
    require_disjoint(args.y, args.x, "dropout", "y", "x");
  } else {
    require_same_or_disjoint(args.y, args.x, "dropout", "y", "x");
  }
}

}  // namespace llama_ext
