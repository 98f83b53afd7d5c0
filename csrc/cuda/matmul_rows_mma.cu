// y = x W^T for at most 8 rows of x, on the tensor cores: decoding, where reading the weights bounds the time. They do what one row
// needs as fast as what eight need, and take the sums off the other units, which have codes to bring into place.
//
// A warp has 16 rows of W (8 gates and their 8 ups) and a share of k: the four lanes of a row load 64 bytes of it at once, a step,
// and the warps of a block take turns along the row, four steps each. A block stays on its multiprocessor and goes from tile to tile; the
// loads of the next steps are always on their way, across tiles, and begin before x is known. k is permuted alike on both sides of a
// product, so that weights are multiplied in the order in which they are loaded.
//
// x lies in shared memory: with weights of bfloat16 as such, with codes as whole numbers of 16 bits, which share a power of two in each step,
// cut into an upper and a lower digit of 8 bits. Codes are multiplied as the bytes that they are, a byte of two of 4 bits masked, once for each
// digit, and all of a step is summed in whole numbers, without an error: what is not exact is x's rounding, 2^-15 of a step's largest at most,
// and sums of steps, in float32. A row's bits depend on W's shape and kind, and on nothing else: the warps' shares are added in order.
// Bound by the GPU's memory.
#include <algorithm>

#include "cuda/chain.h"
#include "cuda/rows_mma_block.h"

namespace llama_ext::cuda {
namespace {

using namespace rows_mma;

/// Weights that loads bring into registers, a share ahead.
template <Kind kKind>
class LoadedWeights {
 public:
  __device__ __forceinline__ explicit LoadedWeights(const RowsMmaView& v) : v_(v), chunks_(Walk<kKind>(v).chunks) {}
  __device__ __forceinline__ void enter(const TileRows& rows, int tile) {
    const int lane = static_cast<int>(threadIdx.x % kWarp);
    const int my_share = static_cast<int>(threadIdx.x / kWarp) & (v_.along_k - 1);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      from_[half] = v_.product.weight.data + int64_t{rows.row(tile, half, lane / 4)} * chunks_ * 16 +
                    my_share * kTogether * kStepBytes + lane % 4 * 16;
    }
  }
  __device__ __forceinline__ void load(bool is_there, int i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (is_there) words_[i][half] = __ldcs(reinterpret_cast<const uint4*>(from_[half] + i * kStepBytes));
      if (i + 1 == kTogether) from_[half] += v_.along_k * kTogether * kStepBytes;
    }
  }
  __device__ __forceinline__ void take(int) {}
  __device__ __forceinline__ const uint4& words(int i, int half) const { return words_[i][half]; }

 private:
  const RowsMmaView& v_;
  int chunks_;
  const unsigned char* from_[2];
  uint4 words_[kTogether][2] = {};
};

template <Kind kKind, bool kHasMin>
__global__ void __launch_bounds__(kThreadCount, 1) matmul_rows_mma_kernel(const __grid_constant__ RowsMmaView v) {
  const auto sync = [] { __syncthreads(); };
  LoadedWeights<kKind> weights(v);
  MeetingTurns turns(v, static_cast<int>(threadIdx.x), sync);
  multiply_rows<kKind, kHasMin>(
      v, static_cast<int>(threadIdx.x), shared_memory(), weights, turns, [] { wait_for_predecessors(); }, sync);
}

// Of the largest GPU that there is, so that the order of a product's sums is that of its shape.
constexpr int kMostBlocks = 132;

int step_of(Kind kind) {
  switch (kind) {
    case Kind::kBF16:
      return kStep<Kind::kBF16>;
    case Kind::kQ8:
      return kStep<Kind::kQ8>;
    case Kind::kQ4:
      return kStep<Kind::kQ4>;
    default:
      return 0;
  }
}

/// Shared memory beside that of rows of x.
size_t fixed_bytes(const WeightView& w) {
  size_t bytes = sizeof(Shared);
  if (is_quantized(w.kind)) {
    const auto places = static_cast<size_t>(w.stride / step_of(w.kind) * kColumns);
    bytes += places * (sizeof(StepFactor) + (w.has_min ? sizeof(float) : 0));
  }
  return bytes;
}

/// Shared memory of one row of x.
size_t row_bytes(const WeightView& w) {
  return static_cast<size_t>(is_quantized(w.kind) ? kDigits * column_pitch<Kind::kQ8>(w.stride)
                                                  : column_pitch<Kind::kBF16>(w.stride));
}

