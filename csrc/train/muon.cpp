#include "train/muon.h"

#include <algorithm>
#include <cmath>

#include "core/interrupt.h"
#include "model/scaled.h"

namespace llama_ext {
namespace {

constexpr double kMuonMomentum = 0.95;
constexpr double kUpdateSize = 0.2;
constexpr int kIterations = 5;
constexpr double kA = 3.4445;
constexpr double kB = -4.7750;
constexpr double kC = 2.0315;

/// (rows, cols) f32 on the device.
struct Dense {
  Dense(Backend& backend, int64_t rows, int64_t cols)
      : buffer(backend.allocate(static_cast<size_t>(rows * cols) * sizeof(float))),
        view(buffer->data(), DType::kF32, {rows, cols}) {}
  std::unique_ptr<Buffer> buffer;
  TensorView view;
};

std::vector<float> transposed(const std::vector<float>& x, int64_t rows, int64_t cols) {
  std::vector<float> y(x.size());
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < cols; ++c) y[static_cast<size_t>(c * rows + r)] = x[static_cast<size_t>(r * cols + c)];
  }
  return y;
}

/// x (rows, cols), rows <= cols, in host memory, becomes the nearest matrix with orthonormal rows, roughly.
void orthogonalize(Backend& backend, std::vector<float>& host, int64_t rows, int64_t cols) {
  Dense x(backend, rows, cols);
  Dense next(backend, rows, cols);
  Dense gram(backend, rows, rows);
  Dense square(backend, rows, rows);
  const size_t nbytes = host.size() * sizeof(float);
  backend.copy_to_device(x.view.data(), host.data(), nbytes);
  const double norm = std::sqrt(backend.sum_of_squares({x.view.data(), DType::kF32, {rows * cols}}));
  set_scaled(backend, x.view, x.view, 1.0 / (norm + 1e-7));
  const WeightType kind{Encoding::kF32};
  const std::unique_ptr<Matrix> x_matrix = backend.create_matrix(rows, cols, kind);
  const std::unique_ptr<Matrix> gram_matrix = backend.create_matrix(rows, rows, kind);
  std::vector<float> gram_host(static_cast<size_t>(rows * rows));
  const auto load = [&](Matrix& matrix, const TensorView& view, std::vector<float>& memory) {
    backend.copy_to_host(memory.data(), view.data(), memory.size() * sizeof(float));
    backend.synchronize();
    backend.write_rows(matrix, {}, {memory.data(), DType::kF32, {view.rows(), view.dim(1)}}, {});
    backend.synchronize();
  };
  for (int i = 0; i < kIterations; ++i) {
    load(*x_matrix, x.view, host);
    backend.matmul({.x = x.view, .weight = x_matrix.get(), .bias = {}, .y = gram.view, .compute = Compute::kExact});
    load(*gram_matrix, gram.view, gram_host);  // symmetric: its rows are its columns
    backend.matmul(
        {.x = gram.view, .weight = gram_matrix.get(), .bias = {}, .y = square.view, .compute = Compute::kExact});
    set_scaled(backend, square.view, square.view, kC);
    add_scaled(backend, gram.view, square.view, kB);
    set_scaled(backend, x.view, next.view, kA);
    backend.matmul_backward({.d_y = square.view, .weight = x_matrix.get(), .d_x = next.view, .accumulate = true});
    std::swap(x, next);
  }
  backend.copy_to_host(host.data(), x.view.data(), nbytes);
  backend.synchronize();
}

}  // namespace

std::vector<bool> muon_step(Backend& backend, const OptimizerOptions& options, Parameters& parameters, double lr,
                            double gradient_scale) {
  const double momentum = options.momentum > 0.0 ? options.momentum : kMuonMomentum;
  std::vector<Parameter>& all = parameters.all();
  std::vector<bool> is_stepped(all.size(), false);
  for (const ParameterSlot& slot : parameters.slots()) {
    Parameter& parameter = all[slot.parameter];
    if (!parameter.is_matrix() || !slot.name.starts_with("layers.")) continue;
    throw_if_interrupted();
    if (!is_stepped[slot.parameter]) {
      // Of all tensors that share the matrix at once; lr 0 leaves the weights to what follows.
      backend.sgd({.parameter = parameter.value,
                   .gradient = parameter.gradient,
                   .velocity = parameter.moments[0],
                   .gradient_scale = gradient_scale,
                   .lr = 0.0,
                   .momentum = momentum});
      is_stepped[slot.parameter] = true;
    }
    const int64_t rows = slot.shape[0];
    const int64_t cols = slot.shape[1];
    std::vector<float> direction(static_cast<size_t>(rows * cols));
    const auto view = [&](std::vector<float>& values) { return TensorView(values.data(), DType::kF32, {rows, cols}); };
    parameters.read(slot, 0, view(direction));
    if (options.nesterov) {
      std::vector<float> gradient(direction.size());
      parameters.read(slot, -1, view(gradient));
      for (size_t i = 0; i < direction.size(); ++i) {
        direction[i] = static_cast<float>(gradient_scale * static_cast<double>(gradient[i]) +
                                          momentum * static_cast<double>(direction[i]));
      }
    }
    if (rows > cols) {
      direction = transposed(direction, rows, cols);
      orthogonalize(backend, direction, cols, rows);
      direction = transposed(direction, cols, rows);
    } else {
      orthogonalize(backend, direction, rows, cols);
    }
    std::vector<float> weights(direction.size());
    backend.read_rows(*parameter.matrix, slot.rows, view(weights));
    backend.synchronize();
    const double size = kUpdateSize * std::sqrt(static_cast<double>(std::max(rows, cols)));
    for (size_t i = 0; i < weights.size(); ++i) {
      weights[i] = static_cast<float>((1.0 - lr * options.weight_decay) * static_cast<double>(weights[i]) -
                                      lr * size * static_cast<double>(direction[i]));
    }
    backend.write_rows(*parameter.matrix, slot.rows, view(weights), {});
    backend.synchronize();
  }
  return is_stepped;
}

}  // namespace llama_ext
