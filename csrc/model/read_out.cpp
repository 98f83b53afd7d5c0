#include "model/read_out.h"

#include <algorithm>

#include "core/checked.h"
#include "core/interrupt.h"
#include "model/block.h"

namespace llama_ext {
namespace {

// Rows that run at a time, so that memory stays small beside a large vocabulary.
constexpr int64_t kRows = 128;

}  // namespace

void read_out(const Model& model, const float* x, int64_t rows, float* logits) {
  Backend& backend = model.backend();
  const int64_t width = model.config().width;
  const int64_t outputs = model.config().outputs();
  const int64_t most = std::min(rows, kRows);
  const auto allocate = [&](int64_t columns) {
    return backend.allocate(static_cast<size_t>(
        checked_mul(checked_mul(most, columns, "read_out"), static_cast<int64_t>(sizeof(float)), "read_out")));
  };
  const std::unique_ptr<Buffer> states = allocate(width);
  const std::unique_ptr<Buffer> head = allocate(outputs);
  for (int64_t row = 0; row < rows; row += kRows) {
    throw_if_interrupted();
    const int64_t count = std::min(kRows, rows - row);
    const TensorView normed(states->data(), DType::kF32, {count, width});
    backend.copy_to_device(normed.data(), x + row * width, static_cast<size_t>(normed.size()) * sizeof(float));
    normalize(model, normed, model.weights().final_norm(), normed);
    MatmulArgs args;
    args.x = normed;
    args.weight = &model.weights().head();
    args.y = TensorView(head->data(), DType::kF32, {count, outputs});
    args.compute = model.compute();
    backend.matmul(args);
    backend.copy_to_host(logits + row * outputs, args.y.data(), static_cast<size_t>(args.y.size()) * sizeof(float));
    backend.synchronize();
  }
}

}  // namespace llama_ext
