// y = x W^T on the tensor cores (mma.sync, so one source for sm_80 and later), for more rows than decoding has. x has been
// rounded to 16 bits (prepare_rows.cu). A block of 4 warps makes 128 x 128 numbers, or 32 x 32 of few rows; both operands pass
// through shared memory 64 k at a time in two stages: the next one is on its way while this one is multiplied. Rows there are
// 144 bytes apart, so that neither fragments nor 16-byte stores meet in a bank.
//
// Codes, which come with few rows, are multiplied as whole numbers, which bfloat16 holds exactly, and every 32 k (16 of q6_k) the
// sum of a group is scaled into the float32 sums; minima meet the sums of x, which a product with ones gives. A number's order of
// summation depends on nothing but k: its bits do not depend on M, N or the size of the block. Bound by the tensor cores.
#include <algorithm>

#include "cuda/kernels.h"
#include "cuda/mma.h"
#include "cuda/weight_codes.h"

namespace llama_ext::cuda {
namespace {

constexpr int kMmaThreads = 128;
constexpr int kDepth = 64;          // k of a stage
constexpr int kPitch = kDepth + 8;  // 16-bit elements between rows in shared memory
constexpr int kPitchWords = kPitch / 2;
constexpr int kVectors = kDepth / 8;    // 16 bytes of a row of a stage
constexpr uint32_t kOnes = 0x3f803f80;  // bfloat16

/// Rows and columns of a block, and the products of 16 x 8 that a warp has of them.
template <int kWarpRows, int kWarpColumns, int kProductRows, int kProductColumns>
struct Shape {
  static constexpr int kWarpsAlongColumns = kWarpColumns;
  static constexpr int kMs = kProductRows;
  static constexpr int kNs = kProductColumns;
  static constexpr int kRows = kWarpRows * kProductRows * 16;
  static constexpr int kColumns = kWarpColumns * kProductColumns * 8;
  static_assert(kWarpRows * kWarpColumns * static_cast<int>(kWarp) == kMmaThreads);
};
using Large = Shape<2, 2, 4, 8>;
using Small = Shape<1, 4, 2, 1>;
constexpr int64_t kMostRowsOfSmall = 64;
static_assert(kMostRowsOfCodes <= kMostRowsOfSmall);

/// The part of a stage that one thread brings of quantised weights, in registers on its way.
template <Kind kKind, int kColumns>
struct Codes {
  static_assert(kColumns * kDepth / kChunk <= kMmaThreads);
  static constexpr int kLoads = kKind == Kind::kQ8 ? 2 : 1;  // of 16 bytes, for 32 codes
  Chunk<kKind> chunks[kLoads];

  /// Which row of the block, and which 32 k of the stage.
  __device__ __forceinline__ static int row() { return static_cast<int>(threadIdx.x) / 2; }
  __device__ __forceinline__ static int half() { return static_cast<int>(threadIdx.x) % 2; }

  __device__ __forceinline__ void load(const WeightView& w, int64_t first_column, int begin) {
    const int64_t n = first_column + row();
    const int chunk = begin / kChunk + half();
    if (row() >= kColumns || n >= w.rows || chunk * kChunk >= w.stride) return;
#pragma unroll
    for (int j = 0; j < kLoads; ++j) chunks[j].load(w, n, chunk * kLoads + j);
  }

