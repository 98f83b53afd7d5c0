// Gradients of products: tiles of 64 x 64 in float32 as in matmul_tiles.cu, whose operands lie across. Bound by the float32 units.
// A thread sums over the rows (d_weight) or outputs (d_x) in ascending order; where d_weight has few tiles, over a part of the rows, and
// the parts meet in order: a function of its extents alone.
#include <algorithm>

#include "cuda/kernels.h"
#include "cuda/weight_codes.h"

namespace llama_ext::cuda {
namespace {

constexpr int kTile = 64;
constexpr int kDepth = 16;
constexpr int kMicro = 4;
constexpr int kPitch = kTile + 4;
// d_weight of few tiles: its rows are parts, of at least so many, until there are about so many blocks.
constexpr int64_t kLeastPart = 128;
constexpr int64_t kWantedBlocks = 512;

/// Element (i, r) of an operand of sums over r.
struct AlongRows {  // i runs along memory: x^T, d_y^T
  Rows rows;
  static constexpr bool kIsTransposed = true;
  __device__ float operator()(int64_t i, int64_t r) const { return rows.row(r)[i]; }
};
struct AlongSum {  // r runs along memory
  Rows rows;
  static constexpr bool kIsTransposed = false;
  __device__ float operator()(int64_t i, int64_t r) const { return rows.row(i)[r]; }
};
struct WeightColumns {  // of any kind
  WeightView weight;
  static constexpr bool kIsTransposed = true;
  __device__ float operator()(int64_t i, int64_t r) const { return weight_element(weight, r, static_cast<int>(i)); }
};

/// Brings 64 x 16 elements, threads along memory.
template <typename Operand>
__device__ __forceinline__ void bring(const Operand& operand, int64_t first, int64_t size, int64_t begin, int64_t depth,
                                      float* tile) {
#pragma unroll 1  // a weight of any kind is many instructions
  for (int part = 0; part < kTile * kDepth / static_cast<int>(kThreads); ++part) {
    const int number = static_cast<int>(threadIdx.x) + part * static_cast<int>(kThreads);
    const int i = Operand::kIsTransposed ? number % kTile : number / kDepth;
    const int r = Operand::kIsTransposed ? number / kTile : number % kDepth;
    tile[r * kPitch + i] = first + i < size && begin + r < depth ? operand(first + i, begin + r) : 0.0f;
  }
}

struct Extents {
  int64_t rows;
  int64_t columns;
  int64_t depth;
  int64_t part;  // of the depth, for blocks of one z
};

template <typename A, typename B>
__global__ void __launch_bounds__(kThreads, 2) product_kernel(A a, B b, Extents e, Rows y, bool accumulate) {
  auto* a_tile = reinterpret_cast<float*>(shared_memory());
  float* b_tile = a_tile + kDepth * kPitch;
  const int64_t first_row = int64_t{blockIdx.y} * kTile;
  const int64_t first_column = int64_t{blockIdx.x} * kTile;
  const int m0 = static_cast<int>(threadIdx.x) / 16 * kMicro;
  const int n0 = static_cast<int>(threadIdx.x) % 16 * kMicro;
  float sums[kMicro][kMicro] = {};
  const int64_t first = int64_t{blockIdx.z} * e.part;
  const int64_t last = first + e.part < e.depth ? first + e.part : e.depth;
  y.data += int64_t{blockIdx.z} * e.rows * y.stride;
  for (int64_t begin = first; begin < last; begin += kDepth) {
    __syncthreads();
    bring(a, first_row, e.rows, begin, last, a_tile);
    bring(b, first_column, e.columns, begin, last, b_tile);
    __syncthreads();
#pragma unroll
    for (int depth = 0; depth < kDepth; ++depth) {
      const float4 p = *reinterpret_cast<const float4*>(a_tile + depth * kPitch + m0);
      const float4 q = *reinterpret_cast<const float4*>(b_tile + depth * kPitch + n0);
      const float rows[kMicro] = {p.x, p.y, p.z, p.w};
      const float columns[kMicro] = {q.x, q.y, q.z, q.w};
#pragma unroll
      for (int i = 0; i < kMicro; ++i) {
#pragma unroll
        for (int j = 0; j < kMicro; ++j) sums[i][j] = fmaf(rows[i], columns[j], sums[i][j]);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kMicro; ++i) {
    if (first_row + m0 + i >= e.rows) break;
#pragma unroll
    for (int j = 0; j < kMicro; ++j) {
      if (first_column + n0 + j >= e.columns) break;
      float& to = y.row(first_row + m0 + i)[first_column + n0 + j];
      to = accumulate ? to + sums[i][j] : sums[i][j];
    }
  }
}

/// y += the sums of all parts, in order.
__global__ void add_parts_kernel(const float* parts, int64_t count, Extents e, Rows y) {
  const int64_t column = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (column >= e.columns) return;
  const int64_t row = blockIdx.y;
  float sum = 0.0f;
  for (int64_t i = 0; i < count; ++i) sum += parts[(i * e.rows + row) * e.columns + column];
  y.row(row)[column] += sum;
}

template <typename A, typename B>
void start(const Gpu& gpu, const A& a, const B& b, const Extents& e, Rows y, bool accumulate) {
  const dim3 grid(static_cast<unsigned>(blocks_for(e.columns, kTile)), static_cast<unsigned>(blocks_for(e.rows, kTile)),
                  static_cast<unsigned>(e.depth == 0 ? 1 : blocks_for(e.depth, e.part)));
  launch(gpu, product_kernel<A, B>, grid, kThreads, 2 * kDepth * kPitch * sizeof(float), a, b, e, y, accumulate);
}

}  // namespace

void matmul_backward_x(const Gpu& gpu, Rows d_y, int64_t rows, const WeightView& weight, Rows d_x, bool accumulate) {
  start(gpu, AlongSum{d_y}, WeightColumns{weight}, {rows, weight.cols, weight.rows, weight.rows}, d_x, accumulate);
}

void matmul_backward_weight(const Gpu& gpu, Rows d_y, int64_t rows, Rows x, const WeightView& d_weight) {
  const Rows to{reinterpret_cast<float*>(const_cast<unsigned char*>(d_weight.data)), d_weight.stride};
  const AlongRows left{d_y};
  const AlongRows right{x};
  // Few tiles (an adapter's) would leave the GPU idle for as long as one goes through all rows.
  const int64_t tiles = blocks_for(d_weight.rows, kTile) * blocks_for(d_weight.cols, kTile);
  const int64_t parts = std::min(kWantedBlocks / std::max<int64_t>(tiles, 1), rows / kLeastPart);
  Extents e{d_weight.rows, d_weight.cols, rows, rows};
  if (parts <= 1) return start(gpu, left, right, e, to, /*accumulate=*/true);
  e.part = blocks_for(blocks_for(rows, parts), kDepth) * kDepth;
  const int64_t count = blocks_for(rows, e.part);
  const Scratch memory(gpu, static_cast<size_t>(count * e.rows * e.columns) * sizeof(float));
  start(gpu, left, right, e, {memory.as<float>(), e.columns}, /*accumulate=*/false);
  const dim3 grid(static_cast<unsigned>(blocks_for(e.columns, kThreads)), static_cast<unsigned>(e.rows));
  launch(gpu, add_parts_kernel, grid, kThreads, 0, memory.as<float>(), count, e, to);
}

}  // namespace llama_ext::cuda
