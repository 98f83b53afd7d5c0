#include "model/workspace.h"

#include "core/checked.h"

namespace llama_ext {
namespace {

// Regions start on a cache line of their own.
constexpr int64_t kRegionFloats = 64;

/// Where the regions begin, in floats.
struct Regions {
  int64_t floats = 0;  // in all
  int64_t x, normed, qkv, attended, cos, sin, head, gate, up, low_rank, gate_up, added;
};

bool is_unfused(const WorkspaceSize& size) { return size.rank > 0 || size.is_observed; }
bool is_joined(const Model& model, const WorkspaceSize& size) {
  return size.is_observed && !model.weights().has_separate_gate_up();
}

Regions regions_of(const Model& model, const WorkspaceSize& size) {
  const ModelConfig& config = model.config();
  const int64_t half = config.head_dim / 2;
  Regions at{};
  const auto region = [&at](int64_t rows, int64_t width) {
    const int64_t offset = at.floats;
    at.floats = checked_add(at.floats, round_up(checked_mul(rows, width, "workspace"), kRegionFloats), "workspace");
    return offset;
  };
  at.x = region(size.rows, config.width);
  at.normed = region(size.rows, config.width);
  at.qkv = region(size.rows, config.qkv_size());
  at.attended = region(size.rows, config.q_size());
  at.cos = region(size.angles, half);
  at.sin = region(size.angles, half);
  at.head = region(size.head_rows, config.outputs());
  at.gate = region(is_unfused(size) ? size.rows : 0, config.ffn_width);
  at.up = region(is_unfused(size) ? size.rows : 0, config.ffn_width);
  at.low_rank = region(size.rows, size.rank);
  at.gate_up = region(is_joined(model, size) ? size.rows : 0, gate_up_size(config.ffn_width));
  at.added = region(size.is_observed ? size.rows : 0, config.width);
  return at;
}

}  // namespace

int64_t workspace_nbytes(const Model& model, const WorkspaceSize& size) {
  return checked_mul(regions_of(model, size).floats, sizeof(float), "workspace");
}

Workspace make_workspace(const Model& model, const WorkspaceSize& size) {
  const ModelConfig& config = model.config();
  const int64_t half = config.head_dim / 2;
  const Regions at = regions_of(model, size);
  Workspace workspace;
  workspace.memory = model.backend().allocate(static_cast<size_t>(workspace_nbytes(model, size)));
  float* base = static_cast<float*>(workspace.memory->data());
  const auto view = [base](int64_t offset, int64_t rows, int64_t width) {
    return TensorView(base + offset, DType::kF32, {rows, width});
  };
  Pass& whole = workspace.whole;
  whole.x = view(at.x, size.rows, config.width);
  whole.normed = view(at.normed, size.rows, config.width);
  whole.qkv = view(at.qkv, size.rows, config.qkv_size());
  whole.attended = view(at.attended, size.rows, config.q_size());
  whole.cos = view(at.cos, size.angles, half);
  whole.sin = view(at.sin, size.angles, half);
  if (is_unfused(size)) {
    whole.gate = view(at.gate, size.rows, config.ffn_width);
    whole.up = view(at.up, size.rows, config.ffn_width);
  }
  if (size.rank > 0) whole.low_rank = view(at.low_rank, size.rows, size.rank);
  if (is_joined(model, size)) whole.gate_up = view(at.gate_up, size.rows, gate_up_size(config.ffn_width));
  if (size.is_observed) whole.added = view(at.added, size.rows, config.width);
  workspace.head = view(at.head, size.head_rows, config.outputs());
  return workspace;
}

}  // namespace llama_ext
