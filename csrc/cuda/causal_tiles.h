// Tiles of attention in training on the tensor cores (causal_attention_mma.cu, causal_attention_backward_mma.cu): how rounded rows come
// into shared memory and sums leave registers, and which weights dropout keeps.
#pragma once

#include "cuda/causal_ranges.h"
#include "cuda/fragments.h"
#include "ops/dropout.h"

namespace llama_ext::cuda {

inline constexpr unsigned kBlockThreads = 128;
inline constexpr int kBlockRows = 64;  // queries or keys of a block

/// Rounded inputs, (M, heads, kDim) with zeros beyond head_dim, and what the gradients need.
struct Rounded {
  const uint16_t* q = nullptr;
  const uint16_t* k = nullptr;
  const uint16_t* v = nullptr;
  const uint16_t* d_y = nullptr;
  const float* deltas = nullptr;  // (M, H)
};

/// A block's sequence, and the first of its tokens there: at most 2^20 (ops/causal_attention.h).
struct Sequence {
  int64_t row;
  int tokens;
  int first;
};
__device__ __forceinline__ Sequence find_block(const Ranges& ranges, unsigned block) {
  int64_t first = block;
  const TokenRange& range = ranges.find_block(first, kBlockRows);
  return {range.row, static_cast<int>(range.tokens), static_cast<int>(first)};
}

template <int kDim>
struct Tiles {
  static constexpr int kPitch = kDim + 8;
  static constexpr int kOutputs = kDim / 8;
  static constexpr int kTile = kBlockRows * kPitch;
  // Queries that pass by, for keys: as many as registers allow beside two sums.
  static constexpr int kQueries = kDim <= 64 ? 64 : 32;
  static constexpr int kQueryTile = kQueries * kPitch;

  /// Starts to bring `kCount` tokens of a head; zeros from `tokens` on.
  template <int kCount>
  __device__ __forceinline__ static void bring(const uint16_t* from, int64_t row, int heads, int head, int first,
                                               int tokens, uint16_t* tile) {
    constexpr int kVectors = kDim / 8;
#pragma unroll 1  // addresses of all at once would take registers from the sums
    for (int i = static_cast<int>(threadIdx.x); i < kCount * kVectors; i += static_cast<int>(kBlockThreads)) {
      const int token = i / kVectors;
      const int vector = i % kVectors;
      const bool is_there = first + token < tokens;
      const int64_t at = (row + (is_there ? first + token : 0)) * heads + head;
      copy_async(tile + token * kPitch + vector * 8, from + at * kDim + vector * 8, is_there);
    }
  }
};

/// sums (16, 8 kProducts) = rows of a times rows of b, over kDim.
template <int kDim, int kProducts>
__device__ __forceinline__ void multiply_rows(float sums[kProducts][4], FragmentTile<kDim + 8> a, int row,
                                              FragmentTile<kDim + 8> b) {
#pragma unroll
  for (int j = 0; j < kProducts; ++j) sums[j][0] = sums[j][1] = sums[j][2] = sums[j][3] = 0.0f;
#pragma unroll
  for (int step = 0; step < kDim / 16; ++step) {
    uint32_t left[4];
    a.load_a(left, row, step * 16);
#pragma unroll
    for (int j = 0; j < kProducts; j += 2) {
      uint32_t right[4];
      b.load_b(right, j * 8, step * 16);
      mma<MmaType::kBF16>(sums[j], left, right);
      mma<MmaType::kBF16>(sums[j + 1], left, right + 2);
    }
  }
}

/// sums (16, kDim) += weights (16, 8 kProducts), rounded, times the rows of b.
template <int kDim, int kProducts>
__device__ __forceinline__ void add_weighted(float sums[kDim / 8][4], const float weights[kProducts][4],
                                             FragmentTile<kDim + 8> b) {
#pragma unroll
  for (int step = 0; step < kProducts / 2; ++step) {
    uint32_t left[4];
    pack_a(left, weights[2 * step], weights[2 * step + 1]);
#pragma unroll
    for (int j = 0; j < kDim / 8; j += 2) {
      uint32_t right[4];
      b.load_b_across(right, step * 16, j * 8);
      mma<MmaType::kBF16>(sums[j], left, right);
      mma<MmaType::kBF16>(sums[j + 1], left, right + 2);
    }
  }
}

/// Which of a lane's weights dropout keeps, one bit for sums[j][c]: found in a loop of its own, as the registers are the sums'. index:
/// the weight's, of j and c.
template <int kProducts, typename Index>
__device__ __forceinline__ uint32_t kept_weights(const CausalView& a, const Index& index) {
  static_assert(4 * kProducts <= 32);
  if (a.threshold == 0) return 0xffffffffu;
  uint32_t kept = 0;
#pragma unroll 1
  for (int i = 0; i < 4 * kProducts; ++i) {
    kept |= static_cast<uint32_t>(dropout_bits(a.seed, index(i / 4, i % 4)) >= a.threshold) << i;
  }
  return kept;
}
__device__ __forceinline__ float drop(const CausalView& a, uint32_t kept, int j, int c, float weight) {
  return (kept >> (4 * j + c) & 1u) != 0 ? weight * a.kept_scale : 0.0f;
}
__device__ __forceinline__ uint64_t dropout_index(const CausalView& a, int64_t row, int head, int key) {
  return static_cast<uint64_t>((row * a.heads + head) * kDropoutPlaces + key);
}

/// A lane's part of 16 rows of a head: columns 2 t and 2 t + 1 of each product, of rows g and g + 8.
template <int kDim>
__device__ __forceinline__ void store_rows(Rows to, int64_t row, int first, int tokens, int head, int head_dim,
                                           const float sums[kDim / 8][4], const float factors[2]) {
  const int g = static_cast<int>(threadIdx.x % kWarp) / 4;
  const int t = static_cast<int>(threadIdx.x % kWarp) % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int token = first + 8 * half + g;
    if (token >= tokens) continue;
    float* out = to.row(row + token) + head * head_dim;
#pragma unroll
    for (int j = 0; j < kDim / 8; ++j) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int d = j * 8 + 2 * t + c;
        if (d < head_dim) out[d] = sums[j][2 * half + c] * factors[half];
      }
    }
  }
}

/// (M, heads, padded) from (M, heads, head_dim), rounded; padded: 64 or 128.
void round_heads(const Gpu& gpu, Rows x, int64_t rows, int heads, int head_dim, int padded, uint16_t* y);

/// Memory for rounded tensors of M rows, and the kernels that fill it.
template <int kDim>
struct RoundedHeads {
  Scratch memory;

  RoundedHeads(const Gpu& gpu, Rows x, int64_t rows, int heads, int head_dim)
      : memory(gpu, static_cast<size_t>(rows * heads * kDim) * sizeof(uint16_t)) {
    round_heads(gpu, x, rows, heads, head_dim, kDim, memory.as<uint16_t>());
  }
  const uint16_t* data() const { return memory.as<uint16_t>(); }
};

inline dim3 grid_of(const Ranges& list, int heads) {
  return dim3(static_cast<unsigned>(list.blocks(kBlockRows)), static_cast<unsigned>(heads));
}

}  // namespace llama_ext::cuda
