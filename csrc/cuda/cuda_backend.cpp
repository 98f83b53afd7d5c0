// Memory and the KV cache.
#include "cuda/cuda_backend.h"

#include <algorithm>

#include "core/checked.h"
#include "cuda/cuda_backend_internal.h"
#include "cuda/segments.h"

namespace llama_ext {

std::unique_ptr<Backend> make_cuda_backend(int index) {
  cuda::require_ranges_asked_for();
  return std::make_unique<cuda::CudaBackend>(index);
}

namespace cuda {
namespace {

KvKind kind_of(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return KvKind::kF32;
    case DType::kBF16:
      return KvKind::kBF16;
    case DType::kI8:
      return KvKind::kI8;
    default:
      fail(ErrorKind::kDType, "a KV cache must be float32, bfloat16 or int8, got ", name_of(dtype));
  }
}

/// Bytes of the keys, or of the values, of one layer: rows, then scales.
struct LayerBytes {
  int64_t rows;
  int64_t scales;
};
LayerBytes layer_bytes(const KvCacheShape& shape) {
  const KvKind kind = kind_of(shape.dtype);
  require(shape.head_dim <= INT32_MAX / 8 && shape.kv_heads <= INT32_MAX / 8, ErrorKind::kLimit,
          "KV cache: ", shape.kv_heads, " heads of ", shape.head_dim, " are out of range");
  const int64_t rows = checked_mul(shape.kv_heads, shape.capacity, "KV cache");
  const int64_t scales = kind == KvKind::kI8 ? checked_mul(rows, sizeof(float), "KV cache") : 0;
  return {checked_mul(rows, kv_row_bytes(kind, shape.head_dim), "KV cache"), round_up(scales, 16)};
}

/// Small caches come and go with every prompt, and may stay in the pool: cudaMalloc and cudaFree wait for the GPU, and for 285 MB they
/// took 3 ms of a prefill of 51. Up to a 64th of the GPU's memory is a small one: 2.2 GB of an H200's, 17,000 tokens of an 8B model.
Gpu::Source source_of_cache(const Gpu& gpu, int64_t nbytes) {
  constexpr int64_t kAlwaysFromPool = int64_t{256} << 20;
  const int64_t most = std::max(kAlwaysFromPool, static_cast<int64_t>(gpu.total_memory() / 64));
  return nbytes <= most ? Gpu::Source::kPool : Gpu::Source::kOwn;
}

}  // namespace

const CudaMatrix& own(const Matrix& matrix, const char* op) {
  const auto* mine = dynamic_cast<const CudaMatrix*>(&matrix);
  require(mine != nullptr, ErrorKind::kDevice, op, ": the matrix belongs to another device than the GPU");
  return *mine;
}

const CudaKvCache& own(const KvCache& cache, const char* op) {
  const auto* mine = dynamic_cast<const CudaKvCache*>(&cache);
  require(mine != nullptr, ErrorKind::kDevice, op, ": the KV cache belongs to another device than the GPU");
  return *mine;
}

std::string CudaBackend::isa() const {
#if defined(LLAMA_EXT_CUDA_EMULATED)
  return "emulated";
#else
  return cat("sm_", gpu_->capability());
#endif
}

void CudaBackend::require_memory(int64_t nbytes, const std::string& what) {
  Gpu::Memory memory = gpu_->memory();
  if (static_cast<size_t>(nbytes) > memory.available) {
    gpu_->trim();
    memory = gpu_->memory();
  }
  require(static_cast<size_t>(nbytes) <= memory.available, ErrorKind::kOutOfMemory, what, " needs ", nbytes,
          " bytes on ", device(), ", which has ", memory.available, " of ", memory.total, " bytes free");
}

void CudaBackend::copy(const TensorView& to, const TensorView& from) {
  const size_t size = size_of(from.dtype());
  const size_t width = static_cast<size_t>(from.inner_size()) * size;
  const size_t height = from.size() == 0 ? 0 : static_cast<size_t>(from.rows());
  if (to.is_contiguous() && from.is_contiguous()) {
    return gpu_->copy_on_device(to.data(), from.data(), width * height);
  }
  gpu_->copy_rows_on_device(to.data(), static_cast<size_t>(to.row_stride()) * size, from.data(),
                            static_cast<size_t>(from.row_stride()) * size, width, height);
}

void CudaBackend::zero(const TensorView& x) {
  const size_t width = static_cast<size_t>(x.inner_size()) * sizeof(float);
  const size_t height = x.size() == 0 ? 0 : static_cast<size_t>(x.rows());
  if (x.is_contiguous()) return gpu_->fill_zero(x.data(), width * height, width * height, height > 0 ? 1 : 0);
  gpu_->fill_zero(x.data(), static_cast<size_t>(x.row_stride()) * sizeof(float), width, height);
}

int64_t CudaKvCache::nbytes_for(const KvCacheShape& shape) {
  const LayerBytes bytes = layer_bytes(shape);
  const int64_t layer = checked_mul(checked_add(bytes.rows, bytes.scales, "KV cache"), 2, "KV cache");
  return checked_mul(layer, shape.layers, "KV cache");
}

CudaKvCache::CudaKvCache(const std::shared_ptr<Gpu>& gpu, const KvCacheShape& shape)
    : KvCache(shape),
      gpu_(gpu),
      nbytes_(nbytes_for(shape)),
      source_(source_of_cache(*gpu, nbytes_)),
      memory_(static_cast<unsigned char*>(gpu->allocate(static_cast<size_t>(nbytes_), "the KV cache", source_))) {}

KvLayerView CudaKvCache::layer(int64_t index) const {
  const LayerBytes bytes = layer_bytes(shape());
  unsigned char* begin = memory_ + 2 * index * (bytes.rows + bytes.scales);
  KvLayerView view;
  view.keys = begin;
  view.values = begin + bytes.rows;
  view.key_scales = reinterpret_cast<float*>(begin + 2 * bytes.rows);
  view.value_scales = reinterpret_cast<float*>(begin + 2 * bytes.rows + bytes.scales);
  view.kind = kind_of(shape().dtype);
  view.kv_heads = static_cast<int>(shape().kv_heads);
  view.head_dim = static_cast<int>(shape().head_dim);
  view.row_bytes = kv_row_bytes(view.kind, shape().head_dim);
  view.capacity = shape().capacity;
  return view;
}

std::unique_ptr<KvCache> CudaBackend::create_kv_cache(const KvCacheShape& shape) {
  std::call_once(arrived_once_, [this] {
    arrived_ = std::make_unique<CudaBuffer>(gpu_, sizeof(int) * kMostSegments * kMostDecodeHeads);
  });
  return std::make_unique<CudaKvCache>(gpu_, shape);
}

void CudaBackend::copy_kv_cache(KvCache& target, const KvCache& source, int64_t length) {
  const CudaKvCache& to = own(target, "copy_kv_cache");
  const CudaKvCache& from = own(source, "copy_kv_cache");
  const KvCacheShape& a = target.shape();
  check_copy(target, source, length);
  if (&to == &from || length == 0) return;
  for (int64_t index = 0; index < a.layers; ++index) {
    kv_copy(*gpu_, to.layer(index), from.layer(index), length);
  }
}

}  // namespace cuda
}  // namespace llama_ext
