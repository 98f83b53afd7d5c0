#include "ops/matmul.h"

#include "ops/argument_checks.h"

namespace llama_ext {

void check(const MatmulArgs& args) {
  const Matrix& weight = require_present(args.weight, "matmul", "weight");
  require_tensor(args.x, DType::kF32, {-1, weight.cols()}, Rows::kStrided, "matmul", "x");
  check(args.norm, args.x, "matmul");
  require_optional_vector(args.bias, weight.rows(), "matmul", "bias");
  require_tensor(args.y, DType::kF32, {args.x.rows(), weight.rows()}, Rows::kStrided, "matmul", "y");
  require_disjoint(args.y, args.x, "matmul", "y", "x");
  if (args.bias) require_disjoint(args.y, args.bias, "matmul", "y", "bias");
}

}  // namespace llama_ext
