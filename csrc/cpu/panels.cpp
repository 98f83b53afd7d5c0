#include "cpu/panels.h"

namespace llama_ext {
namespace {

size_t matrix_bytes(int64_t rows, int64_t k_padded, DType dtype) {
  const int64_t elements = checked_mul(round_up(rows, kPanel), k_padded, "matrix");
  return static_cast<size_t>(checked_mul(elements, static_cast<int64_t>(size_of(dtype)), "matrix"));
}

int64_t head_elements(const KvCacheShape& shape) {
  const int64_t per_position = checked_add(shape.head_dim, round_up(shape.head_dim, kPanel), "KV cache");
  return checked_mul(round_up(shape.capacity, kPanel), per_position, "KV cache");
}

}  // namespace

PanelMatrix::PanelMatrix(int64_t rows, int64_t cols, DType dtype)
    : Matrix(rows, cols, dtype),
      k_padded_(dtype == DType::kBF16 ? round_up(cols, kPanel) : cols),
      buffer_(matrix_bytes(rows, k_padded_, dtype), "a weight matrix") {}

PanelKvCache::PanelKvCache(const KvCacheShape& shape)
    : KvCache(shape),
      positions_(round_up(shape.capacity, kPanel)),
      head_size_(head_elements(shape)),
      buffer_(static_cast<size_t>(nbytes_for(shape)), "the KV cache") {}

int64_t PanelKvCache::nbytes_for(const KvCacheShape& shape) {
  const int64_t heads = checked_mul(shape.layers, shape.kv_heads, "KV cache");
  const int64_t elements = checked_mul(heads, head_elements(shape), "KV cache");
  return checked_mul(elements, static_cast<int64_t>(size_of(shape.dtype)), "KV cache");
}

}  // namespace llama_ext
