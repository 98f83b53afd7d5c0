#pragma once

#include <cstdint>
#include <vector>

#include "core/tensor_view.h"
#include "ops/kv_cache.h"
#include "ops/matrix.h"

namespace llama_ext {

/// Causal grouped-query attention over KV caches; head h reads key/value head h / (H / K). For each token at position p:
///   y[h] = softmax_j(scale * q[h] . k[j]) v[j],   j = 0 .. p of its own sequence
/// The caches hold the keys and values of the segments already (kv_store).
/// q, y: (M, H, D) f32, rows may be strided; H a multiple of K; y must not overlap q. Sequences are ragged, so padding
/// never enters. Softmax runs in f32 over tiles of keys that start at absolute multiples and are merged in order: a row's bits depend
/// neither on M, nor on how a prompt was cut into segments, nor on threads.
/// compute: kAuto may round q and the softmax's weights to bf16 when the cache is not f32.
/// Training has no caches: causal_attention.h. Throws ShapeError, DTypeError, ContextLengthError.
/// Source: Vaswani et al. 2017; Ainslie et al., "GQA", 2023; tiles merged as in Dao et al., "FlashAttention", 2022.
struct AttentionArgs {
  TensorView q;
  std::vector<KvSegment> segments;
  int64_t layer = 0;
  double scale = 1.0;
  TensorView y;
  Compute compute = Compute::kExact;
};

void check(const AttentionArgs& args);
/// Of Backend::attend_and_project: x of the product is y, seen as (M, H D). Throws ShapeError.
void check_projection(const AttentionArgs& args, const TensorView& x);

}  // namespace llama_ext
