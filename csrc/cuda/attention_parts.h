// What kernels of attention share: their arguments, and how parts of the key axis are merged.
#pragma once

#include <algorithm>

#include "cuda/kernels.h"
#include "cuda/launch.h"
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

/// Memory for parts, which some hundred tokens of a long context would need gigabytes of.
inline constexpr int64_t kMostPartialBytes = int64_t{256} << 20;

/// How many tokens have their parts in memory at the same time: all that have room, and one at least.
constexpr int64_t tokens_of_slice(int heads, int64_t parts, int head_dim) {
  return std::max<int64_t>(1, kMostPartialBytes / (int64_t{heads} * parts * (head_dim + 2) * int64_t{sizeof(float)}));
}

/// Splits the keys into parts of so many: calls start(view) for slices of a's tokens, and merges their parts. A slice has as many blocks
/// as its memory allows, far more than a GPU has room for, unless it has all of few tokens.
template <typename StartBlocks>
void split_keys(const Gpu& gpu, const AttentionView& a, int keys, const StartBlocks& start) {
  const int head_dim = a.segments.of[0].layer.head_dim;
  const int64_t most = tokens_of_slice(a.heads, blocks_for(longest_row(a.segments), keys), head_dim);
  for (int64_t first = 0; first < a.segments.tokens; first += most) {
    AttentionView slice = a;
    slice.segments = tokens_of(a.segments, first, most);
    slice.parts = static_cast<int>(blocks_for(longest_row(slice.segments), keys));
    const int64_t numbers = slice.segments.tokens * a.heads * slice.parts * (head_dim + 2);
    const Scratch partial(gpu, static_cast<size_t>(numbers) * sizeof(float));
    slice.partial = partial.as<float>();
    start(slice);
    merge_parts(gpu, slice, keys);
  }
}

}  // namespace llama_ext::cuda
