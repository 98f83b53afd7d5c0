// Gradients of rms_norm. A block has 16 rows, one after the other, each read once into registers; what they add to the weight's gradient
// stays in registers, too, and column_sums.cu adds that of all blocks. Rows too wide for that, or of odd addresses, are read
// several times: a block for a row gives 1 / rms, then d_x; a thread for a column has sums of 64 rows. Bound by memory.
#include "cuda/kernels.h"
#include "cuda/numeric.h"
#include "cuda/row_norm.h"
#include "cuda/vectors.h"

namespace llama_ext::cuda {
namespace {

constexpr int64_t kRowsPerSum = 64;

__global__ void inverse_rms_kernel(Rows x, int width, float eps, float* inverse_rms) {
  const float inverse = block_inverse_rms(x.row(blockIdx.x), width, eps, reinterpret_cast<float*>(shared_memory()));
  if (threadIdx.x == 0) inverse_rms[blockIdx.x] = inverse;
}

__global__ void weight_sums_kernel(NormGradients g, int64_t rows, int width, const float* inverse_rms, float* sums) {
  const int c = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (c >= width) return;
  const int64_t begin = int64_t{blockIdx.y} * kRowsPerSum;
  float sum = 0.0f;
  for (int64_t row = begin; row < begin + kRowsPerSum && row < rows; ++row) {
    sum = fmaf(g.d_y.row(row)[c], g.x.row(row)[c] * inverse_rms[row], sum);
  }
  sums[int64_t{blockIdx.y} * width + c] = sum;
}

__global__ void d_x_kernel(NormGradients g, int width, const float* inverse_rms) {
  auto* place = reinterpret_cast<float*>(shared_memory());
  const float* x = g.x.row(blockIdx.x);
  const float* d_y = g.d_y.row(blockIdx.x);
  float* d_x = g.d_x.row(blockIdx.x);
  const float inverse = inverse_rms[blockIdx.x];
  float dots = 0.0f;
  for (int c = static_cast<int>(threadIdx.x); c < width; c += static_cast<int>(blockDim.x)) {
    dots = fmaf(g.norm.weight[c] * d_y[c], x[c] * inverse, dots);
  }
  const float mean = block_sum(dots, place) / static_cast<float>(width);
  for (int c = static_cast<int>(threadIdx.x); c < width; c += static_cast<int>(blockDim.x)) {
    // d_x may be d_y: each thread writes what it alone reads.
    const float gradient = inverse * fmaf(g.norm.weight[c], d_y[c], -(x[c] * inverse * mean));
    d_x[c] = g.accumulate ? d_x[c] + gradient : gradient;
  }
}

constexpr int64_t kRowsPerBlock = 16;

/// kParts: vectors of a row that a thread has.
template <int kParts>
__global__ void __launch_bounds__(kThreads)
    rows_kernel(const __grid_constant__ NormGradients g, int64_t rows, int width, float* sums) {
  constexpr int kWarps = static_cast<int>(kThreads / kWarp);
  auto* place = reinterpret_cast<float*>(shared_memory());  // two of (kWarps, 2)
  const auto at = [](int part) {
    return (static_cast<int>(threadIdx.x) + part * static_cast<int>(kThreads)) * kVector;
  };
  float weight[kParts][kVector];
  float d_weight[kParts][kVector] = {};
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) weight[part][i] = at(part) < width ? g.norm.weight[at(part) + i] : 0.0f;
  }
  const int64_t begin = int64_t{blockIdx.x} * kRowsPerBlock;
  const int64_t end = begin + kRowsPerBlock < rows ? begin + kRowsPerBlock : rows;
#pragma unroll 1
  for (int64_t row = begin; row < end; ++row) {
    float x[kParts][kVector];
    float d_y[kParts][kVector];
    float squares = 0.0f;
    float dots = 0.0f;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      read_vector<true>(g.x.row(row), at(part), width, x[part]);
      read_vector<true>(g.d_y.row(row), at(part), width, d_y[part]);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        squares = fmaf(x[part][i], x[part][i], squares);
        dots = fmaf(weight[part][i] * d_y[part][i], x[part][i], dots);
      }
    }
    squares = warp_sum(squares);
    dots = warp_sum(dots);
    float* here = place + (row - begin) % 2 * 2 * kWarps;
    if (threadIdx.x % kWarp == 0) {
      here[threadIdx.x / kWarp * 2] = squares;
      here[threadIdx.x / kWarp * 2 + 1] = dots;
    }
    __syncthreads();  // one for a row: the next one's sums go elsewhere
    squares = dots = 0.0f;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) {
      squares += here[warp * 2];
      dots += here[warp * 2 + 1];
    }
    const float inverse = 1.0f / sqrtf(squares / static_cast<float>(width) + g.norm.eps);
    const float mean = dots * inverse / static_cast<float>(width);
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      float d_x[kVector] = {};
      if (g.accumulate) read_vector<true>(g.d_x.row(row), at(part), width, d_x);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const float normed = x[part][i] * inverse;
        d_weight[part][i] = fmaf(d_y[part][i], normed, d_weight[part][i]);
        const float gradient = inverse * fmaf(weight[part][i], d_y[part][i], -(normed * mean));
        d_x[i] = g.accumulate ? d_x[i] + gradient : gradient;
      }
      write_vector<true>(g.d_x.row(row), at(part), width, d_x);
    }
  }
  if (sums == nullptr) return;
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    write_vector<true>(sums + int64_t{blockIdx.x} * width, at(part), width, d_weight[part]);
  }
}

