// The keys and values of one sequence, in whatever layout its backend likes best, and the operation that writes them.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "core/dtype.h"
#include "core/tensor_view.h"

namespace llama_ext {

struct KvCacheShape {
  int64_t layers = 0;
  int64_t kv_heads = 0;       // K
  int64_t head_dim = 0;       // D
  int64_t capacity = 0;       // positions
  DType dtype = DType::kF32;  // f32 | bf16 | i8
};

/// Storage only: how many of its positions hold something is known to its owner (model/session.h).
class KvCache {
 public:
  virtual ~KvCache() = default;
  const KvCacheShape& shape() const { return shape_; }
  virtual int64_t nbytes() const = 0;

 protected:
  explicit KvCache(const KvCacheShape& shape) : shape_(shape) {}

 private:
  KvCacheShape shape_;
};

/// Consecutive tokens of one sequence: rows [row, row + tokens) of a pass, at positions [position, position + tokens) of `cache`.
struct KvSegment {
  KvCache* cache = nullptr;
  int64_t row = 0;
  int64_t tokens = 0;
  int64_t position = 0;
  /// The device's memory, or none: the position is read there, and `position` is the largest that it may be. For one token.
  const int32_t* live_position = nullptr;
};

/// Writes the keys and values of a pass: cache[layer, :, position + t, :] = k[row + t], v[row + t] of each segment, rounded to
/// the cache's dtype; for int8 with a scale for each position and head (quant/kv_row.h). With cos and sin, k and q are rotated
/// first, in place (rope.h), so that a row is met once.
/// k, v: (M, K, D) f32, rows may be strided. q: (M, H, D) likewise, H a multiple of K, or none. cos, sin: (M, D/2), or none; where
/// positions are live (of all segments or of none), (P, D/2) by position.
/// Segments' rows are disjoint; rows of no segment are left alone. Overwrites what was there.
/// Throws ShapeError, DTypeError, ContextLengthError.
struct KvStoreArgs {
  std::vector<KvSegment> segments;
  int64_t layer = 0;
  TensorView k;
  TensorView v;
  TensorView q = {};
  TensorView cos = {};
  TensorView sin = {};
};

/// The same places read back as float32 (bf16 and i8 widen exactly): k, v: (T, K, D) f32, contiguous. For saving a session
/// and for tests.
struct KvLoadArgs {
  const KvCache* cache = nullptr;
  int64_t layer = 0;
  int64_t position = 0;
  TensorView k;
  TensorView v;
};

void check(const KvStoreArgs& args);
void check(const KvLoadArgs& args);
/// Of Backend::copy_kv_cache. Throws ShapeError, DTypeError, ContextLengthError.
void check_copy(const KvCache& target, const KvCache& source, int64_t length);

/// What operations on segments share: caches of (kv_heads, head_dim) and one dtype that have `layer` and the positions; rows below
/// `rows`, none in two segments.
void check_segments(const std::vector<KvSegment>& segments, int64_t layer, int64_t rows, int64_t head_dim,
                    std::string_view op);

}  // namespace llama_ext
