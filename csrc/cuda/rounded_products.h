// Products of training on the tensor cores: float32 weights and whatever they meet become bfloat16 in scratch memory first, transposed
// where the sum runs down the rows, so that each is a product of rows with rows, matmul_mma's.
#pragma once

#include "cuda/kernels.h"
#include "ops/matrix.h"

namespace llama_ext::cuda {

/// Whether a product with such weights rounds them first.
inline bool rounds_weights(const WeightView& weight, Compute compute) {
  return compute == Compute::kBF16 && weight.kind == Kind::kF32 && weight.stride > 0;
}

/// y = x W^T, with everything that a product has but gates.
void rounded_product(const Gpu& gpu, const ProductView& product);

/// The gradients of y = x W^T; either may be left out.
struct ProductGradients {
  Rows d_y;
  int64_t rows = 0;                    // M
  int64_t width = 0;                   // N
  const WeightView* weight = nullptr;  // float32 or bfloat16, for d_x
  Rows d_x;
  bool accumulate = false;
  Rows x;
  const WeightView* d_weight = nullptr;  // which is added to
};
void rounded_gradients(const Gpu& gpu, const ProductGradients& gradients);

}  // namespace llama_ext::cuda
