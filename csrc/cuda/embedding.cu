// A thread for an element of a row of the table. Ids travel as an argument of the kernel. Bound by memory.
#include <algorithm>
#include <numeric>

#include "cuda/kernels.h"
#include "cuda/weight_codes.h"

namespace llama_ext::cuda {
namespace {

constexpr int64_t kIds = 512;
struct Ids {
  int32_t of[kIds];
};

__global__ void embedding_kernel(WeightView table, const __grid_constant__ Ids ids, Rows y) {
  const int64_t row = ids.of[blockIdx.x];
  float* to = y.row(blockIdx.x);
  for (int k = static_cast<int>(threadIdx.x); k < table.cols; k += static_cast<int>(blockDim.x)) {
    to[k] = weight_element(table, row, k);
  }
}

__global__ void embedding_of_live_kernel(WeightView table, const int32_t* ids, Rows y) {
  wait_for_predecessors();
  const int64_t row = ids[blockIdx.y];
  const int k = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (k < table.cols) y.row(blockIdx.y)[k] = weight_element(table, row, k);
}

/// Tokens in ascending order of their ids, and those of one id in the order of their rows.
struct SortedIds {
  int32_t of[kIds];
  uint16_t row[kIds];
};

/// A block for a part of a row of the table, begun at the first token of its id: rows of one id are added in order.
__global__ void embedding_backward_kernel(WeightView d_table, const __grid_constant__ SortedIds ids, int count,
                                          Rows d_y) {
  const int first = static_cast<int>(blockIdx.x);
  const int32_t id = ids.of[first];
  if (first > 0 && ids.of[first - 1] == id) return;
  const int k = static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x);
  if (k >= d_table.cols) return;
  auto* elements = reinterpret_cast<float*>(const_cast<unsigned char*>(d_table.data)) + int64_t{id} * d_table.stride;
  float sum = elements[k];
  for (int t = first; t < count && ids.of[t] == id; ++t) sum += d_y.row(ids.row[t])[k];
  elements[k] = sum;
}

}  // namespace

void embedding(const Gpu& gpu, const WeightView& table, const int32_t* ids, int64_t count, Rows y) {
  for (int64_t begin = 0; begin < count; begin += kIds) {
    const int64_t some = std::min(kIds, count - begin);
    Ids part{};
    std::copy_n(ids + begin, some, part.of);
    launch(gpu, embedding_kernel, dim3(static_cast<unsigned>(some)), kThreads, 0, table, part,
           Rows{y.row(begin), y.stride});
  }
}

void embedding_of_live(const Gpu& gpu, const WeightView& table, const int32_t* ids, int64_t count, Rows y) {
  launch<Start::kEarly>(gpu, embedding_of_live_kernel,
                        dim3(static_cast<unsigned>(blocks_for(table.cols, kThreads)), static_cast<unsigned>(count)),
                        kThreads, 0, table, ids, y);
}

void embedding_backward(const Gpu& gpu, const WeightView& d_table, const int32_t* ids, int64_t count, Rows d_y) {
  for (int64_t begin = 0; begin < count; begin += kIds) {
    const int64_t some = std::min(kIds, count - begin);
    SortedIds part{};
    std::iota(part.row, part.row + some, uint16_t{0});
    std::stable_sort(part.row, part.row + some,
                     [&](uint16_t a, uint16_t b) { return ids[begin + a] < ids[begin + b]; });
    for (int64_t i = 0; i < some; ++i) part.of[i] = ids[begin + part.row[i]];
    const dim3 grid(static_cast<unsigned>(some), static_cast<unsigned>(blocks_for(d_table.cols, kThreads)));
    launch(gpu, embedding_backward_kernel, grid, kThreads, 0, d_table, part, static_cast<int>(some),
           Rows{d_y.row(begin), d_y.stride});
  }
}

}  // namespace llama_ext::cuda
