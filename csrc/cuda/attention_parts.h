// What both kernels of attention share: their arguments, and how parts of the key axis are merged.
#pragma once

#include "cuda/kernels.h"
#include "cuda/numeric.h"
#include "cuda/segments.h"

namespace llama_ext::cuda {

struct AttentionView {
  SegmentList segments;
  Rows q;
  Rows y;
  int heads = 0;   // H
  int group = 0;   // H / K
  int shares = 1;  // blocks that share a group of heads
  float scale = 1.0f;
  int parts = 0;             // of the keys of the longest row, each by a block of its own; 0: no split
  float* partial = nullptr;  // (tokens, H, parts): largest, sum, head_dim sums
};

/// Keys of a part, on the tensor cores; tiles of 64 keys are weighed together.
inline constexpr int kAttentionPartKeys = 256;

/// What is subtracted from scores: the largest of a row, or 0 where it sees none of the keys.
struct AttentionShift {
  float natural;
  float binary;  // times log2(e)

  __device__ __forceinline__ explicit AttentionShift(float largest)
      : natural(largest == -INFINITY ? 0.0f : largest), binary(natural * kLog2E) {}
};
/// e^(product scale - shift). binary_scale: scale log2(e).
__device__ __forceinline__ float attention_weight(float product, float binary_scale, const AttentionShift& shift) {
  return fast_exp2(fmaf(product, binary_scale, -shift.binary));
}

/// Softmax over some keys: the largest score, the sum of exponentials, and for each dimension the weighted sum. Every merge of a
/// pass is this one, so that a split changes no bits.
struct MergeFactors {
  float largest;
  float of_old;
  float of_new;
};
__device__ __forceinline__ MergeFactors merge_factors(float old_largest, float new_largest) {
  const float largest = max_or_nan(old_largest, new_largest);
  return {largest, expf(old_largest - largest), expf(new_largest - largest)};
}
__device__ __forceinline__ float merge(float old_sum, float new_sum, const MergeFactors& factors) {
  return fmaf(old_sum, factors.of_old, new_sum * factors.of_new);
}

__host__ __device__ inline int64_t partial_at(const AttentionView& a, int64_t pass_token, int head, int part, int dim) {
  return ((pass_token * a.heads + head) * a.parts + part) * (dim + 2);
}

/// Merges the parts of each row in order; a part has `keys` of them.
void merge_parts(const Gpu& gpu, const AttentionView& a, int keys);

/// The position of the last query of all segments, plus one.
int64_t longest_row(const SegmentList& segments);

}  // namespace llama_ext::cuda
