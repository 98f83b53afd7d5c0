// A block for a row, whose first 4,096 numbers stay in registers between the sum of squares and the product. Bound by memory.
#include "cuda/kernels.h"
#include "cuda/row_norm.h"
#include "cuda/vectors.h"

namespace llama_ext::cuda {
namespace {

constexpr int kHeld = 4;  // fours of a row that a thread keeps
constexpr int kTurn = 4 * static_cast<int>(kThreads);

__global__ void __launch_bounds__(kThreads)
    rms_norm_kernel(Rows x, int width, NormView norm, Rows y, float* inverse_rms) {
  const float* from = x.row(blockIdx.x);
  float* to = y.row(blockIdx.x);
  const bool is_whole = lies_whole(from, width) && lies_whole(to, width) && lies_whole(norm.weight, width);
  const auto load = [&](const float* row, int k) { return load_four(row, k, width, is_whole && k < width); };
  const auto store = [&](int k, const float4& four) {
    const float values[kVector] = {four.x, four.y, four.z, four.w};
    is_whole ? write_vector<true>(to, k, width, values) : write_vector<false>(to, k, width, values);
  };
  const int first = 4 * static_cast<int>(threadIdx.x);
  float4 gains[kHeld];
#pragma unroll
  for (int i = 0; i < kHeld; ++i) gains[i] = load(norm.weight, first + i * kTurn);
  wait_for_predecessors();
  float4 held[kHeld];
#pragma unroll
  for (int i = 0; i < kHeld; ++i) held[i] = load(from, first + i * kTurn);
  auto* squares = reinterpret_cast<float*>(shared_memory());
  const float inverse = block_inverse_rms(held, from, width, norm.eps, squares);
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int k = first + i * kTurn;
    if (k < width) store(k, normalized(held[i], inverse, gains[i]));
  }
  for (int k = first + kHeld * kTurn; k < width; k += kTurn) {
    store(k, normalized(load(from, k), inverse, load(norm.weight, k)));
  }
  if (inverse_rms != nullptr && threadIdx.x == 0) inverse_rms[blockIdx.x] = inverse;
}

}  // namespace

void rms_norm(const Gpu& gpu, Rows x, int64_t rows, int width, NormView norm, Rows y, float* inverse_rms) {
  launch<Start::kEarly>(gpu, rms_norm_kernel, dim3(static_cast<unsigned>(rows)), kThreads, squares_bytes(width), x,
                        width, norm, y, inverse_rms);
}

}  // namespace llama_ext::cuda
