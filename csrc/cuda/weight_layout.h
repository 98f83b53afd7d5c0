// How weights lie in the GPU's memory: index arithmetic that hosts and kernels share.
//
// Row after row, each padded with zeros to kPad elements, so that 16 bytes are loaded at once wherever a row begins. Floating
// point as it is. Codes of 8 bits as bytes; of 4, 5 and 6 bits in chunks of 32: 16 bytes of low nibbles (byte i: code i, and
// above it code i + 16), and in planes of their own a word for the fifth bits of the 32 codes and one for the sixth. Scales and
// minima, float16, by row; superblocks have theirs, and a byte for each group.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace llama_ext::cuda {

inline constexpr int kPad = 32;
inline constexpr int kChunk = 32;  // codes whose bits lie together

enum class Kind : uint8_t { kF32, kF16, kBF16, kQ8, kQ4, kQ5, kQ6 };

constexpr bool is_quantized(Kind kind) { return kind >= Kind::kQ8; }
constexpr int high_bits(Kind kind) { return kind == Kind::kQ5 ? 1 : kind == Kind::kQ6 ? 2 : 0; }

/// A matrix as kernels take it. Byte offsets of its parts within one allocation.
struct WeightView {
  const unsigned char* data = nullptr;
  Kind kind = Kind::kF32;
  bool has_min = false;
  bool has_superblocks = false;
  bool signed_sub_scales = false;
  int zero = 0;
  int rows = 0;
  int cols = 0;
  int stride = 0;  // elements of a padded row
  int group = 0;   // elements that share a scale
  int unit = 0;    // elements that share a float16 scale
  int64_t high_at = 0;
  int64_t scales_at = 0;
  int64_t mins_at = 0;
  int64_t sub_scales_at = 0;
  int64_t sub_mins_at = 0;
  int64_t nbytes = 0;

  /// Bytes of a row's elements or low bits.
  __host__ __device__ int64_t row_bytes() const {
    switch (kind) {
      case Kind::kF32:
        return int64_t{4} * stride;
      case Kind::kF16:
      case Kind::kBF16:
        return int64_t{2} * stride;
      case Kind::kQ8:
        return stride;
      default:
        return stride / 2;
    }
  }
  __host__ __device__ int64_t row_at(int64_t row) const { return row * row_bytes(); }
  __host__ __device__ int planes() const { return kind == Kind::kQ5 ? 1 : kind == Kind::kQ6 ? 2 : 0; }
  /// Of the words of high bits of a chunk of a row.
  __host__ __device__ int64_t high_words_at(int64_t row, int chunk) const {
    return high_at + 4 * ((row * (stride / kChunk) + chunk) * planes());
  }
  __host__ __device__ int units() const { return unit == 0 ? 0 : stride / unit; }
  __host__ __device__ int groups() const { return group == 0 ? 0 : stride / group; }
};

/// Rows [first, first + count) of a matrix, where they lie.
inline WeightView slice_rows(WeightView w, int64_t first, int64_t count) {
  const int64_t begin = w.row_at(first);
  w.high_at = w.high_words_at(first, 0) - begin;
  w.scales_at += 2 * first * w.units() - begin;
  w.mins_at += 2 * first * w.units() - begin;
  w.sub_scales_at += first * w.groups() - begin;
  w.sub_mins_at += first * w.groups() - begin;
  w.data += begin;
  w.rows = static_cast<int>(count);
  return w;
}

/// Where code i of a chunk of 32 has its low nibble.
__host__ __device__ constexpr int nibble_byte(int i) { return i % 16; }
__host__ __device__ constexpr int nibble_shift(int i) { return i < 16 ? 0 : 4; }

/// Activations in shared memory, in vectors of 4. A lane reads the `parts` vectors of its chunk one after the other, and eight
/// lanes at once: stored in this order they meet in no bank. parts: 1, 2, 4 or 8.
__host__ __device__ constexpr int activation_place(int chunk, int part, int parts) {
  return chunk * parts + (part ^ ((chunk * parts / 8) & (parts - 1)));
}

}  // namespace llama_ext::cuda
