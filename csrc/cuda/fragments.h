// Operands of mma (mma.h) from rows in shared memory, four matrices of 8 x 8 at once, and from the sums of another product.
#pragma once

#include "cuda/mma.h"

namespace llama_ext::cuda {

/// A tile of rows of 16-bit numbers in shared memory, kPitch apart; a pitch of 16 bytes more than a multiple of 128 keeps rows out of
/// each other's banks.
template <int kPitch>
struct FragmentTile {
  const uint16_t* data;

  /// Operand A: rows [row, row + 16), k in [k, k + 16) along them.
  __device__ __forceinline__ void load_a(uint32_t a[4], int row, int k) const {
    const int lane = static_cast<int>(threadIdx.x % kWarp);
    load_matrices(a, data + (row + lane % 16) * kPitch + k + lane / 16 * 8);
  }
  /// Operand B of two products: their columns are rows [row, row + 16) of the tile, k in [k, k + 16) along them.
  __device__ __forceinline__ void load_b(uint32_t b[4], int row, int k) const {
    const int lane = static_cast<int>(threadIdx.x % kWarp);
    load_matrices(b, data + (row + lane / 16 * 8 + lane % 8) * kPitch + k + lane / 8 % 2 * 8);
  }
  /// Operand B of two products: k runs down rows [row, row + 16), their columns are [column, column + 16) of the tile.
  __device__ __forceinline__ void load_b_across(uint32_t b[4], int row, int column) const {
    const int lane = static_cast<int>(threadIdx.x % kWarp);
    load_transposed(b, data + (row + lane % 16) * kPitch + column + lane / 16 * 8);
  }
};

/// Operand A, 16 k wide, from the sums of two products that lie side by side.
__device__ __forceinline__ void pack_a(uint32_t a[4], const float left[4], const float right[4]) {
  a[0] = round_pair(left[0], left[1]);
  a[1] = round_pair(left[2], left[3]);
  a[2] = round_pair(right[0], right[1]);
  a[3] = round_pair(right[2], right[3]);
}

}  // namespace llama_ext::cuda