  /// As bfloat16 numbers less the zero; nothing where there are no weights, so that NaN times it never comes.
  __device__ __forceinline__ void store(const WeightView& w, int64_t first_column, int begin, uint16_t* tile) const {
    if (row() >= kColumns) return;
    const float magic = code_magic(w);
    const bool is_there = first_column + row() < w.rows && begin + half() * kChunk < w.stride;
    uint4* to = reinterpret_cast<uint4*>(tile + row() * kPitch + half() * kChunk);
#pragma unroll
    for (int vector = 0; vector < 4; ++vector) {
      uint4 words{0, 0, 0, 0};
      if (is_there) {
        constexpr int kPartsPerLoad = 8 / kLoads;
        float values[8];
        chunks[2 * vector / kPartsPerLoad].values(2 * vector % kPartsPerLoad, magic, values);
        chunks[2 * vector / kPartsPerLoad].values((2 * vector + 1) % kPartsPerLoad, magic, values + 4);
        words = {pack_bf16(values[0], values[1]), pack_bf16(values[2], values[3]), pack_bf16(values[4], values[5]),
                 pack_bf16(values[6], values[7])};
      }
      to[vector] = words;
    }
  }
};

/// Starts copies of `kCount` rows of 16-bit numbers, `stride` apart, into a stage.
template <int kCount>
__device__ __forceinline__ void copy_rows(const uint16_t* from, int64_t stride, int64_t first, int64_t rows, int begin,
                                          uint16_t* tile) {
#pragma unroll 1  // addresses of all at once would take registers from the sums
  for (int i = 0; i < kCount * kVectors / kMmaThreads; ++i) {
    const int number = static_cast<int>(threadIdx.x) + i * kMmaThreads;
    const int row = number / kVectors;
    const int k = begin + number % kVectors * 8;
    const bool is_there = first + row < rows && k < stride;
    copy_async(tile + row * kPitch + number % kVectors * 8, is_there ? from + (first + row) * stride + k : from,
               is_there);
  }
}

template <Kind kKind, typename Shape>
__global__ void __launch_bounds__(kMmaThreads, 2) matmul_mma_kernel(const __grid_constant__ MmaView p) {
  constexpr MmaType kType = kKind == Kind::kF16 ? MmaType::kF16 : MmaType::kBF16;
  constexpr int kStage = (Shape::kRows + Shape::kColumns) * kPitch;
  constexpr int kStepsPerGroup = kKind == Kind::kQ6 ? 1 : 2;  // of 16 k
  auto* stages = reinterpret_cast<uint16_t*>(shared_memory());
  const WeightView& w = p.weight;
  const int64_t first_row = int64_t{blockIdx.x} * Shape::kRows;
  const int64_t first_column = int64_t{blockIdx.y} * Shape::kColumns;
  const int warp = static_cast<int>(threadIdx.x / kWarp);
  const int g = static_cast<int>(threadIdx.x % kWarp) / 4;
  const int t = static_cast<int>(threadIdx.x % kWarp) % 4;
  const int m0 = warp / Shape::kWarpsAlongColumns * Shape::kMs * 16;
  const int n0 = warp % Shape::kWarpsAlongColumns * Shape::kNs * 8;

  Codes<is_quantized(kKind) ? kKind : Kind::kQ8, is_quantized(kKind) ? Shape::kColumns : Small::kColumns> codes;
  const auto bring = [&](int stage, int begin) {
    uint16_t* x_tile = stages + stage * kStage;
    copy_rows<Shape::kRows>(p.x, w.stride, first_row, p.rows, begin, x_tile);
    if constexpr (!is_quantized(kKind)) {
      copy_rows<Shape::kColumns>(reinterpret_cast<const uint16_t*>(w.data), w.stride, first_column, w.rows, begin,
                                 x_tile + Shape::kRows * kPitch);
    } else {
      codes.load(w, first_column, begin);
    }
    commit_copies();
  };

  float sums[Shape::kMs][Shape::kNs][4] = {};
  bring(0, 0);
  int stage = 0;
  for (int begin = 0; begin < w.stride; begin += kDepth, stage ^= 1) {
    uint16_t* x_tile = stages + stage * kStage;
    uint16_t* w_tile = x_tile + Shape::kRows * kPitch;
    if constexpr (is_quantized(kKind)) codes.store(w, first_column, begin, w_tile);
    wait_for_copies<0>();
    __syncthreads();  // this stage is complete, and nobody reads the other one any more
    if (begin + kDepth < w.stride) bring(stage ^ 1, begin + kDepth);

    const auto* x_words = reinterpret_cast<const uint32_t*>(x_tile);
    const auto* w_words = reinterpret_cast<const uint32_t*>(w_tile);
    const auto load_a = [&](int i, int step, uint32_t a[4]) {
      const uint32_t* at = x_words + (m0 + i * 16 + g) * kPitchWords + step * 8 + t;
      a[0] = at[0];
      a[1] = at[8 * kPitchWords];
      a[2] = at[4];
      a[3] = at[8 * kPitchWords + 4];
    };
    const auto load_b = [&](int j, int step, uint32_t b[2]) {
      const uint32_t* at = w_words + (n0 + j * 8 + g) * kPitchWords + step * 8 + t;
      b[0] = at[0];
      b[1] = at[4];
    };

    if constexpr (!is_quantized(kKind)) {
#pragma unroll 1  // several steps at once would not fit into registers
      for (int step = 0; step < kDepth / 16; ++step) {
        uint32_t a[Shape::kMs][4];
#pragma unroll
        for (int i = 0; i < Shape::kMs; ++i) load_a(i, step, a[i]);
#pragma unroll
        for (int j = 0; j < Shape::kNs; ++j) {
          uint32_t b[2];
          load_b(j, step, b);
#pragma unroll
          for (int i = 0; i < Shape::kMs; ++i) mma<kType>(sums[i][j], a[i], b);
        }
      }
    } else {
#pragma unroll 1
      for (int step = 0; step < kDepth / 16; step += kStepsPerGroup) {
        const int k = begin + step * 16;
        if (k >= w.stride) break;
        uint32_t a[kStepsPerGroup][Shape::kMs][4];
        float x_sums[Shape::kMs][2] = {};  // of the lane's two rows
#pragma unroll
        for (int s = 0; s < kStepsPerGroup; ++s) {
#pragma unroll
          for (int i = 0; i < Shape::kMs; ++i) {
            load_a(i, step + s, a[s][i]);
            if (!w.has_min) continue;
            const uint32_t ones[2] = {kOnes, kOnes};
            float totals[4] = {x_sums[i][0], 0.0f, x_sums[i][1], 0.0f};  // all columns are alike
            mma<kType>(totals, a[s][i], ones);
            x_sums[i][0] = totals[0];
            x_sums[i][1] = totals[2];
          }
        }
#pragma unroll
        for (int j = 0; j < Shape::kNs; ++j) {
          uint32_t b[kStepsPerGroup][2];
#pragma unroll
          for (int s = 0; s < kStepsPerGroup; ++s) load_b(j, step + s, b[s]);
          // A lane's columns are two.
          GroupFactors factors[2];
#pragma unroll
          for (int column = 0; column < 2; ++column) {
            const int64_t n = first_column + n0 + j * 8 + 2 * t + column;
            factors[column] = n < w.rows ? group_factors(w, n, k / w.group) : GroupFactors{0.0f, 0.0f};
          }
#pragma unroll
          for (int i = 0; i < Shape::kMs; ++i) {
            float dots[4] = {};
#pragma unroll
            for (int s = 0; s < kStepsPerGroup; ++s) mma<kType>(dots, a[s][i], b[s]);
#pragma unroll
            for (int c = 0; c < 4; ++c) {
              sums[i][j][c] = fmaf(factors[c % 2].scale, dots[c], sums[i][j][c]);
              if (w.has_min) sums[i][j][c] = fmaf(factors[c % 2].min, x_sums[i][c / 2], sums[i][j][c]);
            }
          }
        }
      }
    }
  }
  wait_for_copies<0>();  // of a row without elements

#pragma unroll
  for (int i = 0; i < Shape::kMs; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t m = first_row + m0 + i * 16 + 8 * half + g;
      if (m >= p.rows) continue;
      const float scale = p.row_scales == nullptr ? 1.0f : p.row_scales[m];
#pragma unroll
      for (int j = 0; j < Shape::kNs; ++j) {
#pragma unroll
        for (int column = 0; column < 2; ++column) {
          const int64_t n = first_column + n0 + j * 8 + 2 * t + column;
          if (n >= w.rows) continue;
          float sum = sums[i][j][2 * half + column] * scale;
          if (p.bias != nullptr) sum += p.bias[n];
          float& y = p.y.row(m)[n];
          y = p.accumulate ? y + sum : sum;
        }
      }
    }
  }
}

template <Kind kKind, typename Shape>
void start(const Gpu& gpu, const MmaView& p) {
  const size_t shared = 2 * static_cast<size_t>((Shape::kRows + Shape::kColumns) * kPitch) * sizeof(uint16_t);
  constexpr int64_t kMostColumns = int64_t{65535} * Shape::kColumns;  // of a launch
  const int64_t columns = p.weight.rows;
  for (int64_t begin = 0; begin < columns; begin += kMostColumns) {
    MmaView part = p;
    part.weight = slice_rows(p.weight, begin, std::min(kMostColumns, columns - begin));
    part.y.data = p.y.data + begin;
    if (p.bias != nullptr) part.bias = p.bias + begin;
    // Blocks of the same columns come together, so that the weights are read from memory once.
    const dim3 grid(static_cast<unsigned>(blocks_for(p.rows, Shape::kRows)),
                    static_cast<unsigned>(blocks_for(part.weight.rows, Shape::kColumns)));
    launch(gpu, matmul_mma_kernel<kKind, Shape>, grid, kMmaThreads, shared, part);
  }
}

template <Kind kKind>
void start_rows(const Gpu& gpu, const MmaView& p) {
  if constexpr (!is_quantized(kKind)) {
    if (p.rows > kMostRowsOfSmall) return start<kKind, Large>(gpu, p);
  }
  start<kKind, Small>(gpu, p);
}

}  // namespace

bool has_mma(Kind kind) { return kind != Kind::kF32; }

void matmul_mma(const Gpu& gpu, const MmaView& p) {
  if (p.rows > kMostRowsOfSmall && has_wgmma(gpu, p.weight.kind)) return matmul_wgmma(gpu, p);
  switch (p.weight.kind) {
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
    case Kind::kF32:
      fail(ErrorKind::kInternal, "CUDA: float32 weights have no product on the tensor cores");
  }
}

}  // namespace llama_ext::cuda
