// y = x W^T for at most 4 rows of x: decoding. Every weight is read once, in 16 bytes a lane, and bounds the time. A warp owns two
// rows of W (or the gate and the up of one hidden number), whose sums its lanes share; a block of 8 warps keeps the
// activations in shared memory, float32, normalised and rounded on the way there, in an order without bank conflicts.
//
// A lane sums its chunks in ascending order of k, and a butterfly adds the lanes: bits depend on the weights' kind, never on M,
// N or the GPU. Codes are multiplied as whole numbers, and each group's sum by its scale.
#include "cuda/kernels.h"
#include "cuda/row_norm.h"
#include "cuda/weight_codes.h"

namespace llama_ext::cuda {
namespace {

constexpr int kWarps = kThreads / kWarp;
constexpr int kRowsPerWarp = 2;
constexpr int kActivations = 8192;  // floats of x in shared memory, at most
constexpr int kGateGroup = 16;      // ops/feed_forward.h

/// Floats of one row of x that lie in shared memory at a time.
__host__ __device__ constexpr int tile_size(int stride, int rows) {
  return stride < kActivations / rows ? stride : kActivations / rows;
}

/// Fills shared memory with columns [begin, begin + tile) of all rows of x.
template <Kind kKind, int kRows>
__device__ __forceinline__ void load_activations(const ProductView& p, const float* inverse_rms, int begin, int tile,
                                                 float* activations) {
  constexpr int kParts = kChunkParts<kKind>;
  for (int i = static_cast<int>(threadIdx.x); i < kRows * tile; i += static_cast<int>(kThreads)) {
    const int m = i / tile;
    const int column = i % tile;
    float value = 0.0f;
    if (m < p.rows && begin + column < p.weight.cols) {
      value = p.x.row(m)[begin + column];
      if (p.norm.weight != nullptr) value = normalized(value, inverse_rms[m], p.norm.weight[begin + column]);
      if (p.rounding == Rounding::kBF16) value = round_to_bf16(value);
    }
    const int vector = column / 4;
    const int place = activation_place(vector / kParts, vector % kParts, kParts);
    activations[m * tile + 4 * place + column % 4] = value;
  }
}

template <Kind kKind, int kRows>
__global__ void __launch_bounds__(kThreads, 2) matmul_rows_kernel(const __grid_constant__ ProductView p) {
  wait_for_predecessors();
  constexpr int kParts = kChunkParts<kKind>;
  constexpr int kElements = kChunkElements<kKind>;
  // Vectors of 4 whose codes share a scale: q6_k has one for 16, all others at least for a whole chunk.
  constexpr int kPartsPerGroup = kKind == Kind::kQ6 ? 4 : kParts;
  // Of each row of W. More than one of codes for several rows of x would not fit into registers.
  [[maybe_unused]] constexpr int kChunksInFlight = is_quantized(kKind) && kRows > 1 ? 1 : 2;
  const WeightView& w = p.weight;
  const int tile = tile_size(w.stride, kRows);
  auto* activations = reinterpret_cast<float*>(shared_memory());
  float* squares = activations + kRows * tile;
  float* inverse_rms = squares + squares_of(w.cols);  // (kRows)
  if (p.norm.weight != nullptr) {
#pragma unroll 1
    for (int m = 0; m < kRows; ++m) {
      const float inverse = block_inverse_rms(p.x.row(m < p.rows ? m : 0), w.cols, p.norm.eps, squares);
      if (threadIdx.x == 0) inverse_rms[m] = inverse;
      __syncthreads();
    }
  }

  const int lane = static_cast<int>(threadIdx.x % kWarp);
  const int64_t number = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp;
  int64_t row[kRowsPerWarp];
  if (p.is_gate_up) {
    const int64_t f = number < p.width ? number : p.width - 1;
    row[0] = f / kGateGroup * (2 * kGateGroup) + f % kGateGroup;
    row[1] = row[0] + kGateGroup;
  } else {
    for (int r = 0; r < kRowsPerWarp; ++r) {
      row[r] = number * kRowsPerWarp + r;
      if (row[r] >= w.rows) row[r] = w.rows - 1;  // computed once more, and not written
    }
  }

  float sums[kRows][kRowsPerWarp] = {};
  const float magic = code_magic(w);
  for (int begin = 0; begin < w.stride; begin += tile) {
    const int columns = w.stride - begin < tile ? w.stride - begin : tile;
    if (begin > 0) __syncthreads();
    load_activations<kKind, kRows>(p, inverse_rms, begin, tile, activations);
    __syncthreads();
#pragma unroll kChunksInFlight
    for (int chunk = lane; chunk < columns / kElements; chunk += static_cast<int>(kWarp)) {
      const int index = begin / kElements + chunk;
      Chunk<kKind> weights[kRowsPerWarp];
#pragma unroll
      for (int r = 0; r < kRowsPerWarp; ++r) weights[r].load(w, row[r], index);
      float dots[kRows][kRowsPerWarp] = {};
      float totals[kRows] = {};
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        float4 x[kRows];
#pragma unroll
        for (int m = 0; m < kRows; ++m) {
          x[m] = reinterpret_cast<const float4*>(activations + m * tile)[activation_place(chunk, part, kParts)];
          if constexpr (is_quantized(kKind)) totals[m] += (x[m].x + x[m].y) + (x[m].z + x[m].w);
        }
#pragma unroll
        for (int r = 0; r < kRowsPerWarp; ++r) {
          float values[4];
          weights[r].values(part, magic, values);
#pragma unroll
          for (int m = 0; m < kRows; ++m) {
            float& sum = is_quantized(kKind) ? dots[m][r] : sums[m][r];
            sum = fmaf(x[m].x, values[0], sum);
            sum = fmaf(x[m].y, values[1], sum);
            sum = fmaf(x[m].z, values[2], sum);
            sum = fmaf(x[m].w, values[3], sum);
          }
        }
        if constexpr (is_quantized(kKind)) {
          if ((part + 1) % kPartsPerGroup != 0) continue;
          const int group = (index * kElements + part / kPartsPerGroup * kPartsPerGroup * 4) / w.group;
#pragma unroll
          for (int r = 0; r < kRowsPerWarp; ++r) {
            const GroupFactors factors = group_factors(w, row[r], group);
#pragma unroll
            for (int m = 0; m < kRows; ++m) {
              sums[m][r] = fmaf(factors.scale, dots[m][r], sums[m][r]);
              if (w.has_min) sums[m][r] = fmaf(factors.min, totals[m], sums[m][r]);
              dots[m][r] = 0.0f;
            }
          }
#pragma unroll
          for (int m = 0; m < kRows; ++m) totals[m] = 0.0f;
        }
      }
    }
  }

#pragma unroll
  for (int m = 0; m < kRows; ++m) {
#pragma unroll
    for (int r = 0; r < kRowsPerWarp; ++r) {
      sums[m][r] = warp_sum(sums[m][r]);
      if (p.bias != nullptr) sums[m][r] += p.bias[row[r]];
    }
    if (lane != 0 || m >= p.rows) continue;
    if (p.is_gate_up) {
      if (number < p.width) p.y.row(m)[number] = silu(sums[m][0]) * sums[m][1];
      continue;
    }
    for (int r = 0; r < kRowsPerWarp; ++r) {
      if (number * kRowsPerWarp + r >= w.rows) continue;
      float& y = p.y.row(m)[row[r]];
      y = p.accumulate ? y + sums[m][r] : sums[m][r];
    }
  }
}

template <Kind kKind, int kRows>
void start(const Gpu& gpu, const ProductView& p) {
  const int64_t warps = p.is_gate_up ? p.width : blocks_for(p.weight.rows, kRowsPerWarp);
  const size_t floats =
      static_cast<size_t>(kRows * tile_size(p.weight.stride, kRows) + squares_of(p.weight.cols) + kRows);
  launch<Start::kEarly>(gpu, matmul_rows_kernel<kKind, kRows>, dim3(static_cast<unsigned>(blocks_for(warps, kWarps))),
                        kThreads, floats * sizeof(float), p);
}

template <Kind kKind>
void start_rows(const Gpu& gpu, const ProductView& p) {
  if (p.rows <= 1) return start<kKind, 1>(gpu, p);
  if (p.rows == 2) return start<kKind, 2>(gpu, p);
  start<kKind, 4>(gpu, p);
}

}  // namespace

void matmul_rows(const Gpu& gpu, const ProductView& p) {
  if (p.rows == 0) return;
  switch (p.weight.kind) {
    case Kind::kF32:
      return start_rows<Kind::kF32>(gpu, p);
    case Kind::kF16:
      return start_rows<Kind::kF16>(gpu, p);
    case Kind::kBF16:
      return start_rows<Kind::kBF16>(gpu, p);
    case Kind::kQ8:
      return start_rows<Kind::kQ8>(gpu, p);
    case Kind::kQ4:
      return start_rows<Kind::kQ4>(gpu, p);
    case Kind::kQ5:
      return start_rows<Kind::kQ5>(gpu, p);
    case Kind::kQ6:
      return start_rows<Kind::kQ6>(gpu, p);
  }
}

}  // namespace llama_ext::cuda
