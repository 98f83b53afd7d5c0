#include "model/workspace.h"

#include "core/checked.h"

namespace llama_ext {
namespace {

// Regions start on a cache line of their own.
constexpr int64_t kRegionFloats = 64;

}  // namespace

Workspace make_workspace(const Model& model, const WorkspaceSize& size) {
  const ModelConfig& config = model.config();
  const int64_t half = config.head_dim / 2;
  int64_t floats = 0;
  const auto region = [&floats](int64_t rows, int64_t width) {
    const int64_t offset = floats;
    floats = checked_add(floats, round_up(checked_mul(rows, width, "workspace"), kRegionFloats), "workspace");
    return offset;
  };
  const int64_t x = region(size.rows, config.width);
  const int64_t normed = region(size.rows, config.width);
  const int64_t qkv = region(size.rows, config.qkv_size());
  const int64_t attended = region(size.rows, config.q_size());
  const int64_t cos = region(size.angles, half);
  const int64_t sin = region(size.angles, half);
  const int64_t head = region(size.head_rows, config.outputs());
  const bool is_unfused = size.rank > 0 || size.is_observed;
  const int64_t gate = region(is_unfused ? size.rows : 0, config.ffn_width);
  const int64_t up = region(is_unfused ? size.rows : 0, config.ffn_width);
  const int64_t low_rank = region(size.rows, size.rank);
  const bool is_joined = size.is_observed && !model.weights().has_separate_gate_up();
  const int64_t gate_up = region(is_joined ? size.rows : 0, gate_up_size(config.ffn_width));
  const int64_t added = region(size.is_observed ? size.rows : 0, config.width);

  Workspace workspace;
  workspace.memory = model.backend().allocate(static_cast<size_t>(checked_mul(floats, sizeof(float), "workspace")));
  float* base = static_cast<float*>(workspace.memory->data());
  const auto view = [base](int64_t offset, int64_t rows, int64_t width) {
    return TensorView(base + offset, DType::kF32, {rows, width});
  };
  Pass& whole = workspace.whole;
  whole.x = view(x, size.rows, config.width);
  whole.normed = view(normed, size.rows, config.width);
  whole.qkv = view(qkv, size.rows, config.qkv_size());
  whole.attended = view(attended, size.rows, config.q_size());
  whole.cos = view(cos, size.angles, half);
  whole.sin = view(sin, size.angles, half);
  if (is_unfused) {
    whole.gate = view(gate, size.rows, config.ffn_width);
    whole.up = view(up, size.rows, config.ffn_width);
  }
  if (size.rank > 0) whole.low_rank = view(low_rank, size.rows, size.rank);
  if (is_joined) whole.gate_up = view(gate_up, size.rows, gate_up_size(config.ffn_width));
  if (size.is_observed) whole.added = view(added, size.rows, config.width);
  workspace.head = view(head, size.head_rows, config.outputs());
  return workspace;
}

}  // namespace llama_ext
