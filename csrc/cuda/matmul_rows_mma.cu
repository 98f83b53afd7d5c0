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
// and sums of steps, in float32. A row's bits depend on W's shape and kind, and on nothing else: a share's steps are added up from zero, a warp's
// shares in order, and then the warps'. One row of x may be made by matmul_one_row.cu instead.
// Bound by the GPU's memory.
#include <algorithm>

#include "cuda/rows_mma.h"
#include "cuda/rows_mma_weights.h"

namespace llama_ext::cuda {
namespace {

using namespace rows_mma;

/// A number of y of a block's tiles.
struct Number {
  int tile;
  int r;
  int m;

  __device__ __forceinline__ Number(const ProductView& p, int number) {
    r = number % of_tile(p);
    m = number / of_tile(p) % static_cast<int>(p.rows);
    tile = number / of_tile(p) / static_cast<int>(p.rows);
  }
  /// Of a tile and a row of x.
  __device__ __forceinline__ static int of_tile(const ProductView& p) { return p.is_gate_up ? 8 : kTileRows; }
  __device__ __forceinline__ static int count(const ProductView& p, int side_by_side) {
    return of_tile(p) * static_cast<int>(p.rows) * side_by_side;
  }
  /// Where a row of y has it, of tiles from `first` on.
  __device__ __forceinline__ int place(const ProductView& p, int first) const {
    return (first + tile) * of_tile(p) + r;
  }
};

/// y of the block's tiles. Warps meet once in each turn: each stores its sums, and the block's threads add them up, while others go on.
template <Kind kKind, bool kHasMin>
__global__ void __launch_bounds__(kThreadCount, 1) matmul_rows_mma_kernel(const __grid_constant__ RowsMmaView v) {
  constexpr bool kIsCodes = is_quantized(kKind);
  constexpr int kRowsOfProduct = kIsCodes ? kColumns / kDigits : kColumns;
  const ProductView& p = v.product;
  const WeightView& w = p.weight;
  Weights<kKind> weights(v);
  const int stride = static_cast<int>(gridDim.x) * (kWarps >> v.k_shift);  // tiles from a turn of the block to its next
  const auto thread = static_cast<int>(threadIdx.x);
  const int lane = thread % static_cast<int>(kWarp);
  const int warp = thread / static_cast<int>(kWarp);
  const int g = lane / 4;
  const int t = lane % 4;
  const Walk<kKind> walk(v);
  const int steps = walk.steps;
  const int along_k = v.along_k;
  const int tiles = v.tiles;
  const int my_side = warp >> v.k_shift;
  const int my_first = (warp & (along_k - 1)) * kTogether;       // step
  const int end = walk.rounds * along_k * kTogether + my_first;  // steps of a tile, in whole rounds
  const int rows = static_cast<int>(p.rows);

  auto& shared = *reinterpret_cast<Shared*>(shared_memory());
  auto* step_factors = reinterpret_cast<StepFactor*>(&shared + 1);
  auto* totals = reinterpret_cast<float*>(step_factors + (kIsCodes ? steps * kColumns : 0));
  auto* x = reinterpret_cast<unsigned char*>(totals + (kHasMin ? steps * kColumns : 0));
  const BroughtRows brought{shared, step_factors,         totals,
                            x,      steps * kStep<kKind>, column_pitch<kKind>(steps * kStep<kKind>)};

  const TileRows tile_rows(p);
  Factors<kKind, kHasMin> factors(v, tile_rows);
  const auto enter = [&](int tile) {
    weights.enter(tile_rows, tile);
    factors.enter(tile, g);
  };
  // Of the block, the first one; the warp's is my_side after it.
  int tile = static_cast<int>(blockIdx.x) * walk.side_by_side;
  enter(tile + my_side);
#pragma unroll
  for (int i = 0; i < kTogether; ++i) weights.load(my_first + i < steps, i);
  factors.load(my_first < steps ? my_first : 0);
  float4 gains[kGains];
#pragma unroll
  for (int i = 0; i < kGains; ++i) {
    const int k = 4 * thread + i * kTurn;
    gains[i] = {0.0f, 0.0f, 0.0f, 0.0f};
    if (p.norm.weight != nullptr && k < brought.padded) gains[i] = load_four(p.norm.weight, k, w.cols, v.is_whole);
  }
  wait_for_predecessors();
  bring_rows<kKind>(v, brought, gains);

  // Lanes of columns that there are not have some column: what they sum nobody reads.
  const int columns = kIsCodes ? kDigits * rows : rows;
  const auto column_of = [&](int n) { return (n < columns ? n : columns - 1) * brought.pitch; };
  const unsigned char* column = x + column_of(g) + t * static_cast<int>(sizeof(uint4));
  // Of rows of x beyond those of one product.
  const auto has_more = [&] { return kIsCodes && static_cast<int>(p.rows) > kRowsOfProduct; };
  // Not kept in registers over the loop.
  const auto numbers = [&] { return Number::count(p, kWarps >> v.k_shift); };
  const auto y_rows = [&] { return p.is_gate_up ? p.width : w.rows; };
  int buffer = 0;
  for (; tile < tiles; tile += stride) {
    // What a number is added to: into shared memory, as a register would be waited for together with the next tile's weights.
    const auto bring_before = [&](int number) {
      if (!p.accumulate || number >= numbers()) return;
      const Number mine(p, number);
      if (mine.place(p, tile) < y_rows()) copy_async(&shared.before[thread], p.y.row(mine.m) + mine.place(p, tile));
      commit_copies();
    };
    bring_before(thread);
    float sums[4] = {};
#pragma unroll 1
    for (int step = my_first; step < end; step += along_k * kTogether) {
      const bool is_last = step + along_k * kTogether >= end;
      const bool is_tile = !is_last || tile + my_side + stride < tiles;
      const int next_step = is_last ? my_first : step + along_k * kTogether;
      if (is_last && is_tile) enter(tile + my_side + stride);
      factors.take(step);
      factors.load(next_step < steps ? next_step : 0);
      float of_share[4] = {};  // with codes
      const auto multiply_step = [&](int i, bool with_more) {
        Step of{weights.words(i, 0), weights.words(i, 1), {}, {}};
        factors.give(i, of);
        const unsigned char* at = column + (step + i) * kStepPitch<kKind>;
        if constexpr (kIsCodes) {
          const int place = (step + i) * kColumns + t;
          multiply_codes<kKind, kHasMin>(of_share[0], of_share[1], of, at, step_factors + place, totals + place);
          if (with_more) {
            const int to_more = column_of(g + kColumns) - column_of(g);
            multiply_codes<kKind, kHasMin>(of_share[2], of_share[3], of, at + to_more,
                                           step_factors + place + kRowsOfProduct, totals + place + kRowsOfProduct);
          }
        } else {
          multiply_numbers(sums, of, at);
        }
      };
      if (!has_more() && step + kTogether <= steps) {
        // Without a branch between the steps, so that each runs while others wait for what they have loaded or multiplied.
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
          multiply_step(i, false);
          weights.load(is_tile && next_step + i < steps, i);
        }
      } else {
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
          if (step + i < steps) multiply_step(i, has_more());
          weights.load(is_tile && next_step + i < steps, i);
        }
      }
      if constexpr (kIsCodes) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[i] += of_share[i];
      }
    }
    auto& partial = shared.partial[buffer];
    if constexpr (kIsCodes) {
      partial[warp][g][t] = sums[0];
      partial[warp][g + 8][t] = sums[1];
      if (has_more()) {
        partial[warp][g][t + kRowsOfProduct] = sums[2];
        partial[warp][g + 8][t + kRowsOfProduct] = sums[3];
      }
    } else {
      *reinterpret_cast<float2*>(&partial[warp][g][2 * t]) = {sums[0], sums[1]};
      *reinterpret_cast<float2*>(&partial[warp][g + 8][2 * t]) = {sums[2], sums[3]};
    }
    __syncthreads();
#pragma unroll 1
    for (int number = thread; number < numbers(); number += kThreadCount) {
      float before = 0.0f;
      if (p.accumulate) {
        wait_for_copies<0>();
        before = shared.before[thread];
        bring_before(number + kThreadCount);
      }
      const Number mine(p, number);
      const int row = mine.place(p, tile);
      if (row >= y_rows()) continue;
      float* y = p.y.row(mine.m) + row;
      const int up_at = p.is_gate_up ? 8 : 0;  // without a branch among the sums
      float sum = 0.0f;
      float up = 0.0f;
#pragma unroll 1
      for (int part = 0; part < along_k; part += kLeastAlongK) {
#pragma unroll
        for (int i = 0; i < kLeastAlongK; ++i) {
          const auto& of_warp = partial[mine.tile * along_k + part + i];
          sum += of_warp[mine.r][mine.m];
          up += of_warp[mine.r + up_at][mine.m];
        }
      }
      if (p.is_gate_up) {
        if (p.bias != nullptr) {
          const int of_gate = row / kGateGroup * (2 * kGateGroup) + row % kGateGroup;
          sum += p.bias[of_gate];
          up += p.bias[of_gate + kGateGroup];
        }
        *y = silu(sum) * up;
      } else {
        if (p.bias != nullptr) sum += p.bias[row];
        if (p.accumulate) sum += before;
        *y = sum;
      }
    }
    __syncwarp();  // not all lanes have numbers to add up
    buffer = (buffer + 1) % kBuffers;
  }
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

size_t shared_bytes(const ProductView& p) {
  return fixed_bytes(p.weight) + row_bytes(p.weight) * static_cast<size_t>(p.rows);
}

template <Kind kKind, bool kHasMin>
void start(const Gpu& gpu, const RowsMmaView& v) {
  divide_alike(gpu, matmul_rows_mma_kernel<kKind, kHasMin>);
  launch<Start::kEarly>(
      gpu, matmul_rows_mma_kernel<kKind, kHasMin>,
      dim3(static_cast<unsigned>(std::min<int64_t>(blocks_for(v.tiles, kWarps / v.along_k), gpu.multiprocessors()))),
      kThreadCount, shared_bytes(v.product), v);
}

void start(const Gpu& gpu, const RowsMmaView& v) {
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

}  // namespace

RowsMmaView rows_mma::view_of(const ProductView& p) {
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
    takes_one_row(gpu, p) ? matmul_one_row(gpu, p) : start(gpu, view_of(p));
  }
}

}  // namespace llama_ext::cuda
