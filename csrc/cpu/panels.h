// Where the CPU backend keeps weights, keys and values: in panels of 32 columns, the layout every kernel reads in one stream.
#pragma once

#include <memory>

#include "core/checked.h"
#include "cpu/kernel_table.h"
#include "cpu/memory.h"
#include "ops/kv_cache.h"
#include "ops/matrix.h"

namespace llama_ext {

/// W (N, K) as ceil(N / 32) panels: f32 [K][32]; bf16 [K' / 2][32][2], K' = K rounded up to 32. A panel's column is a row
/// of W; what lies beyond N and K is zero.
class PanelMatrix final : public Matrix {
 public:
  PanelMatrix(int64_t rows, int64_t cols, DType dtype);

  int64_t nbytes() const override { return static_cast<int64_t>(buffer_.nbytes()); }
  int64_t panels() const { return ceil_div(rows(), kPanel); }
  int64_t k_padded() const { return k_padded_; }
  /// Elements of one panel.
  int64_t panel_size() const { return k_padded_ * kPanel; }

  template <typename T>
  T* panel(int64_t index) {
    return static_cast<T*>(buffer_.data()) + index * panel_size();
  }
  template <typename T>
  const T* panel(int64_t index) const {
    return static_cast<const T*>(buffer_.data()) + index * panel_size();
  }
  /// Row k0 of a panel; k0 even for bf16.
  const void* panel_at(int64_t index, int64_t k0) const {
    const int64_t offset = (index * panel_size() + k0 * kPanel) * static_cast<int64_t>(size_of(dtype()));
    return static_cast<const char*>(buffer_.data()) + offset;
  }
  /// Place of W[row][k] within its panel.
  int64_t offset_in_panel(int64_t row, int64_t k) const {
    const int64_t lane = row % kPanel;
    return dtype() == DType::kBF16 ? (k / 2 * kPanel + lane) * 2 + k % 2 : k * kPanel + lane;
  }

 private:
  int64_t k_padded_;
  HostBuffer buffer_;
};

/// Per layer and key/value head: keys as [P / 32][D][32], columns are positions; values as [ceil(D / 32)][P][32], columns are
/// dimensions. P: the capacity rounded up to 32. Both are panels of a product, QK^T and PV.
class PanelKvCache final : public KvCache {
 public:
  explicit PanelKvCache(const KvCacheShape& shape);

  int64_t nbytes() const override { return static_cast<int64_t>(buffer_.nbytes()); }
  /// Throws LimitError when it is out of range.
  static int64_t nbytes_for(const KvCacheShape& shape);
  int64_t positions() const { return positions_; }
  int64_t v_panels() const { return ceil_div(shape().head_dim, kPanel); }
  int64_t v_panel_stride() const { return positions_ * kPanel; }

  template <typename T>
  T* keys(int64_t layer, int64_t head) {
    return static_cast<T*>(buffer_.data()) + head_offset(layer, head);
  }
  template <typename T>
  const T* keys(int64_t layer, int64_t head) const {
    return static_cast<const T*>(buffer_.data()) + head_offset(layer, head);
  }
  template <typename T>
  T* values(int64_t layer, int64_t head) {
    return keys<T>(layer, head) + positions_ * shape().head_dim;
  }
  template <typename T>
  const T* values(int64_t layer, int64_t head) const {
    return keys<T>(layer, head) + positions_ * shape().head_dim;
  }

 private:
  int64_t head_offset(int64_t layer, int64_t head) const { return (layer * shape().kv_heads + head) * head_size_; }

  int64_t positions_;
  int64_t head_size_;  // elements of one head's keys and values
  HostBuffer buffer_;
};

}  // namespace llama_ext
