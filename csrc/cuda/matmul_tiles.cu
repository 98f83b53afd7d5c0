// y = x W^T with float32 products, for any number of rows and any kind of weights: what `exact` asks for, and float32 weights. A
// block makes 64 x 64 numbers; both operands pass through shared memory 16 k at a time, transposed, and a thread sums 4 x 4
// of them over k in ascending order with fused additions. Bound by the float32 units.
#include "cuda/kernels.h"
#include "cuda/weight_codes.h"

namespace llama_ext::cuda {
namespace {

constexpr int kTile = 64;
constexpr int kDepth = 16;
constexpr int kMicro = 4;
constexpr int kPitch = kTile + 4;  // keeps vectors of 4 aligned

/// 4 consecutive elements of a row, from `k` on, a multiple of 4.
template <Kind kKind>
__device__ __forceinline__ float4 load_weights(const WeightView& w, int64_t row, int k) {
  const unsigned char* at = w.data + w.row_at(row);
  if constexpr (kKind == Kind::kF32) {
    return *reinterpret_cast<const float4*>(at + int64_t{4} * k);
  } else if constexpr (kKind == Kind::kBF16) {
    const uint2 words = *reinterpret_cast<const uint2*>(at + int64_t{2} * k);
    return {__uint_as_float(words.x << 16), __uint_as_float(words.x & 0xffff0000u), __uint_as_float(words.y << 16),
            __uint_as_float(words.y & 0xffff0000u)};
  } else if constexpr (kKind == Kind::kF16) {
    const uint2 words = *reinterpret_cast<const uint2*>(at + int64_t{2} * k);
    return {from_f16(static_cast<uint16_t>(words.x)), from_f16(static_cast<uint16_t>(words.x >> 16)),
            from_f16(static_cast<uint16_t>(words.y)), from_f16(static_cast<uint16_t>(words.y >> 16))};
  } else {
    const GroupFactors factors = group_factors(w, row, k / w.group);
    const float magic = code_magic(w);
    float values[4];
    if constexpr (kKind == Kind::kQ8) {
      const uint32_t word = *reinterpret_cast<const uint32_t*>(at + k);
      for (int i = 0; i < 4; ++i) values[i] = code_to_float((word >> (8 * i)) & 255u, magic);
    } else {
      const int number = k % kChunk;  // 4 codes of one word: all low or all high nibbles
      const uint32_t word =
          *reinterpret_cast<const uint32_t*>(at + k / kChunk * 16 + nibble_byte(number)) >> nibble_shift(number);
      const auto* planes = reinterpret_cast<const uint32_t*>(w.data + w.high_words_at(row, k / kChunk));
      for (int i = 0; i < 4; ++i) {
        uint32_t code = (word >> (8 * i)) & 15u;
        if constexpr (high_bits(kKind) > 0) code |= (planes[0] >> (number + i) & 1u) << 4;
        if constexpr (high_bits(kKind) > 1) code |= (planes[1] >> (number + i) & 1u) << 5;
        values[i] = code_to_float(code, magic);
      }
    }
    return {fmaf(factors.scale, values[0], factors.min), fmaf(factors.scale, values[1], factors.min),
            fmaf(factors.scale, values[2], factors.min), fmaf(factors.scale, values[3], factors.min)};
  }
}

template <Kind kKind>
__global__ void __launch_bounds__(kThreads) matmul_tiles_kernel(const __grid_constant__ ProductView p) {
  auto* x_tile = reinterpret_cast<float*>(shared_memory());  // (kDepth, kPitch)
  float* w_tile = x_tile + kDepth * kPitch;
  const WeightView& w = p.weight;
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t first_row = int64_t{blockIdx.y} * kTile;
  const int64_t first_column = int64_t{blockIdx.x} * kTile;
  // A thread brings 4 elements of k of one row of each operand.
  const int brought_row = thread / 4;
  const int brought_k = thread % 4 * 4;
  const int64_t x_row = first_row + brought_row;
  const int64_t w_row = first_column + brought_row;
  const int m0 = thread / 16 * kMicro;
  const int n0 = thread % 16 * kMicro;
  float sums[kMicro][kMicro] = {};
  for (int begin = 0; begin < w.stride; begin += kDepth) {
    const int k = begin + brought_k;
    float4 weights{0.0f, 0.0f, 0.0f, 0.0f};
    if (w_row < w.rows) weights = load_weights<kKind>(w, w_row, k);
    float x[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = x_row < p.rows && k + i < w.cols ? p.x.row(x_row)[k + i] : 0.0f;
    __syncthreads();  // the tiles before have been read
#pragma unroll
    for (int i = 0; i < 4; ++i) x_tile[(brought_k + i) * kPitch + brought_row] = x[i];
    w_tile[brought_k * kPitch + brought_row] = weights.x;
    w_tile[(brought_k + 1) * kPitch + brought_row] = weights.y;
    w_tile[(brought_k + 2) * kPitch + brought_row] = weights.z;
    w_tile[(brought_k + 3) * kPitch + brought_row] = weights.w;
    __syncthreads();
#pragma unroll
    for (int depth = 0; depth < kDepth; ++depth) {
      const float4 a = *reinterpret_cast<const float4*>(x_tile + depth * kPitch + m0);
      const float4 b = *reinterpret_cast<const float4*>(w_tile + depth * kPitch + n0);
      const float rows[kMicro] = {a.x, a.y, a.z, a.w};
      const float columns[kMicro] = {b.x, b.y, b.z, b.w};
#pragma unroll
      for (int i = 0; i < kMicro; ++i) {
#pragma unroll
        for (int j = 0; j < kMicro; ++j) sums[i][j] = fmaf(rows[i], columns[j], sums[i][j]);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kMicro; ++i) {
    const int64_t m = first_row + m0 + i;
    if (m >= p.rows) break;
#pragma unroll
    for (int j = 0; j < kMicro; ++j) {
      const int64_t n = first_column + n0 + j;
      if (n >= w.rows) break;
      float sum = sums[i][j];
      if (p.bias != nullptr) sum += p.bias[n];
      float& y = p.y.row(m)[n];
      y = p.accumulate ? y + sum : sum;
    }
  }
}

// Rows of blocks that one launch may have.
constexpr int64_t kMostRows = int64_t{65535} * kTile;

template <Kind kKind>
void start(const Gpu& gpu, ProductView p) {
  const int64_t rows = p.rows;
  for (int64_t begin = 0; begin < rows; begin += kMostRows) {
    ProductView part = p;
    part.rows = rows - begin < kMostRows ? rows - begin : kMostRows;
    part.x.data = p.x.row(begin);
    part.y.data = p.y.row(begin);
    launch(gpu, matmul_tiles_kernel<kKind>,
           dim3(static_cast<unsigned>(blocks_for(p.weight.rows, kTile)),
                static_cast<unsigned>(blocks_for(part.rows, kTile))),
           kThreads, 2 * kDepth * kPitch * sizeof(float), part);
  }
}

}  // namespace

void matmul_tiles(const Gpu& gpu, const ProductView& p) {
  switch (p.weight.kind) {
    case Kind::kF32:
      return start<Kind::kF32>(gpu, p);
    case Kind::kF16:
      return start<Kind::kF16>(gpu, p);
    case Kind::kBF16:
      return start<Kind::kBF16>(gpu, p);
    case Kind::kQ8:
      return start<Kind::kQ8>(gpu, p);
    case Kind::kQ4:
      return start<Kind::kQ4>(gpu, p);
    case Kind::kQ5:
      return start<Kind::kQ5>(gpu, p);
    case Kind::kQ6:
      return start<Kind::kQ6>(gpu, p);
  }
}

}  // namespace llama_ext::cuda
