#include "ops/feed_forward.h"

#include "ops/argument_checks.h"

namespace llama_ext {

void check(const FeedForwardArgs& args) {
  const Matrix& gate_up = require_present(args.gate_up, "feed_forward", "gate_up");
  const Matrix& down = require_present(args.down, "feed_forward", "down");
  require_tensor(args.x, DType::kF32, {-1, gate_up.cols()}, Rows::kStrided, "feed_forward", "x");
  require_matrix_shape(gate_up, gate_up_size(down.cols()), gate_up.cols(), "feed_forward", "gate_up");
  require_matrix_shape(down, gate_up.cols(), down.cols(), "feed_forward", "down");
  require_optional_vector(args.gate_up_bias, gate_up.rows(), "feed_forward", "gate_up_bias");
  require_optional_vector(args.down_bias, down.rows(), "feed_forward", "down_bias");
  require_tensor(args.y, DType::kF32, {args.x.rows(), down.rows()}, Rows::kStrided, "feed_forward", "y");
  require_disjoint(args.y, args.x, "feed_forward", "y", "x");
}

}  // namespace llama_ext
