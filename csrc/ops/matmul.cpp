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

void check(const MatmulBackwardArgs& args) {
  const char* op = "matmul_backward";
  require_tensor(args.d_y, DType::kF32, {-1, -1}, Rows::kStrided, op, "d_y");
  const int64_t rows = args.d_y.dim(0);
  const int64_t outputs = args.d_y.dim(1);
  if (args.d_x || args.d_x.rank() != 0) {
    const Matrix& weight = require_present(args.weight, op, "weight, which d_x needs,");
    require_matrix_shape(weight, outputs, weight.cols(), op, "weight");
    require_tensor(args.d_x, DType::kF32, {rows, weight.cols()}, Rows::kStrided, op, "d_x");
    require_disjoint(args.d_x, args.d_y, op, "d_x", "d_y");
  }
  if (args.d_weight != nullptr) {
    require_matrix_shape(*args.d_weight, outputs, args.d_weight->cols(), op, "d_weight");
    require(args.d_weight->type() == WeightType{Encoding::kF32}, ErrorKind::kDType, op,
            ": d_weight must be float32, got ", args.d_weight->type().text());
    require_tensor(args.x, DType::kF32, {rows, args.d_weight->cols()}, Rows::kStrided, op, "x");
  }
  require_optional_vector(args.d_bias, outputs, op, "d_bias");
  if (args.d_bias) require_disjoint(args.d_bias, args.d_y, op, "d_bias", "d_y");
}

void check(std::span<const MatmulBackwardArgs> all) {
  for (size_t i = 0; i < all.size(); ++i) {
    check(all[i]);
    require(!all[i].d_x, ErrorKind::kShape, "weights_backward: product ", i, " has a d_x, which it does not make");
    for (size_t j = 0; j < i; ++j) {
      require(all[i].d_weight == nullptr || all[i].d_weight != all[j].d_weight, ErrorKind::kShape,
              "weights_backward: products ", j, " and ", i, " have the same d_weight");
      if (all[i].d_bias && all[j].d_bias)
        require_disjoint(all[i].d_bias, all[j].d_bias, "weights_backward", "d_bias", "another d_bias");
    }
  }
}

}  // namespace llama_ext
