// Steps of optimisers and the norm of gradients: one pass over memory, in chunks.
#include <algorithm>
#include <cmath>

#include "cpu/cpu_backend_internal.h"
#include "cpu/thread_pool.h"

namespace llama_ext {
namespace {

// Elements of a task: a fixed number, as each is a sum of its own in sum_of_squares.
constexpr int64_t kChunk = 16384;
// What one thread gets through in a microsecond, roughly, in elements of a tensor of several.
constexpr double kStepsPerMicrosecond = 500.0;

/// Calls function(first element, elements) for each chunk.
template <typename Function>
void for_each_chunk(int64_t size, int threads, const Function& function) {
  parallel_for(threads, ceil_div(size, kChunk), [&](int64_t task, int) {
    const int64_t begin = task * kChunk;
    function(begin, std::min(kChunk, size - begin));
  });
}

}  // namespace

void CpuBackend::adam(const AdamArgs& args) {
  check(args);
  const double steps = static_cast<double>(args.step);
  const auto rounded = [](double x) { return static_cast<float>(x); };
  const AdamStep step = {rounded(args.gradient_scale),
                         rounded(args.beta1),
                         rounded(1.0 - args.beta1),
                         rounded(args.beta2),
                         rounded(1.0 - args.beta2),
                         rounded(args.lr / (1.0 - std::pow(args.beta1, steps))),
                         rounded(1.0 / (1.0 - std::pow(args.beta2, steps))),
                         rounded(args.eps),
                         rounded(args.decoupled ? args.lr * args.decay : 0.0),
                         rounded(args.decoupled ? 0.0 : args.decay)};
  const int64_t size = args.parameter.dim(0);
  for_each_chunk(size, threads_for(static_cast<double>(size) / kStepsPerMicrosecond), [&](int64_t at, int64_t count) {
    kernels_.training.adam(step, count, args.parameter.f32() + at, args.gradient.f32() + at, args.first.f32() + at,
                           args.second.f32() + at);
  });
}

void CpuBackend::sgd(const SgdArgs& args) {
  check(args);
  const SgdStep step = {static_cast<float>(args.gradient_scale), static_cast<float>(args.lr),
                        static_cast<float>(args.momentum), static_cast<float>(args.decay), args.nesterov};
  const int64_t size = args.parameter.dim(0);
  for_each_chunk(size, threads_for(static_cast<double>(size) / kStepsPerMicrosecond), [&](int64_t at, int64_t count) {
    kernels_.training.sgd(step, count, args.parameter.f32() + at, args.gradient.f32() + at,
                          args.velocity ? args.velocity.f32() + at : nullptr);
  });
}

double CpuBackend::sum_of_squares(const TensorView& x) {
  require_shape(x, {-1}, "sum_of_squares", "x");
  require_dtype(x, DType::kF32, "sum_of_squares", "x");
  const int64_t size = x.dim(0);
  const int64_t chunks = ceil_div(size, kChunk);
  auto* sums = static_cast<double*>(thread_scratch(Scratch::kSums, static_cast<size_t>(chunks) * sizeof(double)));
  for_each_chunk(
      size, threads_for(static_cast<double>(size) / (4.0 * kStepsPerMicrosecond)),
      [&](int64_t at, int64_t count) { sums[at / kChunk] = kernels_.training.sum_of_squares(x.f32() + at, count); });
  double total = 0.0;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) total += sums[chunk];
  return total;
}

}  // namespace llama_ext
