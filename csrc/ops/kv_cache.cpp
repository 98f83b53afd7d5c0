#include "ops/kv_cache.h"

#include "ops/argument_checks.h"

namespace llama_ext {
namespace {

/// k and v are (T, K, D) of this cache, and [position, position + T) of `layer` exists.
template <typename Args>
void check_place(const Args& args, Rows rows, std::string_view op) {
  require(args.cache != nullptr, ErrorKind::kInternal, op, ": cache is missing");
  const KvCacheShape& shape = args.cache->shape();
  require_tensor(args.k, DType::kF32, {-1, shape.kv_heads, shape.head_dim}, rows, op, "k");
  require_tensor(args.v, DType::kF32, {args.k.rows(), shape.kv_heads, shape.head_dim}, rows, op, "v");
  require(args.layer >= 0 && args.layer < shape.layers, ErrorKind::kShape, op, ": layer ", args.layer,
          " does not exist, the cache has ", shape.layers, " layers");
  const int64_t count = args.k.rows();
  require(args.position >= 0 && count <= shape.capacity && args.position <= shape.capacity - count,
          ErrorKind::kContextLength, op, ": ", count, " tokens from position ", args.position,
          " on do not fit in a cache of ", shape.capacity, " positions. Create it with a larger capacity.");
}

}  // namespace

void check(const KvStoreArgs& args) { check_place(args, Rows::kStrided, "kv_store"); }

void check(const KvLoadArgs& args) {
  check_place(args, Rows::kContiguous, "kv_load");
  require_disjoint(args.v, args.k, "kv_load", "v", "k");
}

}  // namespace llama_ext
