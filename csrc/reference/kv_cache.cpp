#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "quant/kv_row.h"
#include "reference/reference_ops.h"
#include "reference/storage.h"

namespace llama_ext::reference {
namespace {

/// One head of one position, rounded to int8 and kept as what that stands for.
void store_int8(const ReferenceKvCache& cache, int64_t offset, const float* k, const float* v) {
  const int64_t dim = cache.shape().head_dim;
  std::vector<int8_t> codes(static_cast<size_t>(dim));
  for (const auto& [data, from] : {std::pair{cache.keys(), k}, {cache.values(), v}}) {
    const float scale = quantize_kv(from, dim, codes.data());
    for (int64_t d = 0; d < dim; ++d) {
      static_cast<float*>(data)[offset + d] = static_cast<float>(codes[static_cast<size_t>(d)]) * scale;
    }
  }
}

}  // namespace

void ReferenceBackend::copy_kv_cache(KvCache& target, const KvCache& source, int64_t length) {
  const ReferenceKvCache& to = own(target, "copy_kv_cache");
  const ReferenceKvCache& from = own(source, "copy_kv_cache");
  const KvCacheShape& a = target.shape();
  check_copy(target, source, length);
  if (&to == &from) return;
  const size_t element = size_of(kv_storage_dtype(a.dtype));
  const size_t nbytes = static_cast<size_t>(length * a.kv_heads * a.head_dim) * element;
  if (nbytes == 0) return;
  const auto copy_layer = [&](void* target_data, const void* source_data, int64_t layer) {
    std::memcpy(static_cast<char*>(target_data) + static_cast<size_t>(to.offset(layer, 0)) * element,
                static_cast<const char*>(source_data) + static_cast<size_t>(from.offset(layer, 0)) * element, nbytes);
  };
  for (int64_t layer = 0; layer < a.layers; ++layer) {
    copy_layer(to.keys(), from.keys(), layer);
    copy_layer(to.values(), from.values(), layer);
  }
}

void ReferenceBackend::kv_store(const KvStoreArgs& args) {
  check(args);
  const int64_t size = args.k.inner_size();
  const auto rotate = [&](const TensorView& x, int64_t row) {
    const auto one = [row](const TensorView& view) { return view.slice_rows(row, 1); };
    if (args.cos && x) rope({.x = one(x), .cos = one(args.cos), .sin = one(args.sin)});
  };
  for (const KvSegment& segment : args.segments) {
    const ReferenceKvCache& cache = own(*segment.cache, "kv_store");
    const DType dtype = kv_storage_dtype(cache.shape().dtype);
    for (int64_t t = 0; t < segment.tokens; ++t) {
      const int64_t row = segment.row + t;
      rotate(args.k, row);
      rotate(args.q, row);
      const float* k = args.k.row<float>(row);
      const float* v = args.v.row<float>(row);
      const int64_t offset = cache.offset(args.layer, segment.position + t);
      if (cache.shape().dtype == DType::kI8) {
        for (int64_t head = 0; head < cache.shape().kv_heads; ++head) {
          const int64_t begin = head * cache.shape().head_dim;
          store_int8(cache, offset + begin, k + begin, v + begin);
        }
        continue;
      }
      for (int64_t i = 0; i < size; ++i) {
        store_element(cache.keys(), dtype, offset + i, static_cast<double>(k[i]));
        store_element(cache.values(), dtype, offset + i, static_cast<double>(v[i]));
      }
    }
  }
}

void ReferenceBackend::kv_load(const KvLoadArgs& args) {
  check(args);
  const ReferenceKvCache& cache = own(*args.cache, "kv_load");
  const DType dtype = kv_storage_dtype(cache.shape().dtype);
  const int64_t size = args.k.inner_size();
  for (int64_t t = 0; t < args.k.rows(); ++t) {
    const int64_t offset = cache.offset(args.layer, args.position + t);
    for (int64_t i = 0; i < size; ++i) {
      args.k.row<float>(t)[i] = static_cast<float>(load_element(cache.keys(), dtype, offset + i));
      args.v.row<float>(t)[i] = static_cast<float>(load_element(cache.values(), dtype, offset + i));
    }
  }
}

}  // namespace llama_ext::reference
