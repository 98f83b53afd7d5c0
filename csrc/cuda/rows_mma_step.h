// The products of matmul_rows_mma.cu: a warp's step of 16 rows of W, from registers, times x from shared memory.
#pragma once

#include "cuda/mma.h"
#include "cuda/rows_mma.h"

namespace llama_ext::cuda::rows_mma {

/// A step of two rows of W, g and g + 8 of a warp's 16.
struct Step {
  const uint4& first;
  const uint4& second;
  float scales[2];
  float mins[2];

  __device__ __forceinline__ static uint32_t word(const uint4& of, int i) {
    return i == 0 ? of.x : i == 1 ? of.y : i == 2 ? of.z : of.w;
  }
  /// Product m, of words 2 m and 2 m + 1.
  __device__ __forceinline__ void operand(int m, uint32_t a[4], uint32_t mask = 0xffffffffu) const {
    a[0] = word(first, 2 * m) & mask;
    a[1] = word(second, 2 * m) & mask;
    a[2] = word(first, 2 * m + 1) & mask;
    a[3] = word(second, 2 * m + 1) & mask;
  }
};

/// sums += a step's rows of W, of bfloat16, times x. A lane's sums are of rows g and g + 8, rows 2 t and 2 t + 1 of x. column: the
/// lane's 8 numbers of x.
__device__ __forceinline__ void multiply_numbers(float (&sums)[4], const Step& w, const unsigned char* column) {
  const uint4 x = *reinterpret_cast<const uint4*>(column);
  const uint32_t b[2][2] = {{x.x, x.y}, {x.z, x.w}};
#pragma unroll
  for (int m = 0; m < 2; ++m) {
    uint32_t a[4];
    w.operand(m, a);
    mma<MmaType::kBF16>(sums, a, b[m]);
  }
}

/// The same of codes. A lane's sums are of rows g and g + 8 and row t of x: the columns of a product are the two digits of four rows.
template <Kind kKind, bool kHasMin>
__device__ __forceinline__ void multiply_codes(float& first_sum, float& second_sum, const Step& w,
                                               const unsigned char* column, const StepFactor* factor_at,
                                               const float* total_at) {
  constexpr int kHalves = kKind == Kind::kQ4 ? 2 : 1;
  int dots[kHalves][4] = {};  // of lower nibbles and upper ones, or of bytes
#pragma unroll
  for (int half = 0; half < kHalves; ++half) {
    const uint4 x = *reinterpret_cast<const uint4*>(column + half * 64);
    const uint32_t b[2][2] = {{x.x, x.y}, {x.z, x.w}};
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      uint32_t a[4];
      w.operand(m, a, kKind != Kind::kQ4 ? 0xffffffffu : half == 0 ? 0x0f0f0f0fu : 0xf0f0f0f0u);
      mma_codes(dots[half], a, b[m]);
    }
  }
  const StepFactor factor = *factor_at;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    // Sums of 128 codes times numbers of 16 bits, times 16: below 2^31. Without a sign, as what is no number may be anything.
    const auto digit = [&](int half, int d) { return static_cast<uint32_t>(dots[half][2 * r + d]); };
    uint32_t dot = digit(kHalves - 1, 0) * 256 + digit(kHalves - 1, 1) + factor.excess;
    if constexpr (kKind == Kind::kQ4) dot += digit(0, 0) * 4096 + digit(0, 1) * 16;
    float& sum = r == 0 ? first_sum : second_sum;
    sum = fmaf(w.scales[r] * factor.scale, static_cast<float>(static_cast<int>(dot)), sum);
    if constexpr (kHasMin) sum = fmaf(w.mins[r], *total_at, sum);
  }
}

}  // namespace llama_ext::cuda::rows_mma
