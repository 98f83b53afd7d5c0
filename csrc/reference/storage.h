// Memory of the reference backend: everything row-major, each element in its own dtype.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string_view>

#include "backend/backend.h"

namespace llama_ext::reference {

/// Zero-filled memory, aligned to 64 bytes, whose pages are only touched by use. Throws OutOfMemoryError.
class HostMemory {
 public:
  explicit HostMemory(size_t nbytes);
  void* data() const { return aligned_; }

 private:
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  std::unique_ptr<void, Free> memory_;
  void* aligned_;
};

class ReferenceBuffer final : private HostMemory, public Buffer {
 public:
  explicit ReferenceBuffer(size_t nbytes) : HostMemory(nbytes), Buffer(HostMemory::data(), nbytes) {}
};

class ReferenceMatrix final : public Matrix {
 public:
  /// Quantised weights are kept as the float64 numbers they stand for.
  ReferenceMatrix(int64_t rows, int64_t cols, WeightType type);
  static int64_t nbytes_for(int64_t rows, int64_t cols, WeightType type);
  /// Of an element in memory.
  DType dtype() const { return dtype_; }
  int64_t nbytes() const override { return nbytes_; }
  void* data() const { return memory_.data(); }
  /// Widens row `index` to `out` (cols).
  void load_row(int64_t index, double* out) const;

 private:
  DType dtype_;
  int64_t nbytes_;
  HostMemory memory_;
};

class ReferenceKvCache final : public KvCache {
 public:
  explicit ReferenceKvCache(const KvCacheShape& shape);
  int64_t nbytes() const override { return 2 * half_nbytes_; }
  static int64_t nbytes_for(const KvCacheShape& shape);
  void* keys() const { return keys_.data(); }
  void* values() const { return values_.data(); }
  /// Index of the first element of (layer, position) in keys() and values(), which are (layers, capacity, K, D).
  int64_t offset(int64_t layer, int64_t position) const;

 private:
  int64_t half_nbytes_;
  HostMemory keys_;
  HostMemory values_;
};

/// Downcasts what this backend made; anything else throws DeviceError.
const ReferenceMatrix& own(const Matrix& matrix, std::string_view op);
const ReferenceKvCache& own(const KvCache& cache, std::string_view op);

/// Element `index` of `data`, exactly.
double load_element(const void* data, DType dtype, int64_t index);

/// Rounds `value` once, to nearest with ties to even.
void store_element(void* data, DType dtype, int64_t index, double value);

}  // namespace llama_ext::reference
