// The memory of a pass in training.
#pragma once

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "model/adapter.h"
#include "train/block_training.h"
#include "train/pass_parts.h"
#include "train/trainer.h"

namespace llama_ext {

/// The tensors of a pass: one block of memory, for as many rows as the largest pass so far.
class TrainingWorkspace {
 public:
  struct Size {
    int64_t rows = 0;
    int64_t head_rows = 0;  // with labels
    int64_t parts = 0;      // of a pass that goes in parts
    bool trains = false;
    bool fits(const Size& other) const {
      return rows >= other.rows && head_rows >= other.head_rows && parts >= other.parts && (trains || !other.trains);
    }
  };

  TrainingWorkspace(Backend& backend, const Model& model, const Adapter* adapter, const TrainerOptions& options,
                    const Size& size);

  const Size& size() const { return size_; }
  int64_t nbytes() const { return floats_ * static_cast<int64_t>(sizeof(float)); }
  int64_t logits_rows() const { return logits_rows_; }

  // Views of the first `rows` rows.
  Saved saved(int64_t layer, int64_t rows) const { return saved_of(saved_[static_cast<size_t>(layer)], 0, rows); }
  Deferred deferred(int64_t rows, int64_t parts) const {
    Deferred view = deferred_;
    for (TensorView* each : {&view.d_out, &view.d_middle, &view.attention_normed, &view.ffn_normed, &view.wide}) {
      *each = each->slice_rows(0, rows);
    }
    for (TensorView* each : {&view.d_attention_norm, &view.d_ffn_norm}) *each = each->slice_rows(0, parts);
    return view;
  }
  BlockScratch scratch(int64_t rows) const {
    BlockScratch view = scratch_;
    for (TensorView* each : {&view.normed, &view.d_normed, &view.branch, &view.wide, &view.d_wide, &view.d_heads}) {
      if (*each && each->rows() > 0) *each = each->slice_rows(0, rows);
    }
    return view;
  }
  TensorView x_out(int64_t rows) const { return x_out_.slice_rows(0, rows); }
  TensorView d(int64_t rows) const { return d_.slice_rows(0, rows); }
  TensorView cos(int64_t rows) const { return cos_.slice_rows(0, rows); }
  TensorView sin(int64_t rows) const { return sin_.slice_rows(0, rows); }
  TensorView head_x(int64_t rows) const { return head_x_.slice_rows(0, rows); }
  TensorView d_head_x(int64_t rows) const { return d_head_x_.slice_rows(0, rows); }
  TensorView logits(int64_t rows) const { return logits_.slice_rows(0, rows); }
  // From labelled row `first` of the pass on.
  TensorView losses(int64_t first, int64_t rows) const { return {losses_.f32() + first, DType::kF32, {rows}}; }
  TensorView hits(int64_t first, int64_t rows) const { return {hits_.f32() + first, DType::kF32, {rows}}; }

 private:
  struct Region {
    TensorView* view;
    int64_t offset;
    std::pair<int64_t, int64_t> shape;
  };

  void add(TensorView& view, int64_t rows, int64_t width);

  Size size_;
  std::vector<Region> regions_;
  int64_t floats_ = 0;
  int64_t logits_rows_ = 0;
  std::unique_ptr<Buffer> memory_;
  std::vector<Saved> saved_;
  BlockScratch scratch_;
  Deferred deferred_;
  TensorView x_out_, d_, cos_, sin_, head_x_, d_head_x_, logits_, losses_, hits_;
};

}  // namespace llama_ext
