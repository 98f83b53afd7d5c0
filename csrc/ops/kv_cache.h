// The keys and values of one sequence, in whatever layout its backend likes best, and the operation that writes them.
#pragma once

#include <cstdint>

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

/// Writes T positions of one layer: cache[layer, :, position + t, :] = k[t], v[t], rounded to the cache's dtype; for
/// int8 with a scale for each position and head (quant/kv_row.h).
/// k, v: (T, K, D) f32, rows may be strided. position >= 0, position + T <= capacity. Overwrites what was there.
/// Throws ShapeError, DTypeError, ContextLengthError.
struct KvStoreArgs {
  KvCache* cache = nullptr;
  int64_t layer = 0;
  int64_t position = 0;
  TensorView k;
  TensorView v;
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

}  // namespace llama_ext
