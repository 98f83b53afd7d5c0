#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "reference/interrupt_poll.h"
#include "reference/reference_ops.h"
#include "reference/storage.h"

namespace llama_ext::reference {
namespace {

/// One head of one token: y = softmax(scale * q . keys) values over keys [0, count).
struct HeadAttention {
  const ReferenceKvCache& cache;
  int64_t first;  // element of this head at position 0
  double scale;
  std::vector<double> weights;
  std::vector<double> sums;

  HeadAttention(const ReferenceKvCache& kv_cache, int64_t first_element, double score_scale)
      : cache(kv_cache),
        first(first_element),
        scale(score_scale),
        sums(static_cast<size_t>(kv_cache.shape().head_dim)) {}

  void operator()(const float* q, int64_t count, float* y) {
    const KvCacheShape& shape = cache.shape();
    const int64_t stride = shape.kv_heads * shape.head_dim;
    weights.resize(static_cast<size_t>(count));
    double largest = -std::numeric_limits<double>::infinity();
    for (int64_t j = 0; j < count; ++j) {
      double score = 0;
      for (int64_t d = 0; d < shape.head_dim; ++d) {
        score += static_cast<double>(q[d]) *
                 load_element(cache.keys(), kv_storage_dtype(shape.dtype), first + j * stride + d);
      }
      weights[static_cast<size_t>(j)] = scale * score;
      largest = std::max(largest, scale * score);
    }
    double total = 0;
    std::fill(sums.begin(), sums.end(), 0.0);
    for (int64_t j = 0; j < count; ++j) {
      const double weight = std::exp(weights[static_cast<size_t>(j)] - largest);
      total += weight;
      for (int64_t d = 0; d < shape.head_dim; ++d) {
        sums[static_cast<size_t>(d)] +=
            weight * load_element(cache.values(), kv_storage_dtype(shape.dtype), first + j * stride + d);
      }
    }
    for (int64_t d = 0; d < shape.head_dim; ++d) y[d] = static_cast<float>(sums[static_cast<size_t>(d)] / total);
  }
};

}  // namespace

void ReferenceBackend::attention(const AttentionArgs& args) {
  check(args);
  const int64_t heads = args.q.dim(1);
  const int64_t head_dim = args.q.dim(2);
  InterruptPoll interrupt;
  for (const KvSegment& segment : args.segments) {
    const ReferenceKvCache& cache = own(*segment.cache, "attention");
    for (int64_t h = 0; h < heads; ++h) {
      const int64_t kv_head = h / (heads / cache.shape().kv_heads);
      HeadAttention attend(cache, cache.offset(args.layer, 0) + kv_head * head_dim, args.scale);
      for (int64_t t = 0; t < segment.tokens; ++t) {
        const int64_t row = segment.row + t;
        const int64_t visible = segment.position + t + 1;
        attend(args.q.row<float>(row) + h * head_dim, visible, args.y.row<float>(row) + h * head_dim);
        interrupt.advance(2 * visible * head_dim + 1);
      }
    }
  }
}

}  // namespace llama_ext::reference
