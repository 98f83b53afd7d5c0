#include "train/pass_parts.h"

#include <algorithm>

namespace llama_ext {
namespace {

constexpr int64_t kPartRows = 64;
constexpr size_t kLeastParts = 4;

/// Calls visit(matrix) for each matrix of a block.
template <typename Visit>
void for_each_matrix(const BlockWeights& weights, const Visit& visit) {
  for (const Projection& part : weights.qkv) visit(*part.linear.weight);
  for (const Linear* linear : {&weights.o, &weights.gate, &weights.up, &weights.down}) visit(*linear->weight);
}

TensorView rows_of(const TensorView& x, int64_t row, int64_t rows) {
  return x && x.rows() > 0 ? x.slice_rows(row, rows) : x;
}

}  // namespace

bool may_go_in_parts(const Model& model) {
  bool may = true;
  for (int64_t layer = 0; layer < model.config().layers; ++layer) {
    for_each_matrix(model.weights().block(layer), [&](const Matrix& matrix) {
      may = may && matrix.type() == WeightType{Encoding::kF32} && matrix.rows() * matrix.cols() <= kMostWeightsOfSmall;
    });
  }
  return may;
}

std::vector<PassPart> pass_parts(const std::vector<RowRange>& sequences) {
  std::vector<PassPart> parts;
  for (const RowRange& sequence : sequences) {
    if (parts.empty() || parts.back().rows >= kPartRows)
      parts.push_back({.row = sequence.row, .rows = 0, .sequences = {}});
    PassPart& part = parts.back();
    part.sequences.push_back({.row = sequence.row - part.row, .tokens = sequence.tokens});
    part.rows += sequence.tokens;
  }
  if (parts.size() < kLeastParts) parts.clear();
  return parts;
}

TrainingPass pass_of(const TrainingPass& pass, const PassPart& part, int64_t scratch_row) {
  TrainingPass of = pass;
  of.sequences = part.sequences;
  of.cos = pass.cos.slice_rows(part.row, part.rows);
  of.sin = pass.sin.slice_rows(part.row, part.rows);
  BlockScratch& scratch = of.scratch;
  for (TensorView* each :
       {&scratch.normed, &scratch.d_normed, &scratch.branch, &scratch.wide, &scratch.d_wide, &scratch.d_heads}) {
    *each = rows_of(*each, scratch_row, part.rows);
  }
  return of;
}

Saved saved_of(const Saved& saved, int64_t row, int64_t rows) {
  Saved of = saved;
  for (TensorView* each : {&of.x, &of.qkv, &of.log_sums, &of.attended, &of.middle, &of.gate, &of.up}) {
    *each = rows_of(*each, row, rows);
  }
  return of;
}

Deferred deferred_of(const Deferred& deferred, const PassPart& part, int64_t index) {
  Deferred of = deferred;
  for (TensorView* each : {&of.d_out, &of.d_middle, &of.attention_normed, &of.ffn_normed, &of.wide}) {
    *each = rows_of(*each, part.row, part.rows);
  }
  for (TensorView* each : {&of.d_attention_norm, &of.d_ffn_norm}) {
    *each = TensorView(each->row<float>(index), DType::kF32, {each->dim(1)});
  }
  return of;
}

void transpose_blocks(const Model& model, Transposed& transposed) {
  Backend& backend = model.backend();
  std::vector<std::pair<const Matrix*, Matrix*>> all;
  for (int64_t layer = 0; layer < model.config().layers; ++layer) {
    for_each_matrix(model.weights().block(layer), [&](const Matrix& matrix) {
      std::unique_ptr<Matrix>& target = transposed[&matrix];
      if (!target) target = backend.create_matrix(matrix.cols(), matrix.rows(), matrix.type());
      all.emplace_back(&matrix, target.get());
    });
  }
  backend.for_each_part(static_cast<int64_t>(all.size()), [&](int64_t index, int) {
    const auto& [source, target] = all[static_cast<size_t>(index)];
    backend.transpose(*target, *source);
  });
}

}  // namespace llama_ext
