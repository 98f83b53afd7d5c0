// Weights in the GPU's memory, in the layout of weight_layout.h: how rows get in and out.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <vector>

#include "backend/backend.h"
#include "cuda/runtime.h"
#include "cuda/weight_layout.h"

namespace llama_ext::cuda {

/// The layout of a matrix, without memory. Throws LimitError when it is out of range, ShapeError for negative extents.
WeightView weight_layout(int64_t rows, int64_t cols, const WeightType& type);

/// One of the arrays that a matrix consists of; those of a row lie together.
struct Plane {
  int64_t begin;      // byte offset
  int64_t row_bytes;  // 0: there is none
};
inline constexpr size_t kPlanes = 6;  // elements or low bits, high bits, scales, minima, and of groups in superblocks
std::array<Plane, kPlanes> planes_of(const WeightView& layout);

class CudaMatrix final : public Matrix {
 public:
  CudaMatrix(const std::shared_ptr<Gpu>& gpu, int64_t rows, int64_t cols, WeightType type);
  ~CudaMatrix() override;
  CudaMatrix(const CudaMatrix&) = delete;
  CudaMatrix& operator=(const CudaMatrix&) = delete;
  int64_t nbytes() const override { return view_.nbytes; }
  const WeightView& view() const { return view_; }
  const Gpu& gpu() const { return *gpu_; }
  unsigned char* data() const { return const_cast<unsigned char*>(view_.data); }

 private:
  std::shared_ptr<Gpu> gpu_;
  WeightView view_;
};

/// Rows of a matrix in host memory, plane by plane.
class HostRows {
 public:
  HostRows(const WeightView& layout, int64_t rows);
  /// A floating-point row, rounded. from: (cols).
  void store(int64_t row, const TensorView& source, int64_t index);
  void store(int64_t row, const QuantizedRow& codes);
  void load(int64_t row, const WeightType& type, QuantizedRow& codes) const;
  void load(int64_t row, float* out) const;
  const unsigned char* bytes(int64_t row) const;
  unsigned char* plane(size_t index) { return planes_[index].data(); }

 private:
  unsigned char* at(size_t plane, int64_t row) { return planes_[plane].data() + row * layout_planes_[plane].row_bytes; }
  const unsigned char* at(size_t plane, int64_t row) const {
    return planes_[plane].data() + row * layout_planes_[plane].row_bytes;
  }

  WeightView layout_;
  std::array<Plane, kPlanes> layout_planes_;
  std::array<std::vector<unsigned char>, kPlanes> planes_;
};

}  // namespace llama_ext::cuda
