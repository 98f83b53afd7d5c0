// A thread for an element. Bound by memory.
#include "cuda/kernels.h"
#include "cuda/numeric.h"

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
  const int64_t row = number / y.stride;
  const int f = static_cast<int>(number % y.stride);
  const int at = f / places.group * places.group_stride + f % places.group;
  y.data[number] = f < y.width ? to_bf16(silu(gate.row(row)[at]) * up.row(row)[at]) : uint16_t{0};
}

__global__ void swiglu_backward_kernel(SwigluGradients g, int64_t count, int64_t width) {
  const int64_t number = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (number >= count) return;
  const int64_t row = number / width;
  const int64_t f = number % width;
  // Everything is read before anything is written, which may lie in its place.
  const float gate = g.gate.row(row)[f];
  const float up = g.up.row(row)[f];
  const float d_y = g.d_y.row(row)[f];
  const float s = 1.0f / (1.0f + expf(-gate));
  g.d_gate.row(row)[f] = d_y * up * s * fmaf(gate, 1.0f - s, 1.0f);
  g.d_up.row(row)[f] = d_y * gate * s;
  if (g.y.data != nullptr) g.y.row(row)[f] = gate * s * up;
}

}  // namespace

void swiglu_backward(const Gpu& gpu, const SwigluGradients& gradients, int64_t rows, int64_t width) {
  const int64_t count = rows * width;
  launch(gpu, swiglu_backward_kernel, dim3(static_cast<unsigned>(blocks_for(count, kThreads))), kThreads, 0, gradients,
         count, width);
}

void swiglu(const Gpu& gpu, Rows gate, Rows up, GatePlaces places, int64_t rows, int width, Rows y) {
  const int64_t count = rows * width;
  launch(gpu, swiglu_kernel, dim3(static_cast<unsigned>(blocks_for(count, kThreads))), kThreads, 0, gate, up, places,
         count, width, y);
}

void swiglu_rounded(const Gpu& gpu, Rows gate, Rows up, GatePlaces places, int64_t rows, RoundedRows y) {
  const int64_t count = rows * y.stride;
  launch(gpu, swiglu_rounded_kernel, dim3(static_cast<unsigned>(blocks_for(count, kThreads))), kThreads, 0, gate, up,
         places, count, y);
}

}  // namespace llama_ext::cuda
