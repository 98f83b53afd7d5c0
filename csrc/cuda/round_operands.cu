// Operands of the tensor cores: float32 numbers of training (or frozen bfloat16 weights), and codes where they meet many rows, rounded
// to bfloat16, as they lie or transposed, so that every product is one of rows with rows. A block transposes 64 x 64 numbers: pairs of
// rows become words in shared memory, 33 to a column, and leave 16 bytes at a time. Bound by memory.
#include <type_traits>

#include "cuda/kernels.h"
#include "cuda/mma.h"
#include "cuda/vectors.h"
#include "cuda/weight_codes.h"

namespace llama_ext::cuda {
namespace {

constexpr int kTile = 64;
constexpr int kPitch = kTile / 2 + 1;  // words

/// Rows of codes that a thread unpacks: what it reads of them is on its way together.
constexpr int kUnpackedRows = 4;

__device__ __forceinline__ uint4 round_eight(const float values[8]) {
  return {round_pair(values[0], values[1]), round_pair(values[2], values[3]), round_pair(values[4], values[5]),
          round_pair(values[6], values[7])};
}

template <bool kVectors>
__device__ __forceinline__ void read(const float* row, int64_t column, int64_t width, float values[kVector]) {
  read_vector<kVectors>(row, column, width, values);
}
template <bool kVectors>
__device__ __forceinline__ void read(const uint16_t* row, int64_t column, int64_t width, float values[kVector]) {
#pragma unroll
  for (int i = 0; i < kVector; ++i) values[i] = column + i < width ? from_bf16(row[column + i]) : 0.0f;
}

/// Stores a transposed tile; `width` columns are numbers.
__device__ __forceinline__ void store_across(const uint32_t* words, int64_t first_row, int64_t first_column,
                                             int64_t width, RoundedOperand across) {
  const int thread = static_cast<int>(threadIdx.x);
#pragma unroll
  for (int part = 0; part < 2; ++part) {
    const int column = thread / 8 + 32 * part;
    const int64_t row = first_row + thread % 8 * 8;
    if (first_column + column >= width || row >= across.stride) continue;
    const uint32_t* from = words + column * kPitch + thread % 8 * 4;
    *reinterpret_cast<uint4*>(across.data + (first_column + column) * across.stride + row) = {from[0], from[1], from[2],
                                                                                              from[3]};
  }
}

template <typename Number, bool kVectors>
__global__ void __launch_bounds__(kThreads)
    transpose_kernel(const Number* x, int64_t stride, int64_t rows, int64_t width, RoundedOperand across,
                     RoundedOperand along) {
  auto* words = reinterpret_cast<uint32_t*>(shared_memory());  // (kTile columns, kPitch)
  const int64_t first_row = int64_t{blockIdx.y} * kTile;
  const int64_t first_column = int64_t{blockIdx.x} * kTile;
  const int thread = static_cast<int>(threadIdx.x);
#pragma unroll
  for (int part = 0; part < 2; ++part) {
    const int pair = thread / 16 + 16 * part;
    const int column = thread % 16 * kVector;
    const int64_t at = first_column + column;
    float values[2][kVector];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t row = first_row + 2 * pair + i;
      read<kVectors>(x + (row < rows ? row : 0) * stride, at, row < rows ? width : 0, values[i]);
      if (along.data == nullptr || row >= rows || at >= along.stride) continue;
      *reinterpret_cast<uint2*>(along.data + row * along.stride + at) = {round_pair(values[i][0], values[i][1]),
                                                                         round_pair(values[i][2], values[i][3])};
    }
#pragma unroll
    for (int i = 0; i < kVector; ++i) words[(column + i) * kPitch + pair] = round_pair(values[0][i], values[1][i]);
  }
  __syncthreads();
  store_across(words, first_row, first_column, width, across);
}

/// Columns [first, first + width) of codes.
template <Kind kKind>
__global__ void __launch_bounds__(kThreads)
    unpack_transposed_kernel(const __grid_constant__ WeightView w, int first, int64_t width, RoundedOperand across) {
  auto* words = reinterpret_cast<uint32_t*>(shared_memory());
  const int64_t first_row = int64_t{blockIdx.y} * kTile;
  const int64_t first_column = int64_t{blockIdx.x} * kTile;
  const int pair = static_cast<int>(threadIdx.x) / 8;
  const int column = static_cast<int>(threadIdx.x) % 8 * 8;
  const int k = first + static_cast<int>(first_column) + column;
  float values[2][8] = {};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int64_t row = first_row + 2 * pair + i;
    if (row >= w.rows || k >= w.stride) continue;
    EightCodes<kKind> codes;
    codes.load(w, row, k);
    codes.values(code_magic(w), group_factors(w, row, k / w.group), values[i]);
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) words[(column + i) * kPitch + pair] = round_pair(values[0][i], values[1][i]);
  __syncthreads();
  store_across(words, first_row, first_column, width, across);
}

/// Rows [first, first + count) of codes. A thread has the same eight columns of kUnpackedRows of them.
template <Kind kKind>
__global__ void __launch_bounds__(kThreads)
    unpack_kernel(const __grid_constant__ WeightView w, int64_t first, int64_t count, RoundedOperand y) {
  const int k = static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x) * 8;
  if (k >= y.stride) return;
  const int64_t begin = int64_t{blockIdx.x} * kUnpackedRows;
  const int group = k / w.group;
  const int unit = w.has_superblocks ? group / (w.unit / w.group) : group;
  const int groups = w.groups();
  const int units = w.has_superblocks ? w.units() : groups;
  EightCodes<kKind> codes[kUnpackedRows];
  GroupFactors factors[kUnpackedRows];
