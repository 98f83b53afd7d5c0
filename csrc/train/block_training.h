// One layer of the model in training: forward with what the gradient needs saved, and backward. The inference path is
// model/block.cpp: the same arithmetic with caches and with steps fused.
#pragma once

#include <cstdint>
#include <vector>

#include "model/adapter.h"
#include "model/transformer.h"
#include "ops/causal_attention.h"
#include "train/parameters.h"

namespace llama_ext {

/// What a block's backward needs of its forward. All f32 on the device.
struct Saved {
  TensorView x;         // (M, C) the residual stream before the block
  TensorView qkv;       // (M, (H + 2 K) D) rotated; then its gradient
  TensorView log_sums;  // (M, H)
  TensorView attended;  // (M, H D)
  TensorView middle;    // (M, C) the residual stream between attention and feed-forward
  TensorView gate;      // (M, F); then its gradient
  TensorView up;        // (M, F); then its gradient
};

/// Memory that a block uses and leaves.
struct BlockScratch {
  TensorView normed;    // (M, C)
  TensorView d_normed;  // (M, C)
  TensorView branch;    // (M, C) with dropout: a branch before it joins the residual stream, or its gradient
  TensorView wide;      // (M, F) the activation
  TensorView d_wide;    // (M, F)
  TensorView d_heads;   // (M, H D)
  // With an adapter:
  TensorView low_rank;    // (M, the largest rank)
  TensorView d_low_rank;  // (M, the largest rank)
  TensorView dropped;     // (M, the widest input) with dropout of its inputs
  TensorView d_dropped;   // likewise
};

struct DropoutRates {
  double residual = 0.0;  // of the embedding, and of each branch before it joins the residual stream
  double attention = 0.0;
  double adapter = 0.0;  // of an adapter's inputs
};

/// A pass of M rows, several sequences, through all layers.
struct TrainingPass {
  const Model* model = nullptr;
  const Adapter* adapter = nullptr;
  const Parameters* parameters = nullptr;  // none: no gradients are made
  std::vector<RowRange> sequences;
  TensorView cos;  // (M, D/2)
  TensorView sin;
  Compute compute = Compute::kExact;
  DropoutRates dropout;
  uint64_t seed = 0;
  BlockScratch scratch;
};

/// next = block(saved.x), which may be saved.x itself; fills the rest of `saved`. With `recompute`, only that: `next` stays as it is.
void block_forward(const TrainingPass& pass, int64_t layer, const Saved& saved, const TensorView& next,
                   bool recompute = false);

/// d: (M, C), the gradient of the block's output; becomes that of its input. Adds to the parameters' gradients.
void block_backward(const TrainingPass& pass, int64_t layer, const Saved& saved, const TensorView& d);

/// y = rms_norm(x) with the model's epsilon.
void norm_forward(const TrainingPass& pass, const Norm& norm, const TensorView& x, const TensorView& y);
/// d_x (+)= the gradient of that, from d_y; and the weight's.
void norm_backward(const TrainingPass& pass, const Norm& norm, const TensorView& x, const TensorView& d_y,
                   const TensorView& d_x, bool accumulate);
/// x W^T + b, added to y or in its place.
void linear_forward(const TrainingPass& pass, const TensorView& x, const Matrix& weight, const TensorView& bias,
                    const TensorView& y, bool accumulate);
/// d_x (+)= d_y W, and the gradients of the weight and bias.
void linear_backward(const TrainingPass& pass, const TensorView& d_y, const TensorView& x, const Matrix& weight,
                     const TensorView& bias, const TensorView& d_x, bool accumulate);
/// The places in a pass that have dropout of their own; a layer has several.
uint64_t place_seed(const TrainingPass& pass, int64_t layer, int site);

}  // namespace llama_ext
