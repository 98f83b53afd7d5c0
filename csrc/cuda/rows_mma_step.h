// The products of matmul_rows_mma.cu: a warp's step of 16 rows of W, from registers, times x from shared memory.
#pragma once

#include "cuda/mma.h"
#include "cuda/rows_mma.h"

namespace llama_ext::cuda::rows_mma {

/// Bytes 2 i and 2 i + 1 of a word as numbers.
__device__ __forceinline__ uint32_t byte_pair(uint32_t word, int i) {
#if defined(__CUDA_ARCH__)
  return __byte_perm(word, kBase, i == 0 ? 0x5150 : 0x5352);
#else
  const uint32_t bytes = word >> (16 * i);
  return (bytes & 255u) | (bytes >> 8 & 255u) << 16 | kBase;
#endif
}

/// Nibbles of bytes 0 and 2 of a word as numbers: the lower ones, or 16 times the upper ones.
__device__ __forceinline__ uint32_t nibble_pair(uint32_t word, bool upper, uint32_t base) {
  return upper ? and_or<0x00f000f0>(word, base) : and_or<0x000f000f>(word, base);
}

/// A step of two rows of W, in registers.
template <Kind kKind>
struct Step {
  uint4 words[2];
  uint32_t scales[2];  // float16, and so are minima
  uint32_t mins[2];

  /// Products m = 0, 1, ... of 16 k.
  static constexpr int kProducts = kChunkElements<kKind> / 4;

  __device__ __forceinline__ static uint32_t word(const uint4& of, int i) {
    return i == 0 ? of.x : i == 1 ? of.y : i == 2 ? of.z : of.w;
  }

  __device__ __forceinline__ void operand(int m, uint32_t base, uint32_t a[4]) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if constexpr (kKind == Kind::kBF16) {
        a[r] = word(words[r], 2 * m);
        a[2 + r] = word(words[r], 2 * m + 1);
      } else if constexpr (kKind == Kind::kQ8) {
        a[r] = byte_pair(word(words[r], m), 0);
        a[2 + r] = byte_pair(word(words[r], m), 1);
      } else {
        a[r] = nibble_pair(word(words[r], m / 2), m % 2 != 0, base);
        a[2 + r] = nibble_pair(word(words[r], m / 2) >> 8, m % 2 != 0, base);
      }
    }
  }
};

/// sums (16, 8) of a warp += a step of its rows of W times x. A lane's sums are of rows g and g + 8, columns 2 t and 2 t + 1. column_at:
/// the lane's numbers of x; excess_at, totals_at: of its columns.
template <Kind kKind, bool kHasMin>
__device__ __forceinline__ void multiply_step(float (&sums)[4], const Step<kKind>& w, uint32_t base,
                                              const uint16_t* column_at, const float* excess_at,
                                              const float* totals_at) {
  constexpr bool kIsCodes = is_quantized(kKind);
  float dots[2][4] = {};
  if constexpr (kIsCodes) {
    const float2 off = *reinterpret_cast<const float2*>(excess_at);
    dots[0][0] = dots[0][2] = off.x;
    dots[0][1] = dots[0][3] = off.y;
  }
#pragma unroll
  for (int part = 0; part < Step<kKind>::kProducts / 2; ++part) {
    const uint4 four = *reinterpret_cast<const uint4*>(column_at + 4 * kAtOnce * part);
    const uint32_t b[2][2] = {{four.x, four.y}, {four.z, four.w}};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      uint32_t a[4];
      w.operand(2 * part + i, base, a);
      mma<kIsCodes ? MmaType::kF16 : MmaType::kBF16>(kIsCodes ? dots[i] : sums, a, b[i]);
    }
  }
  if constexpr (kIsCodes) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const float scale = from_f16(static_cast<uint16_t>(w.scales[c / 2]));
      sums[c] = fmaf(scale, dots[0][c] + dots[1][c], sums[c]);
    }
    if constexpr (kHasMin) {
      const float2 total = *reinterpret_cast<const float2*>(totals_at);
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        sums[c] = fmaf(from_f16(static_cast<uint16_t>(w.mins[c / 2])), c % 2 == 0 ? total.x : total.y, sums[c]);
      }
    }
  }
}

}  // namespace llama_ext::cuda::rows_mma