template <int kParts>
void start_rows(const Gpu& gpu, const NormGradients& g, int64_t rows, int width) {
  const int64_t blocks = blocks_for(rows, kRowsPerBlock);
  const Scratch sums(gpu, g.d_weight == nullptr ? 0 : static_cast<size_t>(blocks * width) * sizeof(float));
  launch(gpu, rows_kernel<kParts>, dim3(static_cast<unsigned>(blocks)), kThreads, 4 * kThreads / kWarp * sizeof(float),
         g, rows, width, sums.as<float>());
  if (g.d_weight != nullptr) add_column_sums(gpu, {sums.as<float>(), width}, blocks, width, g.d_weight);
}

}  // namespace

void rms_norm_backward(const Gpu& gpu, const NormGradients& g, int64_t rows, int width) {
  if (rows == 0 || width == 0) return;
  const bool is_aligned = width % kVector == 0 && has_vectors(g.x.data, g.x.stride) &&
                          has_vectors(g.d_y.data, g.d_y.stride) && has_vectors(g.d_x.data, g.d_x.stride);
  constexpr int kPart = static_cast<int>(kThreads) * kVector;
  if (is_aligned && width <= kPart) return start_rows<1>(gpu, g, rows, width);
  if (is_aligned && width <= 2 * kPart) return start_rows<2>(gpu, g, rows, width);
  if (is_aligned && width <= 4 * kPart) return start_rows<4>(gpu, g, rows, width);
  if (is_aligned && width <= 8 * kPart) return start_rows<8>(gpu, g, rows, width);
  const Scratch inverse(gpu, static_cast<size_t>(rows) * sizeof(float));
  auto* inverse_rms = inverse.as<float>();
  const dim3 all(static_cast<unsigned>(rows));
  launch(gpu, inverse_rms_kernel, all, kThreads, squares_bytes(width), g.x, width, g.norm.eps, inverse_rms);
  if (g.d_weight != nullptr) {
    const int64_t count = blocks_for(rows, kRowsPerSum);
    const Scratch sums(gpu, static_cast<size_t>(count * width) * sizeof(float));
    const unsigned columns = static_cast<unsigned>(blocks_for(width, kThreads));
    launch(gpu, weight_sums_kernel, dim3(columns, static_cast<unsigned>(count)), kThreads, 0, g, rows, width,
           inverse_rms, sums.as<float>());
    add_column_sums(gpu, {sums.as<float>(), width}, count, width, g.d_weight);
  }
  launch(gpu, d_x_kernel, all, kThreads, kWarp * sizeof(float), g, width, inverse_rms);
}

}  // namespace llama_ext::cuda
