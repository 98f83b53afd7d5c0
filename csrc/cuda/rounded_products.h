// Products on the tensor cores whose weights become bfloat16 in scratch memory first: float32 ones of training with whatever they meet,
// transposed where the sum runs down the rows, so that each is a product of rows with rows, matmul_mma's; and codes where they meet many
// rows, a strip of the weight at a time.
#pragma once

#include <functional>

#include "core/checked.h"
#include "cuda/kernels.h"
#include "ops/matrix.h"

namespace llama_ext::cuda {

/// Whether a product with such weights rounds them first.
inline bool rounds_weights(const WeightView& weight, Compute compute) {
  return compute == Compute::kBF16 && weight.kind == Kind::kF32 && weight.stride > 0;
}

/// y = x W^T, with everything that a product has but gates.
void rounded_product(const Gpu& gpu, const ProductView& product);

/// bfloat16 numbers of a strip, in bytes: the L2 cache of a Hopper GPU (50 MB) should still have them when they are multiplied.
#if defined(LLAMA_EXT_CUDA_EMULATED)
inline constexpr int64_t kStripBytes = int64_t{64} << 10;  // so that the tests' small weights have several
#else
inline constexpr int64_t kStripBytes = int64_t{32} << 20;
#endif
/// Rows of `stride` numbers that a strip has: 256 (the widest tile of wgmma_tiles.h) times a power of two, as many as fit, so that
/// the tiles of 2,048 rows of x leave few of 132 multiprocessors without work.
constexpr int64_t strip_rows(int64_t stride) {
  int64_t rows = 256;
  while (2 * rows * stride * int64_t{sizeof(uint16_t)} <= kStripBytes && rows < (int64_t{1} << 30)) rows *= 2;
  return rows;
}

/// Whether a product of so many rows, on the tensor cores, has its weights unpacked.
inline bool unpacks_weights(const WeightView& weight, int64_t rows) {
  return is_quantized(weight.kind) && rows > kMostRowsOfCodes;
}
/// How far apart rows of x are then, or otherwise.
inline int operand_stride(const WeightView& weight, int64_t rows) {
  return unpacks_weights(weight, rows) ? static_cast<int>(round_up(weight.cols, kPad)) : weight.stride;
}
/// Calls multiply(rows of the weight, which of all is the first), for all of the weight as it is, or for one unpacked strip after the
/// other, all in the same memory.
void for_each_strip(const Gpu& gpu, const WeightView& weight, int64_t rows,
                    const std::function<void(const WeightView& strip, int64_t first)>& multiply);

/// The gradients of y = x W^T; either may be left out.
struct ProductGradients {
  Rows d_y;
  int64_t rows = 0;                    // M
  int64_t width = 0;                   // N
  const WeightView* weight = nullptr;  // float32, bfloat16 or codes, for d_x
  Rows d_x;
  bool accumulate = false;
  Rows x;
  const WeightView* d_weight = nullptr;  // which is added to
};
void rounded_gradients(const Gpu& gpu, const ProductGradients& gradients);

}  // namespace llama_ext::cuda
