// y = x W^T for at most 8 rows of x, on the tensor cores: decoding, where reading the weights bounds the time. They do what one row
// needs as fast as what eight need, and take the sums off the other units, which have codes to bring into place.
//
// A warp has 16 rows of W (8 gates and their 8 ups) and a share of k: the four lanes of a row load 64 bytes of it at once, a step,
// and the warps of a block take turns along the row. A block stays on its multiprocessor and goes from tile to tile; the loads of
// the next steps are always on their way, across tiles, and begin before x is known. k is permuted alike on both sides of a
// product, so that weights are multiplied in the order in which they are loaded.
//
// x lies in shared memory: with weights of bfloat16 as such, with codes as float16, brought into its range by a power of two, 11
// bits. Codes are put into the lower bits of a float16 number, which makes them too large by a constant; each step's sum is
// corrected by that times the sum of x, and scaled in float32. A row's bits depend on W's shape and kind, and on nothing else:
// the warps' shares are added in order. Bound by the GPU's memory.
#include <algorithm>

#include "cuda/kernels.h"
#include "cuda/rows_mma_step.h"
#include "cuda/weight_codes.h"

namespace llama_ext::cuda {
namespace {

using namespace rows_mma;

template <Kind kKind, bool kHasMin>
__global__ void __launch_bounds__(kThreadCount, 1) matmul_rows_mma_kernel(const __grid_constant__ RowsMmaView v) {
  constexpr bool kIsCodes = is_quantized(kKind);
  constexpr int kElements = kChunkElements<kKind>;
  const ProductView& p = v.product;
  const WeightView& w = p.weight;
  const int lane = static_cast<int>(threadIdx.x % kWarp);
  const int warp = static_cast<int>(threadIdx.x / kWarp);
  const int g = lane / 4;
  const int t = lane % 4;
  const int chunks = w.stride / kElements;
  const int steps = chunks / 4;  // rows are padded to whole ones
  const int along_k = v.along_k;
  const int rounds = (steps + along_k * kInFlight - 1) / (along_k * kInFlight);
  const int my_share = warp & (along_k - 1);
  const int side_by_side = kWarps / along_k;  // tiles
  const int my_side = warp / along_k;
  const int padded = steps * kStep<kKind>;
  const int pitch = column_pitch(padded);
  const int rows = static_cast<int>(p.rows);
  const int groups = kIsCodes ? chunks / (w.group / kElements) : 0;
  const int stride = static_cast<int>(gridDim.x) * side_by_side;

  auto& shared = *reinterpret_cast<Shared*>(shared_memory());
  float* excess = reinterpret_cast<float*>(&shared + 1);
  float* totals = excess + (kIsCodes ? steps * kColumns : 0);
  auto* x = reinterpret_cast<uint16_t*>(totals + (kHasMin ? steps * kColumns : 0));

  // Where the lane loads the next steps of its two rows of a tile. Beyond the last row it is the last one again, whose sums are
  // not written. Factors are loaded for two steps at once, one by each lane: of row lane % 16, of the first step or the second.
  const unsigned char* from[2];
  const uint16_t* scales = nullptr;
  const auto row_of = [&](int tile, int half, int of_half) {
    if (p.is_gate_up) {
      const int f = min(tile * 8 + of_half, p.width - 1);
      return f / kGateGroup * (2 * kGateGroup) + f % kGateGroup + half * kGateGroup;
    }
    return min(tile * kTileRows + half * 8 + of_half, w.rows - 1);
  };
  const auto enter = [&](int tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      from[half] = w.data + int64_t{row_of(tile, half, g)} * chunks * 16 + my_share * 64 + t * 16;
    }
    if constexpr (kIsCodes) {
      const int64_t row = row_of(tile, lane / 8 % 2, lane % 8);
      scales = reinterpret_cast<const uint16_t*>(w.data + w.scales_at) + row * groups;
    }
  };
  const int64_t mins_after = (w.mins_at - w.scales_at) / 2;
  uint4 words[kInFlight][2] = {};
  uint32_t factors[kInFlight / 2][kHasMin ? 2 : 1] = {};
  static_assert(kInFlight % 2 == 0);
  // The warp's next step, as number i of those that are on their way.
  int next_step = my_share;
  const auto load = [&](bool is_tile, int i) {
    const int step = next_step;
    next_step += along_k;
    const unsigned char* at[2] = {from[0], from[1]};
    from[0] += along_k * 64;
    from[1] += along_k * 64;
    if (!is_tile) return;
    if (step < steps) {
#pragma unroll
      for (int half = 0; half < 2; ++half) words[i][half] = __ldcs(reinterpret_cast<const uint4*>(at[half]));
    }
    if constexpr (kIsCodes) {
      if (i % 2 == 0) return;
      const int of_factors = lane < 16 ? step - along_k : step;
      if (of_factors >= steps) return;
      const int group = of_factors >> v.group_shift;
      factors[i / 2][0] = scales[group];
      if constexpr (kHasMin) factors[i / 2][1] = scales[mins_after + group];
    }
  };
  // Of the block, the first one; the warp's is my_side after it.
  int tile = static_cast<int>(blockIdx.x) * side_by_side;
  enter(tile + my_side);
#pragma unroll
  for (int i = 0; i < kInFlight; ++i) {
    load(true, i);
  }
  float4 gains[kGains];
#pragma unroll
  for (int i = 0; i < kGains; ++i) {
    if (p.norm.weight != nullptr) {
      gains[i] = load_four(p.norm.weight, 4 * (static_cast<int>(threadIdx.x) + i * kThreadCount), w.cols, v.is_aligned);
    }
  }
  wait_for_predecessors();
  bring_rows<kKind>(v, padded, pitch, shared, x, excess, totals, gains);