#pragma unroll
  for (int i = 0; i < kUnpackedRows; ++i) {
    const int64_t row = first + (begin + i < count ? begin + i : begin);
    codes[i].load(w, row, k);
    factors[i] = group_factors_at(w, row * groups + group, row * units + unit);
  }
  const float magic = code_magic(w);
#pragma unroll
  for (int i = 0; i < kUnpackedRows; ++i) {
    if (begin + i >= count) break;
    float values[8];
    codes[i].values(magic, factors[i], values);
    if (k + 8 > w.cols) {
#pragma unroll
      for (int j = 0; j < 8; ++j) values[j] = k + j < w.cols ? values[j] : 0.0f;
    }
    *reinterpret_cast<uint4*>(y.data + (begin + i) * y.stride + k) = round_eight(values);
  }
}

template <bool kVectors>
__global__ void round_kernel(Rows x, int64_t width, RoundedOperand y) {
  const float* from = x.row(blockIdx.x);
  uint16_t* to = y.data + int64_t{blockIdx.x} * y.stride;
  for (int64_t at = int64_t{threadIdx.x} * 8; at < y.stride; at += int64_t{blockDim.x} * 8) {
    float values[8];
    read<kVectors>(from, at, width, values);
    read<kVectors>(from, at + kVector, width, values + kVector);
    *reinterpret_cast<uint4*>(to + at) = round_eight(values);
  }
}

template <typename Number>
void transpose(const Gpu& gpu, const Number* x, int64_t stride, int64_t rows, int64_t width, RoundedOperand across,
               RoundedOperand along) {
  const int64_t widest = along.data != nullptr && along.stride > width ? along.stride : width;
  const dim3 grid(static_cast<unsigned>(blocks_for(widest, kTile)),
                  static_cast<unsigned>(blocks_for(across.stride, kTile)));
  const size_t shared = kTile * kPitch * sizeof(uint32_t);
  if constexpr (std::is_same_v<Number, float>) {
    if (has_vectors(x, stride)) {
      return launch(gpu, transpose_kernel<float, true>, grid, kThreads, shared, x, stride, rows, width, across, along);
    }
  }
  launch(gpu, transpose_kernel<Number, false>, grid, kThreads, shared, x, stride, rows, width, across, along);
}

/// Threads for `vectors` of 8 numbers in a row.
unsigned threads_of(int64_t vectors) {
  return vectors >= kThreads ? kThreads : static_cast<unsigned>(blocks_for(vectors, kWarp)) * kWarp;
}

/// Calls start(a constant that is `kind`), which codes are of.
template <typename Start>
void for_kind(Kind kind, Start&& start) {
  switch (kind) {
    case Kind::kQ8:
      return start(std::integral_constant<Kind, Kind::kQ8>());
    case Kind::kQ4:
      return start(std::integral_constant<Kind, Kind::kQ4>());
    case Kind::kQ5:
      return start(std::integral_constant<Kind, Kind::kQ5>());
    case Kind::kQ6:
      return start(std::integral_constant<Kind, Kind::kQ6>());
    default:
      fail(ErrorKind::kInternal, "CUDA: only codes are unpacked");
  }
}

}  // namespace

void round_rows(const Gpu& gpu, Rows x, int64_t rows, int64_t width, RoundedOperand y) {
  const int64_t vectors = blocks_for(y.stride, 8);
  const unsigned threads = threads_of(vectors);
  const auto kernel = has_vectors(x.data, x.stride) ? round_kernel<true> : round_kernel<false>;
  if (vectors > 0) launch(gpu, kernel, dim3(static_cast<unsigned>(rows)), threads, 0, x, width, y);
}

void round_transposed(const Gpu& gpu, Rows x, int64_t rows, int64_t width, RoundedOperand across,
                      RoundedOperand along) {
  transpose(gpu, static_cast<const float*>(x.data), x.stride, rows, width, across, along);
}

void round_transposed(const Gpu& gpu, const WeightView& weight, RoundedOperand across) {
  if (weight.kind == Kind::kF32) {
    return transpose(gpu, reinterpret_cast<const float*>(weight.data), weight.stride, weight.rows, weight.cols, across,
                     {});
  }
  transpose(gpu, reinterpret_cast<const uint16_t*>(weight.data), weight.stride, weight.rows, weight.cols, across, {});
}

void unpack_rows(const Gpu& gpu, const WeightView& weight, int64_t first, int64_t count, RoundedOperand y) {
  const int64_t vectors = y.stride / 8;
  const unsigned threads = threads_of(vectors);
  const dim3 grid(static_cast<unsigned>(blocks_for(count, kUnpackedRows)),
                  static_cast<unsigned>(vectors == 0 ? 0 : blocks_for(vectors, threads)));
  for_kind(weight.kind,
           [&](auto kind) { launch(gpu, unpack_kernel<kind()>, grid, threads, 0, weight, first, count, y); });
}

void unpack_transposed(const Gpu& gpu, const WeightView& weight, int64_t first, int64_t count, RoundedOperand across) {
  const dim3 grid(static_cast<unsigned>(blocks_for(count, kTile)),
                  static_cast<unsigned>(blocks_for(across.stride, kTile)));
  for_kind(weight.kind, [&](auto kind) {
    launch(gpu, unpack_transposed_kernel<kind()>, grid, kThreads, kTile * kPitch * sizeof(uint32_t), weight,
           static_cast<int>(first), count, across);
  });
}

}  // namespace llama_ext::cuda
