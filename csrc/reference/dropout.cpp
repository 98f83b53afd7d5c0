#include "reference/reference_ops.h"

namespace llama_ext::reference {

void ReferenceBackend::dropout(const DropoutArgs& args) {
  check(args);
  const int64_t width = args.x.dim(1);
  const uint32_t threshold = dropout_threshold(args.p);
  for (int64_t m = 0; m < args.x.rows(); ++m) {
    for (int64_t n = 0; n < width; ++n) {
      const bool keep = dropout_bits(args.seed, static_cast<uint64_t>(m * width + n)) >= threshold;
      const double x = keep ? args.scale * static_cast<double>(args.x.row<float>(m)[n]) / (1.0 - args.p) : 0.0;
      float& y = args.y.row<float>(m)[n];
      y = static_cast<float>(args.accumulate ? static_cast<double>(y) + x : x);
    }
  }
}

}  // namespace llama_ext::reference
