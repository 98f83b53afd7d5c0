// One layer of the model in training: forward with what the gradient needs saved, and backward. The inference path is
// model/block.cpp: the same arithmetic with caches and with steps fused.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
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

/// Where a part of a pass, which shares the memory of gradients with others, leaves what they are made of: for all rows at once, by
/// block_weights_backward. Of the part's rows.
struct Deferred {
  TensorView d_out;             // (M, C) the gradient of the block's output
  TensorView d_middle;          // (M, C) and of the residual stream between attention and feed-forward
  TensorView attention_normed;  // (M, C)
  TensorView ffn_normed;        // (M, C)
  TensorView wide;              // (M, F) the activation
  // (1, C): what the part adds to the gradients of the norms' weights.
  TensorView d_attention_norm;
  TensorView d_ffn_norm;
};

/// Block weights, transposed, by the matrix they are of.
using Transposed = std::map<const Matrix*, std::unique_ptr<Matrix>>;

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
  // Of a part of a pass, in backward:
  const Deferred* deferred = nullptr;
  const Transposed* transposed = nullptr;
};

/// next = block(saved.x), which may be saved.x itself; fills the rest of `saved`. With `recompute`, only that: `next` stays as it is.
void block_forward(const TrainingPass& pass, int64_t layer, const Saved& saved, const TensorView& next,
                   bool recompute = false);

/// d: (M, C), the gradient of the block's output; becomes that of its input. Adds to the parameters' gradients, unless the pass defers
/// them.
void block_backward(const TrainingPass& pass, int64_t layer, const Saved& saved, const TensorView& d);
/// Adds to the gradients of the block's weights what its parts have deferred; all of them. d_*_norm: (parts, C).
void block_weights_backward(const TrainingPass& pass, int64_t layer, const Saved& saved, const Deferred& deferred);

/// y = rms_norm(x) with the model's epsilon.
void norm_forward(const TrainingPass& pass, const Norm& norm, const TensorView& x, const TensorView& y);
/// d_x (+)= the gradient of that, from d_y; and the weight's: d_weight (C), or none.
void norm_backward(const TrainingPass& pass, const Norm& norm, const TensorView& x, const TensorView& d_y,
                   const TensorView& d_x, bool accumulate, const TensorView& d_weight);
/// x W^T + b, added to y or in its place.
void linear_forward(const TrainingPass& pass, const TensorView& x, const Matrix& weight, const TensorView& bias,
                    const TensorView& y, bool accumulate);
/// d_x (+)= d_y W.
void input_backward(const TrainingPass& pass, const TensorView& d_y, const Matrix& weight, const TensorView& d_x,
                    bool accumulate);
/// What asks for the gradients of the weight and bias, where they are trained; and asks.
MatmulBackwardArgs weight_gradient(const TrainingPass& pass, const TensorView& d_y, const TensorView& x,
                                   const Matrix& weight, const TensorView& bias);
void weight_backward(const TrainingPass& pass, const TensorView& d_y, const TensorView& x, const Matrix& weight,
                     const TensorView& bias);
/// Both, or only the first where the pass defers the second.
void linear_backward(const TrainingPass& pass, const TensorView& d_y, const TensorView& x, const Matrix& weight,
                     const TensorView& bias, const TensorView& d_x, bool accumulate);
/// The places in a pass that have dropout of their own; a layer has several.
uint64_t place_seed(const TrainingPass& pass, int64_t layer, int site);

}  // namespace llama_ext
