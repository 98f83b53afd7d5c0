#include <algorithm>
#include <cmath>
#include <limits>

#include "reference/interrupt_poll.h"
#include "reference/reference_ops.h"

namespace llama_ext::reference {

void ReferenceBackend::cross_entropy(const CrossEntropyArgs& args) {
  check(args);
  const int64_t vocabulary = args.logits.dim(1);
  const int32_t* labels = static_cast<const int32_t*>(args.labels.data());
  InterruptPoll interrupt;
  for (int64_t t = 0; t < args.logits.rows(); ++t) {
    interrupt.advance(vocabulary + 1);
    float& loss = args.losses.f32()[t];
    if (args.hits) args.hits.f32()[t] = 0.0f;
    if (labels[t] == kIgnoreLabel) {
      loss = 0.0f;
      continue;
    }
    const float* logits = args.logits.row<float>(t);
    if (args.hits && std::max_element(logits, logits + vocabulary) == logits + labels[t]) args.hits.f32()[t] = 1.0f;
    double largest = -std::numeric_limits<double>::infinity();
    for (int64_t v = 0; v < vocabulary; ++v) largest = std::max(largest, static_cast<double>(logits[v]));
    double sum = 0;
    for (int64_t v = 0; v < vocabulary; ++v) sum += std::exp(static_cast<double>(logits[v]) - largest);
    loss = static_cast<float>(largest - static_cast<double>(logits[labels[t]]) + std::log(sum));
  }
}

void ReferenceBackend::cross_entropy_backward(const CrossEntropyBackwardArgs& args) {
  check(args);
  cross_entropy({.logits = args.logits, .labels = args.labels, .losses = args.losses});
  const int64_t vocabulary = args.logits.dim(1);
  const int32_t* labels = static_cast<const int32_t*>(args.labels.data());
  InterruptPoll interrupt;
  for (int64_t t = 0; t < args.logits.rows(); ++t) {
    interrupt.advance(2 * vocabulary + 1);
    float* logits = args.logits.row<float>(t);
    if (labels[t] == kIgnoreLabel) {
      std::fill_n(logits, vocabulary, 0.0f);
      continue;
    }
    const double largest = static_cast<double>(*std::max_element(logits, logits + vocabulary));
    double sum = 0;
    for (int64_t v = 0; v < vocabulary; ++v) sum += std::exp(static_cast<double>(logits[v]) - largest);
    for (int64_t v = 0; v < vocabulary; ++v) {
      const double p = std::exp(static_cast<double>(logits[v]) - largest) / sum;
      logits[v] = static_cast<float>(args.scale * (p - (v == labels[t] ? 1.0 : 0.0)));
    }
  }
}

}  // namespace llama_ext::reference
