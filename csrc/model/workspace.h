// The memory of a pass.
#pragma once

#include <cstdint>
#include <memory>

#include "model/block.h"

namespace llama_ext {

/// Logits are made for this many rows at a time, so that their buffer stays small beside a large vocabulary.
inline constexpr int64_t kHeadRows = 128;

struct Workspace {
  std::unique_ptr<Buffer> memory;
  Pass whole;       // for as many rows as it was made for
  TensorView head;  // (head_rows, V) f32
};

struct WorkspaceSize {
  int64_t rows = 0;
  int64_t head_rows = 0;
  int64_t angles = 0;  // rows of cos and sin
  int64_t rank = 0;    // of the adapters; 0: there are none
  bool is_observed = false;
};

/// Bytes of one. Throws LimitError.
int64_t workspace_nbytes(const Model& model, const WorkspaceSize& size);
/// Throws OutOfMemoryError, LimitError.
Workspace make_workspace(const Model& model, const WorkspaceSize& size);

}  // namespace llama_ext