template <Kind kKind, bool kHasMin>
void start(const Gpu& gpu, const RowsMmaView& v) {
  divide_alike(gpu, matmul_rows_mma_kernel<kKind, kHasMin>);
  launch<Start::kEarly>(
      gpu, matmul_rows_mma_kernel<kKind, kHasMin>,
      dim3(static_cast<unsigned>(std::min<int64_t>(blocks_for(v.tiles, kWarps / v.along_k), gpu.multiprocessors()))),
      kThreadCount, rows_mma_shared_bytes(v.product), v);
}

}  // namespace

namespace rows_mma {

RowsMmaView rows_mma_view(const ProductView& p) {
  const WeightView& w = p.weight;
  const int step = step_of(w.kind);
  RowsMmaView v;
  v.product = p;
  v.tiles = static_cast<int>(p.is_gate_up ? blocks_for(p.width, 8) : blocks_for(w.rows, kTileRows));
  v.is_whole = (reinterpret_cast<uintptr_t>(p.x.data) | reinterpret_cast<uintptr_t>(p.norm.weight)) % 16 == 0 &&
               p.x.stride % 4 == 0 && w.cols == w.stride;
  v.groups = w.groups();
  v.group_shift = 0;
  while (is_quantized(w.kind) && (step << v.group_shift) < w.group) ++v.group_shift;
  // As many warps along k as have a share each, but fewer only where there are blocks for all multiprocessors (of the largest GPU, so
  // that a product's order of sums is that of its shape).
  const int64_t steps = w.stride / step;
  v.along_k = kWarps;
  while (v.along_k > kLeastAlongK && steps < int64_t{v.along_k} * kTogether &&
         v.tiles >= int64_t{kMostBlocks} * (2 * kWarps / v.along_k)) {
    v.along_k /= 2;
  }
  v.k_shift = 0;
  while ((1 << v.k_shift) < v.along_k) ++v.k_shift;
  return v;
}

size_t rows_mma_shared_bytes(const ProductView& p) {
  return fixed_bytes(p.weight) + row_bytes(p.weight) * static_cast<size_t>(p.rows);
}

void start_rows_mma(const Gpu& gpu, const RowsMmaView& v) {
  const bool has_min = v.product.weight.has_min;
  switch (v.product.weight.kind) {
    case Kind::kBF16:
      return start<Kind::kBF16, false>(gpu, v);
    case Kind::kQ8:
      return has_min ? start<Kind::kQ8, true>(gpu, v) : start<Kind::kQ8, false>(gpu, v);
    case Kind::kQ4:
      return has_min ? start<Kind::kQ4, true>(gpu, v) : start<Kind::kQ4, false>(gpu, v);
    default:
      fail(ErrorKind::kInternal, "CUDA: such weights have no product of few rows on the tensor cores");
  }
}

}  // namespace rows_mma

int64_t rows_of_mma(const Gpu& gpu, const WeightView& w) {
  const int step = step_of(w.kind);
  if (step == 0 || w.stride == 0) return 0;
  if (is_quantized(w.kind)) {
    // A step belongs to one group, and groups are found by a shift.
    const bool is_plain = !w.has_superblocks && w.group % step == 0;  // and so are rows of whole steps
    if (!is_plain || (w.group / step & (w.group / step - 1)) != 0) return 0;
    if (int64_t{w.rows} * w.groups() > INT32_MAX) return 0;  // Factors
  }
  const size_t fixed = fixed_bytes(w);
  if (fixed >= gpu.shared_bytes_per_block()) return 0;
  const int64_t fit = static_cast<int64_t>((gpu.shared_bytes_per_block() - fixed) / row_bytes(w));
  return std::min<int64_t>(fit, kColumns);
}

void matmul_rows_mma(const Gpu& gpu, const ProductView& product) {
  const int64_t most = rows_of_mma(gpu, product.weight);
  for (int64_t begin = 0; begin < product.rows; begin += most) {
    ProductView p = product;
    p.rows = std::min(most, product.rows - begin);
    p.x.data = product.x.row(begin);
    p.y.data = product.y.row(begin);
    const RowsMmaView view = rows_mma_view(p);
    if (!chain_product(gpu, view)) start_rows_mma(gpu, view);
  }
}

}  // namespace llama_ext::cuda
