#include "ops/cross_entropy.h"

#include <cmath>

#include "ops/argument_checks.h"

namespace llama_ext {

void check(const CrossEntropyArgs& args) {
  require_tensor(args.logits, DType::kF32, {-1, -1}, Rows::kStrided, "cross_entropy", "logits");
  const int64_t rows = args.logits.dim(0);
  const int64_t vocabulary = args.logits.dim(1);
  require_tensor(args.labels, DType::kI32, {rows}, Rows::kContiguous, "cross_entropy", "labels");
  require_tensor(args.losses, DType::kF32, {rows}, Rows::kContiguous, "cross_entropy", "losses");
  require_disjoint(args.losses, args.logits, "cross_entropy", "losses", "logits");
  require_disjoint(args.losses, args.labels, "cross_entropy", "losses", "labels");
  if (args.hits || args.hits.rank() != 0) {
    require_tensor(args.hits, DType::kF32, {rows}, Rows::kContiguous, "cross_entropy", "hits");
    require_disjoint(args.hits, args.logits, "cross_entropy", "hits", "logits");
    require_disjoint(args.hits, args.labels, "cross_entropy", "hits", "labels");
    require_disjoint(args.hits, args.losses, "cross_entropy", "hits", "losses");
  }
  const int32_t* labels = static_cast<const int32_t*>(args.labels.data());
  for (int64_t t = 0; t < rows; ++t) {
    require(labels[t] == kIgnoreLabel || (labels[t] >= 0 && labels[t] < vocabulary), ErrorKind::kTokenId,
            "cross_entropy: label ", labels[t], " at index ", t, " must be in [0, ", vocabulary, ") or ", kIgnoreLabel,
            " (ignored)");
  }
}

void check(const CrossEntropyBackwardArgs& args) {
  check(CrossEntropyArgs{.logits = args.logits, .labels = args.labels, .losses = args.losses});
  require(std::isfinite(static_cast<float>(args.scale)), ErrorKind::kOption,
          "cross_entropy_backward: scale must be finite in float32, got ", args.scale);
}

}  // namespace llama_ext
