// Where the CPU backend keeps weights, keys and values: in panels of 32 columns, the layout every kernel reads in one stream.
#pragma once

#include <cstddef>
#include <memory>
#include <span>

#include "core/checked.h"
#include "cpu/kernel_table.h"
#include "cpu/memory.h"
#include "ops/kv_cache.h"
#include "ops/matrix.h"
#include "quant/quantized_row.h"

namespace llama_ext {

/// W (N, K) as ceil(N / 32) panels: f32 and f16 [K][32]; bf16 [K' / 2][32][2], K' = K rounded up to 32; quantised: units of k, each
/// with its scales (CodeFormat). A panel's column is a row of W; what lies beyond N and K is zero.
class PanelMatrix final : public Matrix {
 public:
  PanelMatrix(int64_t rows, int64_t cols, WeightType type);
  /// Over memory that `owner` keeps. Throws CheckpointError for another number of bytes.
  PanelMatrix(int64_t rows, int64_t cols, WeightType type, std::span<const std::byte> packed,
              std::shared_ptr<const void> owner);

  int64_t nbytes() const override { return panels() * panel_bytes_; }
  /// Throws LimitError when it is out of range.
  static int64_t nbytes_for(int64_t rows, int64_t cols, WeightType type);
  int64_t panels() const { return ceil_div(rows(), kPanel); }
  int64_t k_padded() const { return k_padded_; }
  int64_t panel_bytes() const { return panel_bytes_; }
  /// Bytes of `depth` k of a panel, whole units.
  int64_t bytes_of(int64_t depth) const { return depth / unit_ * unit_bytes_; }
  std::span<const std::byte> bytes() const { return {data_, static_cast<size_t>(nbytes())}; }

  /// Whether its memory is its own, not a file's.
  bool owns_memory() const { return buffer_ != nullptr; }

  /// k0 of a panel, the first of a unit.
  const std::byte* panel_at(int64_t index, int64_t k0) const { return data_ + index * panel_bytes_ + bytes_of(k0); }
  /// Of floating-point panels.
  template <typename T>
  const T* panel(int64_t index) const {
    return reinterpret_cast<const T*>(data_ + index * panel_bytes_);
  }
  template <typename T>
  T* panel(int64_t index) {
    return const_cast<T*>(std::as_const(*this).panel<T>(index));
  }
  /// Place of W[row][k] within its panel, floating-point types.
  int64_t offset_in_panel(int64_t row, int64_t k) const {
    const int64_t lane = row % kPanel;
    return type().encoding == Encoding::kBF16 ? (k / 2 * kPanel + lane) * 2 + k % 2 : k * kPanel + lane;
  }

  /// One row, quantised types.
  void store_row(int64_t row, const QuantizedRow& from);
  void load_row(int64_t row, QuantizedRow& to) const;

 private:
  void measure();

  int64_t unit_ = 1;  // k
  int64_t unit_bytes_ = 0;
  int64_t k_padded_ = 0;
  int64_t panel_bytes_ = 0;
  std::unique_ptr<HostBuffer> buffer_;  // own memory,
  std::shared_ptr<const void> owner_;   // or that of a file
  const std::byte* data_ = nullptr;
};

/// The layout of PanelMatrix: a new name whenever it changes.
inline constexpr const char* kPanelLayout = "panels-32-v1";

/// Index of a quantised encoding in kCodeFormats.
constexpr int code_index(Encoding encoding) { return static_cast<int>(encoding) - static_cast<int>(Encoding::kInt8); }

/// Per layer and key/value head: keys as [P / 32][D][32], columns are positions; values as [ceil(D / 32)][P][32], columns are
/// dimensions. P: the capacity rounded up to 32. Both are panels of a product, QK^T and PV. bf16 and int8 lie in pairs of
/// neighbouring rows, [P / 32][D' / 2][32][2] and [ceil(D / 32)][P / 2][32][2], D' = D rounded up to 2; int8 has (P) f32 scales
/// of keys and (P) of values after them.
class PanelKvCache final : public KvCache {
 public:
  explicit PanelKvCache(const KvCacheShape& shape);

  int64_t nbytes() const override { return static_cast<int64_t>(buffer_.nbytes()); }
  /// Throws LimitError when it is out of range.
  static int64_t nbytes_for(const KvCacheShape& shape);
  int64_t positions() const { return positions_; }
  int64_t v_panels() const { return ceil_div(shape().head_dim, kPanel); }
  int64_t v_panel_stride() const { return positions_ * kPanel; }
  bool has_pairs() const { return shape().dtype != DType::kF32; }
  /// D of the keys' panels.
  int64_t key_dim() const { return has_pairs() ? round_up(shape().head_dim, 2) : shape().head_dim; }

  /// Element of the keys, and of the values, of (position, d).
  int64_t key_offset(int64_t position, int64_t d) const {
    const int64_t panel = position / kPanel * kPanel * key_dim();
    return has_pairs() ? panel + (d / 2 * kPanel + position % kPanel) * 2 + d % 2
                       : panel + d * kPanel + position % kPanel;
  }
  int64_t value_offset(int64_t position, int64_t d) const {
    const int64_t panel = d / kPanel * v_panel_stride();
    return has_pairs() ? panel + (position / 2 * kPanel + d % kPanel) * 2 + position % 2
                       : panel + position * kPanel + d % kPanel;
  }

  template <typename T>
  T* keys(int64_t layer, int64_t head) {
    return reinterpret_cast<T*>(head_bytes_at(layer, head));
  }
  template <typename T>
  const T* keys(int64_t layer, int64_t head) const {
    return reinterpret_cast<const T*>(head_bytes_at(layer, head));
  }
  template <typename T>
  T* values(int64_t layer, int64_t head) {
    return keys<T>(layer, head) + positions_ * key_dim();
  }
  template <typename T>
  const T* values(int64_t layer, int64_t head) const {
    return keys<T>(layer, head) + positions_ * key_dim();
  }
  /// int8: of the keys; those of the values follow, `positions()` later.
  float* scales(int64_t layer, int64_t head) {
    return reinterpret_cast<float*>(head_bytes_at(layer, head) + scales_at_);
  }
  const float* scales(int64_t layer, int64_t head) const {
    return reinterpret_cast<const float*>(head_bytes_at(layer, head) + scales_at_);
  }

 private:
  char* head_bytes_at(int64_t layer, int64_t head) const {
    return static_cast<char*>(buffer_.data()) + (layer * shape().kv_heads + head) * head_bytes_;
  }

  int64_t positions_;
  int64_t scales_at_;   // bytes of one head's keys and values
  int64_t head_bytes_;  // with their scales
  HostBuffer buffer_;
};

}  // namespace llama_ext