  // The number that this thread writes of the block's tiles, if any.
  const int each = p.is_gate_up ? 8 : kTileRows;
  const int my_number = static_cast<int>(threadIdx.x) / each;
  const int my_r = static_cast<int>(threadIdx.x) % each;
  const int my_m = my_number % rows;
  const int my_tile = my_number / rows;
  const bool writes = my_tile < side_by_side;
  // Lanes of columns that there are not have some column: what they sum nobody reads.
  const uint16_t* column = x + (g < rows ? g : rows - 1) * pitch + my_share * kStep<kKind> + t * kAtOnce;
  for (int parity = 0; tile < v.tiles; tile += stride, parity ^= 1) {
    const int my_row = (tile + my_tile) * each + my_r;
    float before = 0.0f;  // on its way while the weights are read
    if (p.accumulate && writes && my_row < w.rows) before = p.y.row(my_m)[my_row];
    float sums[4] = {};
    const uint16_t* column_at = column;
    const float* excess_at = excess + my_share * kColumns + 2 * t;
    const float* totals_at = totals + my_share * kColumns + 2 * t;
    int step = my_share;
#pragma unroll 1
    for (int round = 0; round < rounds; ++round) {
      const bool is_last = round + 1 == rounds;
      const bool is_tile = !is_last || tile + my_side + stride < v.tiles;
      if (is_last) {
        next_step = my_share;
        if (is_tile) enter(tile + my_side + stride);
      }
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        if (step < steps) {
          Step<kKind> of{{words[i][0], words[i][1]}, {}, {}};
          if constexpr (kIsCodes) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const int from_lane = i % 2 * 16 + half * 8 + g;
              of.scales[half] = __shfl_sync(kAllLanes, factors[i / 2][0], from_lane);
              if constexpr (kHasMin) of.mins[half] = __shfl_sync(kAllLanes, factors[i / 2][1], from_lane);
            }
          }
          multiply_step<kKind, kHasMin>(sums, of, v.base, column_at, excess_at, totals_at);
        }
        step += along_k;
        column_at += along_k * kStep<kKind>;
        excess_at += along_k * kColumns;
        totals_at += along_k * kColumns;
        load(is_tile, i);
      }
    }
    auto& mine = shared.partial[parity];
    *reinterpret_cast<float2*>(&mine[warp][g][2 * t]) = {sums[0], sums[1]};
    *reinterpret_cast<float2*>(&mine[warp][g + 8][2 * t]) = {sums[2], sums[3]};
    __syncthreads();
    if (!writes) continue;
    const auto total = [&](int r) {
      float sum = 0.0f;
#pragma unroll
      for (int part = 0; part < kWarps; ++part) {
        if (part < along_k) sum += mine[my_tile * along_k + part][r][my_m];
      }
      return kIsCodes ? sum * shared.row_scales[my_m] : sum;
    };
    if (p.is_gate_up) {
      if (my_row >= p.width) continue;
      float gate = total(my_r);
      float up = total(my_r + 8);
      if (p.bias != nullptr) {
        const int of_gate = my_row / kGateGroup * (2 * kGateGroup) + my_row % kGateGroup;
        gate += p.bias[of_gate];
        up += p.bias[of_gate + kGateGroup];
      }
      p.y.row(my_m)[my_row] = silu(gate) * up;
    } else if (my_row < w.rows) {
      float sum = total(my_r);
      if (p.bias != nullptr) sum += p.bias[my_row];
      p.y.row(my_m)[my_row] = p.accumulate ? before + sum : sum;
    }
  }
}

