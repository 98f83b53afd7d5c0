#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "reference/interrupt_poll.h"
#include "reference/reference_ops.h"

namespace llama_ext::reference {
namespace {

/// What the dropout of one weight multiplies it by.
double dropout_factor(double p, uint64_t seed, int64_t row, int64_t heads, int64_t head, int64_t key) {
  if (p == 0.0) return 1.0;
  const uint64_t index = static_cast<uint64_t>((row * heads + head) * kMostAttentionTokens + key);
  return dropout_bits(seed, index) >= dropout_threshold(p) ? 1.0 / (1.0 - p) : 0.0;
}

double dot(const float* a, const float* b, int64_t size) {
  double sum = 0;
  for (int64_t d = 0; d < size; ++d) sum += static_cast<double>(a[d]) * static_cast<double>(b[d]);
  return sum;
}

void add_scaled(double factor, const float* x, int64_t size, double* sum) {
  for (int64_t d = 0; d < size; ++d) sum[d] += factor * static_cast<double>(x[d]);
}

/// Where a head of a row begins.
float* head_of(const TensorView& view, int64_t row, int64_t head) { return view.row<float>(row) + head * view.dim(2); }

/// The rows of one sequence of a gradient in float64, which are written when nobody reads what may lie in their place.
class Gradient {
 public:
  Gradient(const TensorView& target, const RowRange& range)
      : target_(target), range_(range), sums_(static_cast<size_t>(range.tokens * target.inner_size())) {}
  double* head(int64_t token, int64_t head) {
    return sums_.data() + token * target_.inner_size() + head * target_.dim(2);
  }
  void write() const {
    const int64_t size = target_.inner_size();
    for (int64_t t = 0; t < range_.tokens; ++t) {
      std::transform(sums_.begin() + t * size, sums_.begin() + (t + 1) * size, target_.row<float>(range_.row + t),
                     [](double sum) { return static_cast<float>(sum); });
    }
  }

 private:
  const TensorView& target_;
  const RowRange& range_;
  std::vector<double> sums_;
};

}  // namespace

void ReferenceBackend::causal_attention(const CausalAttentionArgs& args) {
  check(args);
  const int64_t heads = args.q.dim(1);
  const int64_t head_dim = args.q.dim(2);
  const int64_t group = heads / args.k.dim(1);
  std::vector<double> weights;
  std::vector<double> sums(static_cast<size_t>(head_dim));
  InterruptPoll interrupt;
  for (const RowRange& range : args.sequences) {
    for (int64_t i = 0; i < range.tokens; ++i) {
      const int64_t row = range.row + i;
      for (int64_t h = 0; h < heads; ++h) {
        interrupt.advance(2 * (i + 1) * head_dim + 1);
        weights.clear();
        for (int64_t j = 0; j <= i; ++j) {
          const float* key = head_of(args.k, range.row + j, h / group);
          weights.push_back(args.scale * dot(head_of(args.q, row, h), key, head_dim));
        }
        const double largest = *std::max_element(weights.begin(), weights.end());
        double total = 0;
        std::fill(sums.begin(), sums.end(), 0.0);
        for (int64_t j = 0; j <= i; ++j) {
          const double weight = std::exp(weights[static_cast<size_t>(j)] - largest);
          total += weight;
          add_scaled(weight * dropout_factor(args.dropout, args.seed, row, heads, h, j),
                     head_of(args.v, range.row + j, h / group), head_dim, sums.data());
        }
        float* y = head_of(args.y, row, h);
        for (int64_t d = 0; d < head_dim; ++d) y[d] = static_cast<float>(sums[static_cast<size_t>(d)] / total);
        args.log_sums.row<float>(row)[h] = static_cast<float>(largest + std::log(total));
      }
    }
  }
}

void ReferenceBackend::causal_attention_backward(const CausalAttentionBackwardArgs& args) {
  check(args);
  const int64_t heads = args.q.dim(1);
  const int64_t head_dim = args.q.dim(2);
  const int64_t group = heads / args.k.dim(1);
  InterruptPoll interrupt;
  for (const RowRange& range : args.sequences) {
    Gradient d_q(args.d_q, range);
    Gradient d_k(args.d_k, range);
    Gradient d_v(args.d_v, range);
    for (int64_t i = 0; i < range.tokens; ++i) {
      const int64_t row = range.row + i;
      for (int64_t h = 0; h < heads; ++h) {
        interrupt.advance(5 * (i + 1) * head_dim + 1);
        const float* q = head_of(args.q, row, h);
        const float* d_y = head_of(args.d_y, row, h);
        const double log_sum = static_cast<double>(args.log_sums.row<float>(row)[h]);
        const double delta = dot(d_y, head_of(args.y, row, h), head_dim);
        for (int64_t j = 0; j <= i; ++j) {
          const float* k = head_of(args.k, range.row + j, h / group);
          const float* v = head_of(args.v, range.row + j, h / group);
          const double p = std::exp(args.scale * dot(q, k, head_dim) - log_sum);
          const double factor = dropout_factor(args.dropout, args.seed, row, heads, h, j);
          const double d_score = args.scale * p * (factor * dot(d_y, v, head_dim) - delta);
          add_scaled(d_score, k, head_dim, d_q.head(i, h));
          add_scaled(d_score, q, head_dim, d_k.head(j, h / group));
          add_scaled(factor * p, d_y, head_dim, d_v.head(j, h / group));
        }
      }
    }
    d_q.write();
    d_k.write();
    d_v.write();
  }
}

}  // namespace llama_ext::reference
