// What both kernels of attention share: how parts of the key axis are merged.
#pragma once

#include "cuda/attention_view.h"
#include "cuda/numeric.h"

namespace llama_ext::cuda {

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
