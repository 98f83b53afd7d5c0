// What a block of kThreadCount threads does for its tiles of a product of few rows, wherever its weights come from: loads into
// registers (matmul_rows_mma.cu) or shared memory that is filled ahead (chain.cu). The bits are the same.
#pragma once

#include "cuda/rows_mma_step.h"

namespace llama_ext::cuda::rows_mma {

// `thread` is the calling one, 0 to kThreadCount - 1.

/// How a block goes over W: a stage is a step of each of its warps.
template <Kind kKind>
struct Walk {
  int chunks;        // of a row
  int steps;         // of a row, which is padded to whole ones
  int stages;        // of a tile
  int side_by_side;  // tiles
  int stride;        // tiles from one turn of a block to its next

  __device__ __forceinline__ explicit Walk(const RowsMmaView& v)
      : chunks(v.product.weight.stride / kChunkElements<kKind>),
        steps(chunks / 4),
        stages((steps + v.along_k - 1) / v.along_k),
        side_by_side(kWarps / v.along_k),
        stride(static_cast<int>(gridDim.x) * side_by_side) {}
};

/// Which rows of W tiles have.
struct TileRows {
  bool is_gate_up;
  int count;  // of hidden numbers or of rows

  __host__ __device__ explicit TileRows(const ProductView& p)
      : is_gate_up(p.is_gate_up), count(p.is_gate_up ? p.width : p.weight.rows) {}
  /// Row `of_half` of a half of a tile. Beyond the last row it is the last one again, whose sums are not written.
  __device__ __forceinline__ int row(int tile, int half, int of_half) const {
    if (!is_gate_up) return min(tile * kTileRows + half * 8 + of_half, count - 1);
    const int f = min(tile * 8 + of_half, count - 1);
    return f / kGateGroup * (2 * kGateGroup) + f % kGateGroup + half * kGateGroup;
  }
};

/// Factors of a warp's steps, kInFlight of them on their way. They are loaded for two steps at once, one by each lane: of row
/// lane % 16, of the first step or the second.
template <Kind kKind, bool kHasMin>
class Factors {
 public:
  __device__ __forceinline__ Factors(const RowsMmaView& v, int thread, const Walk<kKind>& walk)
      : lane_(thread % static_cast<int>(kWarp)),
        groups_(is_quantized(kKind) ? walk.chunks / (v.product.weight.group / kChunkElements<kKind>) : 0),
        mins_after_((v.product.weight.mins_at - v.product.weight.scales_at) / 2) {}

  __device__ __forceinline__ void enter(const ProductView& p, int tile) {
    if constexpr (is_quantized(kKind)) {
      const int64_t row = TileRows(p).row(tile, lane_ / 8 % 2, lane_ % 8);
      scales_ = reinterpret_cast<const uint16_t*>(p.weight.data + p.weight.scales_at) + row * groups_;
    }
  }
  /// Of the step that is number i of those on their way, if i is odd also of the one before.
  __device__ __forceinline__ void load(const RowsMmaView& v, int step, int steps, int i) {
    if constexpr (is_quantized(kKind)) {
      if (i % 2 == 0) return;
      const int of_factors = lane_ < 16 ? step - v.along_k : step;
      if (of_factors >= steps) return;
      const int group = of_factors >> v.group_shift;
      factors_[i / 2][0] = scales_[group];
      if constexpr (kHasMin) factors_[i / 2][1] = scales_[mins_after_ + group];
    }
  }
  __device__ __forceinline__ void give(int i, Step<kKind>& step) const {
    if constexpr (is_quantized(kKind)) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int from_lane = i % 2 * 16 + half * 8 + lane_ / 4;
        step.scales[half] = __shfl_sync(kAllLanes, factors_[i / 2][0], from_lane);
        if constexpr (kHasMin) step.mins[half] = __shfl_sync(kAllLanes, factors_[i / 2][1], from_lane);
      }
    }
  }

 private:
  static_assert(kInFlight % 2 == 0);
  int lane_;
  int groups_;
  int64_t mins_after_;
  const uint16_t* scales_ = nullptr;
  uint32_t factors_[kInFlight / 2][kHasMin ? 2 : 1] = {};
};

/// The number that a thread writes of a block's tiles, if any.
struct Number {
  int tile;
  int r;
  int m;
  bool is_there;

  __device__ __forceinline__ Number(const ProductView& p, int thread, int side_by_side) {
    const int each = p.is_gate_up ? 8 : kTileRows;
    const int number = thread / each;
    r = thread % each;
    m = number % static_cast<int>(p.rows);
    tile = number / static_cast<int>(p.rows);
    is_there = tile < side_by_side;
  }
  /// Where a row of y has it, of tiles from `first` on.
  __device__ __forceinline__ int place(const ProductView& p, int first) const {
    return (first + tile) * (p.is_gate_up ? 8 : kTileRows) + r;
  }
};

