// One layer of the model, and the activations it works on.
#pragma once

#include <cstdint>
#include <vector>

#include "model/observer.h"
#include "model/transformer.h"

namespace llama_ext {

/// Rows [row, row + rows) of a pass have this adapter.
struct AdapterRows {
  const Adapter* adapter = nullptr;
  int64_t row = 0;
  int64_t rows = 0;
};

/// What runs through all layers together: M rows of one or several sequences, and where their activations live.
/// All tensors are f32 on the device.
struct Pass {
  std::vector<KvSegment> segments;
  TensorView x;  // (M, C) the residual stream
  TensorView
      normed;  // (M, C) a norm: the final one of the rows whose logits are asked for, or the block's; free once it was read
  TensorView qkv;       // (M, (H + 2 K) D) a row is its Q, then its K, then its V
  TensorView attended;  // (M, H D)
  // Where a row has an adapter, these as well: products are made one by one then.
  std::vector<AdapterRows> adapters;
  TensorView gate;      // (M, F)
  TensorView up;        // (M, F)
  TensorView low_rank;  // (M, the largest rank)
  TensorView cos;       // (M, D/2) of each row's position
  TensorView sin;       // (M, D/2)
  // Where somebody looks at the pass, gate, up and these as well.
  Observation* observation = nullptr;
  TensorView gate_up;  // (M, 2 F'), or none where gate and up are matrices of their own
  TensorView added;    // (M, C) what a half of the block adds to x
};

/// x += attention(norm(x)); x += feed_forward(norm(x)). Stores the rows' keys and values in their caches.
void block(const Model& model, int64_t layer, const Pass& pass);

/// A norm with the model's epsilon, for the product that reads it.
InputNorm input_norm(const Model& model, const Norm& norm);
/// y = norm(x) with the same.
void normalize(const Model& model, const TensorView& x, const Norm& norm, const TensorView& y);

}  // namespace llama_ext
