#include "reference/storage.h"

#include <bit>
#include <cmath>
#include <cstdlib>

#include "core/checked.h"
#include "core/half.h"

namespace llama_ext::reference {
namespace {

constexpr size_t kAlignment = 64;

DType storage_dtype(const WeightType& type) { return type.is_quantized() ? DType::kF64 : type.dtype(); }

/// Bytes of the keys, or of the values, of all layers.
int64_t kv_nbytes(const KvCacheShape& shape) {
  require(shape.dtype == DType::kF32 || shape.dtype == DType::kBF16, ErrorKind::kDType,
          "a KV cache must be float32 or bfloat16, got ", name_of(shape.dtype));
  const int64_t positions = checked_mul(shape.layers, shape.capacity, "KV cache");
  const int64_t row = checked_mul(shape.kv_heads, shape.head_dim, "KV cache");
  const int64_t elements = checked_mul(positions, row, "KV cache");
  const int64_t nbytes = checked_mul(elements, static_cast<int64_t>(size_of(shape.dtype)), "KV cache");
  checked_mul(nbytes, 2, "KV cache");
  return nbytes;
}

}  // namespace

HostMemory::HostMemory(size_t nbytes) : aligned_(nullptr) {
  require(nbytes <= PTRDIFF_MAX - kAlignment, ErrorKind::kOutOfMemory, "reference: cannot allocate ", nbytes, " bytes");
  memory_.reset(std::calloc(nbytes + kAlignment, 1));
  require(memory_ != nullptr, ErrorKind::kOutOfMemory, "reference: cannot allocate ", nbytes, " bytes");
  size_t space = nbytes + kAlignment;
  aligned_ = memory_.get();
  std::align(kAlignment, nbytes, aligned_, space);
}

int64_t ReferenceMatrix::nbytes_for(int64_t rows, int64_t cols, WeightType type) {
  return checked_mul(checked_mul(rows, cols, "matrix"), static_cast<int64_t>(size_of(storage_dtype(type))), "matrix");
}

ReferenceMatrix::ReferenceMatrix(int64_t rows, int64_t cols, WeightType type)
    : Matrix(rows, cols, type),
      dtype_(storage_dtype(type)),
      nbytes_(nbytes_for(rows, cols, type)),
      memory_(static_cast<size_t>(nbytes_)) {}

void ReferenceMatrix::load_row(int64_t index, double* out) const {
  for (int64_t k = 0; k < cols(); ++k) out[k] = load_element(data(), dtype(), index * cols() + k);
}

int64_t ReferenceKvCache::nbytes_for(const KvCacheShape& shape) { return 2 * kv_nbytes(shape); }

ReferenceKvCache::ReferenceKvCache(const KvCacheShape& shape)
    : KvCache(shape),
      half_nbytes_(kv_nbytes(shape)),
      keys_(static_cast<size_t>(half_nbytes_)),
      values_(static_cast<size_t>(half_nbytes_)) {}

int64_t ReferenceKvCache::offset(int64_t layer, int64_t position) const {
  return (layer * shape().capacity + position) * shape().kv_heads * shape().head_dim;
}

const ReferenceMatrix& own(const Matrix& matrix, std::string_view op) {
  const auto* mine = dynamic_cast<const ReferenceMatrix*>(&matrix);
  require(mine != nullptr, ErrorKind::kDevice, op, ": the matrix belongs to another backend than 'reference'");
  return *mine;
}

const ReferenceKvCache& own(const KvCache& cache, std::string_view op) {
  const auto* mine = dynamic_cast<const ReferenceKvCache*>(&cache);
  require(mine != nullptr, ErrorKind::kDevice, op, ": the KV cache belongs to another backend than 'reference'");
  return *mine;
}

double load_element(const void* data, DType dtype, int64_t index) {
  switch (dtype) {
    case DType::kF64:
      return static_cast<const double*>(data)[index];
    case DType::kF32:
      return static_cast<double>(static_cast<const float*>(data)[index]);
    case DType::kBF16:
      return static_cast<double>(bf16_to_f32(static_cast<const uint16_t*>(data)[index]));
    case DType::kF16:
      return static_cast<double>(f16_to_f32(static_cast<const uint16_t*>(data)[index]));
    case DType::kI32:
      return static_cast<double>(static_cast<const int32_t*>(data)[index]);
  }
  fail(ErrorKind::kInternal, "reference: unknown dtype");
}

void store_element(void* data, DType dtype, int64_t index, double value) {
  switch (dtype) {
    case DType::kF64:
      static_cast<double*>(data)[index] = value;
      return;
    case DType::kF32:
      static_cast<float*>(data)[index] = static_cast<float>(value);
      return;
    case DType::kBF16:
      static_cast<uint16_t*>(data)[index] = f64_to_bf16(value);
      return;
    case DType::kF16:
      static_cast<uint16_t*>(data)[index] = f64_to_f16(value);
      return;
    case DType::kI32:
      break;
  }
  fail(ErrorKind::kInternal, "reference: nothing is stored as ", name_of(dtype));
}

}  // namespace llama_ext::reference
