// A pass cut into parts: whole sequences that go through the layers by themselves, each part on one thread. What a part makes is
// still in that thread's cache when it is read, and threads meet once for all layers, not several times in each operation. Gradients of
// weights are sums over all rows, and are made of all parts together (Deferred). Worth it for small models, whose parts fit into a cache.
#pragma once

#include <cstdint>
#include <vector>

#include "train/block_training.h"

namespace llama_ext {

/// Of a matrix of a model that is small: a part reads all of a block's, and a thread may have memory for one of them to itself.
inline constexpr int64_t kMostWeightsOfSmall = int64_t{1} << 18;

struct PassPart {
  int64_t row = 0;  // of the pass
  int64_t rows = 0;
  std::vector<RowRange> sequences;  // their rows counted from `row`
};

/// Whether a pass of this model may go in parts: all is float32, and nothing but weights is trained.
bool may_go_in_parts(const Model& model);
/// Parts of about 64 rows; none when there would be too few. Depends on the lengths alone, so that sums do not depend on threads.
std::vector<PassPart> pass_parts(const std::vector<RowRange>& sequences);

/// The pass of a part. scratch_row: where in the pass's scratch it has its own.
TrainingPass pass_of(const TrainingPass& pass, const PassPart& part, int64_t scratch_row);
Saved saved_of(const Saved& saved, int64_t row, int64_t rows);
Deferred deferred_of(const Deferred& deferred, const PassPart& part, int64_t index);

/// Fills `transposed` with the weights of all blocks as they are now.
void transpose_blocks(const Model& model, Transposed& transposed);

}  // namespace llama_ext
