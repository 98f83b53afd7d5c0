// A thread for an element, or for four that lie together. Bound by memory.
#include "cuda/kernels.h"
#include "cuda/numeric.h"
#include "cuda/vectors.h"

namespace llama_ext::cuda {
namespace {

__global__ void swiglu_kernel(Rows gate, Rows up, GatePlaces places, int64_t count, int width, Rows y) {
  const int64_t number = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (number >= count) return;
  const int64_t row = number / width;
  const int f = static_cast<int>(number % width);
  const int at = f / places.group * places.group_stride + f % places.group;
  y.row(row)[f] = silu(gate.row(row)[at]) * up.row(row)[at];
}

__global__ void swiglu_rounded_kernel(Rows gate, Rows up, GatePlaces places, int64_t count, RoundedRows y) {
  const int64_t number = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (number >= count) return;
  const int64_t row = number / y.padded;
  const int f = static_cast<int>(number % y.padded);
  const int at = f / places.group * places.group_stride + f % places.group;
  y.data[row * y.stride + f] = f < y.width ? to_bf16(silu(gate.row(row)[at]) * up.row(row)[at]) : uint16_t{0};
}

/// A block for a part of a row.
template <bool kVectors>
__global__ void swiglu_rows_kernel(Rows gate, Rows up, int64_t width, Rows y) {
  const int64_t row = blockIdx.x;
  const int64_t at = (int64_t{blockIdx.y} * blockDim.x + threadIdx.x) * kVector;
  if (at >= width) return;
  float g[kVector];
  float u[kVector];
  read_vector<kVectors>(gate.row(row), at, width, g);
  read_vector<kVectors>(up.row(row), at, width, u);
#pragma unroll
  for (int i = 0; i < kVector; ++i) g[i] = silu(g[i]) * u[i];
  write_vector<kVectors>(y.row(row), at, width, g);
}

template <bool kVectors>
__global__ void swiglu_backward_kernel(SwigluGradients g, int64_t width) {
  const int64_t row = blockIdx.x;
  const int64_t at = (int64_t{blockIdx.y} * blockDim.x + threadIdx.x) * kVector;
  if (at >= width) return;
  // Everything is read before anything is written, which may lie in its place.
  float gate[kVector];
  float up[kVector];
  float d_y[kVector];
  float y[kVector];
  read_vector<kVectors>(g.gate.row(row), at, width, gate);
  read_vector<kVectors>(g.up.row(row), at, width, up);
  read_vector<kVectors>(g.d_y.row(row), at, width, d_y);
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    const float s = 1.0f / (1.0f + expf(-gate[i]));
    const float d = d_y[i];
    const float u = up[i];
    y[i] = gate[i] * s * u;
    up[i] = d * gate[i] * s;
    gate[i] = d * u * s * fmaf(gate[i], 1.0f - s, 1.0f);
  }
  write_vector<kVectors>(g.d_gate.row(row), at, width, gate);
  write_vector<kVectors>(g.d_up.row(row), at, width, up);
  if (g.y.data != nullptr) write_vector<kVectors>(g.y.row(row), at, width, y);
}

dim3 grid_of(int64_t rows, int64_t width) {
  return dim3(static_cast<unsigned>(rows), static_cast<unsigned>(blocks_for(width, kThreads * kVector)));
}

}  // namespace

void swiglu_backward(const Gpu& gpu, const SwigluGradients& g, int64_t rows, int64_t width) {
  bool is_aligned = true;
  for (const Rows& each : {g.gate, g.up, g.d_y, g.d_gate, g.d_up, g.y}) {
    is_aligned = is_aligned && has_vectors(each.data, each.stride);
  }
  launch(gpu, is_aligned ? swiglu_backward_kernel<true> : swiglu_backward_kernel<false>, grid_of(rows, width), kThreads,
         0, g, width);
}

void swiglu(const Gpu& gpu, Rows gate, Rows up, GatePlaces places, int64_t rows, int width, Rows y) {
  if (places.group >= width) {  // gates lie together
    const bool is_aligned =
        has_vectors(gate.data, gate.stride) && has_vectors(up.data, up.stride) && has_vectors(y.data, y.stride);
    return launch(gpu, is_aligned ? swiglu_rows_kernel<true> : swiglu_rows_kernel<false>, grid_of(rows, width),
                  kThreads, 0, gate, up, int64_t{width}, y);
  }
  const int64_t count = rows * width;
  launch(gpu, swiglu_kernel, dim3(static_cast<unsigned>(blocks_for(count, kThreads))), kThreads, 0, gate, up, places,
         count, width, y);
}

void swiglu_rounded(const Gpu& gpu, Rows gate, Rows up, GatePlaces places, int64_t rows, RoundedRows y) {
  const int64_t count = rows * y.padded;
  launch(gpu, swiglu_rounded_kernel, dim3(static_cast<unsigned>(blocks_for(count, kThreads))), kThreads, 0, gate, up,
         places, count, y);
}

}  // namespace llama_ext::cuda
