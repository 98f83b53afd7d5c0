// How keys and values lie in the GPU's memory: by layer, by head, by position, so that a head's keys are one run of memory.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace llama_ext::cuda {

enum class KvKind : uint8_t { kF32, kBF16, kI8 };

/// One layer of a cache. A row is a position of a head: head_dim elements, padded with zeros to 16 bytes. int8 rows have
/// float32 scales, (kv_heads, capacity).
struct KvLayerView {
  unsigned char* keys = nullptr;
  unsigned char* values = nullptr;
  float* key_scales = nullptr;
  float* value_scales = nullptr;
  KvKind kind = KvKind::kF32;
  int kv_heads = 0;
  int head_dim = 0;
  int row_bytes = 0;
  int64_t capacity = 0;

  __host__ __device__ int64_t row(int head, int64_t position) const { return head * capacity + position; }
};

constexpr int element_bytes(KvKind kind) { return kind == KvKind::kF32 ? 4 : kind == KvKind::kBF16 ? 2 : 1; }
constexpr int kv_row_bytes(KvKind kind, int64_t head_dim) {
  return static_cast<int>((head_dim * element_bytes(kind) + 15) / 16 * 16);
}

struct KvSegmentView {
  KvLayerView layer;
  int64_t row = 0;
  int64_t tokens = 0;
  int64_t position = 0;
  const int32_t* live_position = nullptr;  // or null: `position` is an upper bound then

  __device__ int64_t first_position() const { return live_position == nullptr ? position : int64_t{*live_position}; }
};

}  // namespace llama_ext::cuda
