#include "ops/attention.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "ops/argument_checks.h"

namespace llama_ext {
namespace {

void check_segment(const AttentionArgs& args, size_t index) {
  const AttentionSegment& segment = args.segments[index];
  const int64_t heads = args.q.dim(1);
  const int64_t head_dim = args.q.dim(2);
  require(segment.cache != nullptr, ErrorKind::kInternal, "attention: segment ", index, " has no cache");
  const KvCacheShape& shape = segment.cache->shape();
  require(shape.head_dim == head_dim, ErrorKind::kShape, "attention: the cache of segment ", index,
          " must have a head dimension of ", head_dim, " as q has, got ", shape.head_dim);
  require(shape.kv_heads > 0 ? heads % shape.kv_heads == 0 : heads == 0, ErrorKind::kShape, "attention: ", heads,
          " heads of q are not a multiple of the ", shape.kv_heads, " key/value heads in the cache of segment ", index);
  require(args.layer >= 0 && args.layer < shape.layers, ErrorKind::kShape, "attention: layer ", args.layer,
          " does not exist, the cache of segment ", index, " has ", shape.layers, " layers");
  const KvCacheShape& first = args.segments.front().cache->shape();
  require(shape.kv_heads == first.kv_heads && shape.dtype == first.dtype, ErrorKind::kShape,
          "attention: the caches of one call must have the same key/value heads and dtype; that of segment ", index,
          " differs");
  const int64_t rows = args.q.rows();
  require(segment.row >= 0 && segment.tokens >= 0 && segment.tokens <= rows && segment.row <= rows - segment.tokens,
          ErrorKind::kShape, "attention: segment ", index, " covers rows [", segment.row, ", ", segment.row, " + ",
          segment.tokens, "), q has ", rows, " rows");
  require(
      segment.position >= 0 && segment.tokens <= shape.capacity && segment.position <= shape.capacity - segment.tokens,
      ErrorKind::kContextLength, "attention: segment ", index, ": ", segment.tokens, " tokens from position ",
      segment.position, " on do not fit in a cache of ", shape.capacity, " positions");
}

/// Two segments that write the same rows would race.
void check_rows_disjoint(const std::vector<AttentionSegment>& segments) {
  std::vector<std::pair<int64_t, int64_t>> ranges;
  ranges.reserve(segments.size());
  for (const AttentionSegment& segment : segments) {
    if (segment.tokens > 0) ranges.emplace_back(segment.row, segment.row + segment.tokens);
  }
  std::sort(ranges.begin(), ranges.end());
  for (size_t i = 1; i < ranges.size(); ++i) {
    require(ranges[i - 1].second <= ranges[i].first, ErrorKind::kShape, "attention: row ", ranges[i].first,
            " belongs to two segments");
  }
}

}  // namespace

void check(const AttentionArgs& args) {
  require_tensor(args.q, DType::kF32, {-1, -1, -1}, Rows::kStrided, "attention", "q");
  require_tensor(args.y, DType::kF32, {args.q.dim(0), args.q.dim(1), args.q.dim(2)}, Rows::kStrided, "attention", "y");
  require_disjoint(args.y, args.q, "attention", "y", "q");
  require(std::isfinite(args.scale), ErrorKind::kOption, "attention: scale must be finite, got ", args.scale);
  for (size_t i = 0; i < args.segments.size(); ++i) check_segment(args, i);
  check_rows_disjoint(args.segments);
}

}  // namespace llama_ext
