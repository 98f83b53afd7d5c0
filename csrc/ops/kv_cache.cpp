#include "ops/kv_cache.h"

#include <algorithm>
#include <utility>

#include "ops/argument_checks.h"

namespace llama_ext {
namespace {

void check_positions(const KvCacheShape& shape, int64_t position, int64_t count, std::string_view where) {
  require(position >= 0 && count <= shape.capacity && position <= shape.capacity - count, ErrorKind::kContextLength,
          where, ": ", count, " tokens from position ", position, " on do not fit in a cache of ", shape.capacity,
          " positions. Create it with a larger capacity.");
}

void check_layer(const KvCacheShape& shape, int64_t layer, std::string_view where) {
  require(layer >= 0 && layer < shape.layers, ErrorKind::kShape, where, ": layer ", layer,
          " does not exist, the cache has ", shape.layers, " layers");
}

}  // namespace

void check_copy(const KvCache& target, const KvCache& source, int64_t length) {
  const KvCacheShape& a = target.shape();
  const KvCacheShape& b = source.shape();
  require(a.layers == b.layers && a.kv_heads == b.kv_heads && a.head_dim == b.head_dim, ErrorKind::kShape,
          "copy_kv_cache: caches may differ in capacity only, got (layers, kv_heads, head_dim) = (", a.layers, ", ",
          a.kv_heads, ", ", a.head_dim, ") and (", b.layers, ", ", b.kv_heads, ", ", b.head_dim, ")");
  require(a.dtype == b.dtype, ErrorKind::kDType, "copy_kv_cache: caches must have one dtype, got ", name_of(a.dtype),
          " and ", name_of(b.dtype));
  require(length >= 0 && length <= a.capacity && length <= b.capacity, ErrorKind::kContextLength,
          "copy_kv_cache: ", length, " positions do not fit; the capacities are ", a.capacity, " and ", b.capacity);
}

void check_segments(const std::vector<KvSegment>& segments, int64_t layer, int64_t rows, int64_t head_dim,
                    std::string_view op) {
  std::vector<std::pair<int64_t, int64_t>> ranges;  // two segments that write the same rows would race
  ranges.reserve(segments.size());
  for (size_t i = 0; i < segments.size(); ++i) {
    const KvSegment& segment = segments[i];
    require(segment.cache != nullptr, ErrorKind::kInternal, op, ": segment ", i, " has no cache");
    const KvCacheShape& shape = segment.cache->shape();
    const KvCacheShape& first = segments.front().cache->shape();
    require(shape.head_dim == head_dim, ErrorKind::kShape, op, ": the cache of segment ", i,
            " must have a head dimension of ", head_dim, ", got ", shape.head_dim);
    require(shape.kv_heads == first.kv_heads && shape.dtype == first.dtype, ErrorKind::kShape, op,
            ": the caches of one call must have the same key/value heads and dtype; that of segment ", i, " differs");
    check_layer(shape, layer, op);
    require(segment.row >= 0 && segment.tokens >= 0 && segment.tokens <= rows && segment.row <= rows - segment.tokens,
            ErrorKind::kShape, op, ": segment ", i, " covers rows [", segment.row, ", ", segment.row, " + ",
            segment.tokens, "), there are ", rows);
    check_positions(shape, segment.position, segment.tokens, op);
    require(segment.live_position == nullptr || segment.tokens == 1, ErrorKind::kInternal, op, ": segment ", i,
            " has a live position and ", segment.tokens, " tokens, it must have one");
    require((segment.live_position != nullptr) == (segments.front().live_position != nullptr), ErrorKind::kInternal, op,
            ": positions are live in all segments or in none");
    if (segment.tokens > 0) ranges.emplace_back(segment.row, segment.row + segment.tokens);
  }
  std::sort(ranges.begin(), ranges.end());
  for (size_t i = 1; i < ranges.size(); ++i) {
    require(ranges[i - 1].second <= ranges[i].first, ErrorKind::kShape, op, ": row ", ranges[i].first,
            " belongs to two segments");
  }
}

void check(const KvStoreArgs& args) {
  require_tensor(args.k, DType::kF32, {-1, -1, -1}, Rows::kStrided, "kv_store", "k");
  const int64_t rows = args.k.rows();
  const int64_t kv_heads = args.k.dim(1);
  const int64_t head_dim = args.k.dim(2);
  require_tensor(args.v, DType::kF32, {rows, kv_heads, head_dim}, Rows::kStrided, "kv_store", "v");
  check_segments(args.segments, args.layer, rows, head_dim, "kv_store");
  for (const KvSegment& segment : args.segments) {
    require(segment.cache->shape().kv_heads == kv_heads, ErrorKind::kShape, "kv_store: k has ", kv_heads,
            " heads, the cache ", segment.cache->shape().kv_heads);
  }
  if (!args.cos && args.cos.rank() == 0) {
    require(args.q.rank() == 0 && args.sin.rank() == 0, ErrorKind::kInternal, "kv_store: q and sin need cos");
    return;
  }
  require(head_dim % 2 == 0, ErrorKind::kShape, "kv_store: a rotated head dimension must be even, got ", head_dim);
  const bool is_live = !args.segments.empty() && args.segments.front().live_position != nullptr;
  const int64_t angles = is_live ? args.cos.rows() : rows;
  require_tensor(args.cos, DType::kF32, {angles, head_dim / 2}, Rows::kContiguous, "kv_store", "cos");
  require_tensor(args.sin, DType::kF32, {angles, head_dim / 2}, Rows::kContiguous, "kv_store", "sin");
  for (const KvSegment& segment : args.segments) {
    require(!is_live || segment.position < angles, ErrorKind::kShape, "kv_store: cos has ", angles,
            " positions, a token may have position ", segment.position);
  }
  if (args.q.rank() == 0) return;
  require_tensor(args.q, DType::kF32, {rows, -1, head_dim}, Rows::kStrided, "kv_store", "q");
  require(kv_heads > 0 ? args.q.dim(1) % kv_heads == 0 : args.q.dim(1) == 0, ErrorKind::kShape,
          "kv_store: ", args.q.dim(1), " heads of q are not a multiple of the ", kv_heads, " of k");
  require_disjoint(args.q, args.k, "kv_store", "q", "k");
}

void check(const KvLoadArgs& args) {
  require(args.cache != nullptr, ErrorKind::kInternal, "kv_load: cache is missing");
  const KvCacheShape& shape = args.cache->shape();
  require_tensor(args.k, DType::kF32, {-1, shape.kv_heads, shape.head_dim}, Rows::kContiguous, "kv_load", "k");
  require_tensor(args.v, DType::kF32, {args.k.rows(), shape.kv_heads, shape.head_dim}, Rows::kContiguous, "kv_load",
                 "v");
  check_layer(shape, args.layer, "kv_load");
  check_positions(shape, args.position, args.k.rows(), "kv_load");
  require_disjoint(args.v, args.k, "kv_load", "v", "k");
}

}  // namespace llama_ext