// Of the largest GPU that there is, so that the order of a product's sums is that of its shape.
constexpr int kMostBlocks = 132;
// With fewer a block would have more tiles at a time than it has threads for their numbers, one each.
constexpr int kLeastAlongK = kWarps * kTileRows * kColumns / kThreadCount;
static_assert(kLeastAlongK * kThreadCount == kWarps * kTileRows * kColumns);

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
  size_t floats = sizeof(Shared) / sizeof(float);
  if (is_quantized(w.kind)) {
    floats += static_cast<size_t>(w.stride / step_of(w.kind) * kColumns) * (w.has_min ? 2 : 1);
  }
  return floats * sizeof(float);
}

/// Shared memory of one row of x.
size_t row_bytes(const WeightView& w) { return static_cast<size_t>(column_pitch(w.stride)) * sizeof(uint16_t); }

template <Kind kKind, bool kHasMin>
void start(const Gpu& gpu, const ProductView& p) {
  RowsMmaView v;
  v.product = p;
  v.tiles = static_cast<int>(p.is_gate_up ? blocks_for(p.width, 8) : blocks_for(p.weight.rows, kTileRows));
  v.base = kBase;
  v.is_aligned = (reinterpret_cast<uintptr_t>(p.x.data) | reinterpret_cast<uintptr_t>(p.norm.weight)) % 16 == 0 &&
                 p.x.stride % 4 == 0;
  v.group_shift = 0;
  while (is_quantized(kKind) && (kStep<kKind> << v.group_shift) < p.weight.group) ++v.group_shift;
  // As few warps along k as leave each enough steps to have on its way, but blocks for all multiprocessors (of the largest GPU, so
  // that a product's order of sums is that of its shape).
  const int64_t steps = p.weight.stride / kStep<kKind>;
  v.along_k = kWarps;
  while (v.along_k > kLeastAlongK && steps < int64_t{v.along_k} * kInFlight &&
         v.tiles >= int64_t{kMostBlocks} * (2 * kWarps / v.along_k)) {
    v.along_k /= 2;
  }
  const size_t shared = fixed_bytes(p.weight) + row_bytes(p.weight) * static_cast<size_t>(p.rows);
  divide_alike(matmul_rows_mma_kernel<kKind, kHasMin>);
  launch<Start::kEarly>(
      gpu, matmul_rows_mma_kernel<kKind, kHasMin>,
      dim3(static_cast<unsigned>(std::min<int64_t>(blocks_for(v.tiles, kWarps / v.along_k), gpu.multiprocessors()))),
      kThreadCount, shared, v);
}

}  // namespace

int64_t rows_of_mma(const Gpu& gpu, const WeightView& w) {
  const int step = step_of(w.kind);
  if (step == 0 || w.stride == 0) return 0;
  if (is_quantized(w.kind)) {
    // A step belongs to one group, and groups are found by a shift.
    const bool is_plain = !w.has_superblocks && w.group % step == 0;  // and so are rows of whole steps
    if (!is_plain || (w.group / step & (w.group / step - 1)) != 0) return 0;
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
    switch (p.weight.kind) {
      case Kind::kBF16:
        start<Kind::kBF16, false>(gpu, p);
        break;
      case Kind::kQ8:
        p.weight.has_min ? start<Kind::kQ8, true>(gpu, p) : start<Kind::kQ8, false>(gpu, p);
        break;
      case Kind::kQ4:
        p.weight.has_min ? start<Kind::kQ4, true>(gpu, p) : start<Kind::kQ4, false>(gpu, p);
        break;
      default:
        fail(ErrorKind::kInternal, "CUDA: such weights have no product of few rows on the tensor cores");
    }
  }
}

}  // namespace llama_ext::cuda
