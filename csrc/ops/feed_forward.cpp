#include "ops/feed_forward.h"

#include "ops/argument_checks.h"

namespace llama_ext {

void check(const FeedForwardArgs& args) {
  const Matrix& down = require_present(args.down, "feed_forward", "down");
  const bool is_split = args.gate_up == nullptr && args.gate != nullptr;
  const Matrix& first = is_split ? *args.gate : require_present(args.gate_up, "feed_forward", "gate_up");
  require_tensor(args.x, DType::kF32, {-1, first.cols()}, Rows::kStrided, "feed_forward", "x");
  check(args.norm, args.x, "feed_forward");
  if (is_split) {
    const Matrix& up = require_present(args.up, "feed_forward", "up");
    require_matrix_shape(*args.gate, down.cols(), first.cols(), "feed_forward", "gate");
    require_matrix_shape(up, down.cols(), first.cols(), "feed_forward", "up");
    require_optional_vector(args.gate_bias, down.cols(), "feed_forward", "gate_bias");
    require_optional_vector(args.up_bias, down.cols(), "feed_forward", "up_bias");
  } else {
    require(args.gate == nullptr && args.up == nullptr, ErrorKind::kOption,
            "feed_forward: either gate_up, or gate and up");
    require_matrix_shape(first, gate_up_size(down.cols()), first.cols(), "feed_forward", "gate_up");
    require_optional_vector(args.gate_up_bias, first.rows(), "feed_forward", "gate_up_bias");
  }
  require_matrix_shape(down, first.cols(), down.cols(), "feed_forward", "down");
  require_optional_vector(args.down_bias, down.rows(), "feed_forward", "down_bias");
  require_tensor(args.y, DType::kF32, {args.x.rows(), down.rows()}, Rows::kStrided, "feed_forward", "y");
  require_same_or_disjoint(args.y, args.x, "feed_forward", "y", "x");
}

}  // namespace llama_ext