/// y of the block's tiles. weights.enter(tile): the warp's next tile; load(is_there, i): its next step begins to come, as number i of those
/// on their way; take(stage, stages, is_there): that step of a tile is needed now; words(i, half): it. wait: until x may be read; sync: of
/// the kThreadCount threads. memory: of the block, as Shared describes.
template <Kind kKind, bool kHasMin, typename Weights, typename Wait, typename Sync>
__device__ __forceinline__ void multiply_rows(const RowsMmaView& v, int thread, unsigned char* memory, Weights& weights,
                                              Wait wait, Sync sync) {
  constexpr bool kIsCodes = is_quantized(kKind);
  const ProductView& p = v.product;
  const WeightView& w = p.weight;
  const int lane = thread % static_cast<int>(kWarp);
  const int warp = thread / static_cast<int>(kWarp);
  const int g = lane / 4;
  const int t = lane % 4;
  const Walk<kKind> walk(v);
  const int steps = walk.steps;
  const int along_k = v.along_k;
  const uint32_t base = v.base;  // here, as a link's view lies in shared memory
  const int rounds = (walk.stages + kInFlight - 1) / kInFlight;
  const int my_share = warp & (along_k - 1);
  const int my_side = warp / along_k;
  const int padded = steps * kStep<kKind>;
  const int pitch = column_pitch(padded);
  const int rows = static_cast<int>(p.rows);

  auto& shared = *reinterpret_cast<Shared*>(memory);
  float* excess = reinterpret_cast<float*>(&shared + 1);
  float* totals = excess + (kIsCodes ? steps * kColumns : 0);
  auto* x = reinterpret_cast<uint16_t*>(totals + (kHasMin ? steps * kColumns : 0));

  Factors<kKind, kHasMin> factors(v, thread, walk);
  const auto enter = [&](int tile) {
    weights.enter(tile);
    factors.enter(p, tile);
  };
  // The warp's next step, as number i of those that are on their way.
  int next_step = my_share;
  const auto load = [&](bool is_tile, int i) {
    const int step = next_step;
    next_step += along_k;
    weights.load(is_tile && step < steps, i);
    if (is_tile) factors.load(v, step, steps, i);
  };
  // Of the block, the first one; the warp's is my_side after it.
  int tile = static_cast<int>(blockIdx.x) * walk.side_by_side;
  enter(tile + my_side);
#pragma unroll
  for (int i = 0; i < kInFlight; ++i) load(true, i);
  float4 gains[kGains];
#pragma unroll
  for (int i = 0; i < kGains; ++i) {
    if (p.norm.weight != nullptr) {
      gains[i] = load_four(p.norm.weight, 4 * (thread + i * kThreadCount), w.cols, v.is_aligned);
    }
  }
  wait();
  bring_rows<kKind>(v, thread, padded, pitch, shared, x, excess, totals, gains, sync);

  const Number mine(p, thread, walk.side_by_side);
  // Lanes of columns that there are not have some column: what they sum nobody reads.
  const uint16_t* column = x + (g < rows ? g : rows - 1) * pitch + my_share * kStep<kKind> + t * kAtOnce;
  for (int parity = 0; tile < v.tiles; tile += walk.stride, parity ^= 1) {
    const int my_row = mine.place(p, tile);
    float before = 0.0f;  // on its way while the weights are read
    if (p.accumulate && mine.is_there && my_row < w.rows) before = p.y.row(mine.m)[my_row];
    float sums[4] = {};
    const uint16_t* column_at = column;
    const float* excess_at = excess + my_share * kColumns + 2 * t;
    const float* totals_at = totals + my_share * kColumns + 2 * t;
    int step = my_share;
#pragma unroll 1
    for (int round = 0; round < rounds; ++round) {
      const bool is_last = round + 1 == rounds;
      const bool is_tile = !is_last || tile + my_side + walk.stride < v.tiles;
      if (is_last) {
        next_step = my_share;
        if (is_tile) enter(tile + my_side + walk.stride);
      }
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        weights.take(round * kInFlight + i, walk.stages, step < steps);
        if (step < steps) {
          Step<kKind> of{{weights.words(i, 0), weights.words(i, 1)}, {}, {}};
          factors.give(i, of);
          multiply_step<kKind, kHasMin>(sums, of, base, column_at, excess_at, totals_at);
        }
        step += along_k;
        column_at += along_k * kStep<kKind>;
        excess_at += along_k * kColumns;
        totals_at += along_k * kColumns;
        load(is_tile, i);
      }
    }
    auto& partial = shared.partial[parity];
    *reinterpret_cast<float2*>(&partial[warp][g][2 * t]) = {sums[0], sums[1]};
    *reinterpret_cast<float2*>(&partial[warp][g + 8][2 * t]) = {sums[2], sums[3]};
    sync();
    if (!mine.is_there) continue;
    const auto total = [&](int r) {
      float sum = 0.0f;
#pragma unroll
      for (int part = 0; part < kWarps; ++part) {
        if (part < along_k) sum += partial[mine.tile * along_k + part][r][mine.m];
      }
      return kIsCodes ? sum * shared.row_scales[mine.m] : sum;
    };
    if (p.is_gate_up) {
      if (my_row >= p.width) continue;
      float gate = total(mine.r);
      float up = total(mine.r + 8);
      if (p.bias != nullptr) {
        const int of_gate = my_row / kGateGroup * (2 * kGateGroup) + my_row % kGateGroup;
        gate += p.bias[of_gate];
        up += p.bias[of_gate + kGateGroup];
      }
      p.y.row(mine.m)[my_row] = silu(gate) * up;
    } else if (my_row < w.rows) {
      float sum = total(mine.r);
      if (p.bias != nullptr) sum += p.bias[my_row];
      p.y.row(mine.m)[my_row] = p.accumulate ? before + sum : sum;
    }
  }
}

}  // namespace llama_ext::cuda::rows_mma
