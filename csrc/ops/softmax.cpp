#include "ops/softmax.h"

#include "ops/argument_checks.h"

namespace llama_ext {

void check(const SoftmaxArgs& args) {
  require_tensor(args.x, DType::kF32, {-1, -1}, Rows::kStrided, "softmax", "x");
  require_tensor(args.y, DType::kF32, {args.x.dim(0), args.x.dim(1)}, Rows::kStrided, "softmax", "y");
  require_same_or_disjoint(args.y, args.x, "softmax", "y", "x");
}

}  // namespace llama_ext
