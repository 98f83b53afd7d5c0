#include "reference/reference_ops.h"

namespace llama_ext::reference {

void ReferenceBackend::rope(const RopeArgs& args) {
  check(args);
  const int64_t heads = args.x.dim(1);
  const int64_t head_dim = args.x.dim(2);
  const int64_t half = head_dim / 2;
  for (int64_t t = 0; t < args.x.rows(); ++t) {
    for (int64_t h = 0; h < heads; ++h) {
      float* x = args.x.row<float>(t) + h * head_dim;
      for (int64_t i = 0; i < half; ++i) {
        const double cos = static_cast<double>(args.cos.row<float>(t)[i]);
        const double angle_sin = static_cast<double>(args.sin.row<float>(t)[i]);
        const double sin = args.inverse ? -angle_sin : angle_sin;
        const double first = static_cast<double>(x[i]);
        const double second = static_cast<double>(x[i + half]);
        x[i] = static_cast<float>(first * cos - second * sin);
        x[i + half] = static_cast<float>(second * cos + first * sin);
      }
    }
  }
}

}  // namespace llama_ext::reference
