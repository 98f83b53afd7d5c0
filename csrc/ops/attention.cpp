#include "ops/attention.h"

#include <cmath>

#include "ops/argument_checks.h"

namespace llama_ext {
void check(const AttentionArgs& args) {
  require_tensor(args.q, DType::kF32, {-1, -1, -1}, Rows::kStrided, "attention", "q");
  require_tensor(args.y, DType::kF32, {args.q.dim(0), args.q.dim(1), args.q.dim(2)}, Rows::kStrided, "attention", "y");
  require_disjoint(args.y, args.q, "attention", "y", "q");
  require(std::isfinite(static_cast<float>(args.scale)), ErrorKind::kOption,
          "attention: scale must be finite in float32, got ", args.scale);
  check_segments(args.segments, args.layer, args.q.rows(), args.q.dim(2), "attention");
  if (args.segments.empty()) return;
  const int64_t heads = args.q.dim(1);
  const int64_t kv_heads = args.segments.front().cache->shape().kv_heads;
  require(kv_heads > 0 ? heads % kv_heads == 0 : heads == 0, ErrorKind::kShape, "attention: ", heads,
          " heads of q are not a multiple of the ", kv_heads, " key/value heads in the caches");
}

void check_projection(const AttentionArgs& args, const TensorView& x) {
  require_shape(x, {args.y.dim(0), args.y.dim(1) * args.y.dim(2)}, "attend_and_project", "the product's x");
  require(x.data() == args.y.data() && x.row_stride() == args.y.row_stride(), ErrorKind::kShape,
          "attend_and_project: the product's x must be what attention gives");
}

}  // namespace llama_ext
