// What a block of kThreadCount threads does for its tiles of a product of few rows, wherever its weights come from: loads into
// registers (matmul_rows_mma.cu) or shared memory that is filled ahead (chain.cu). The bits are the same.
#pragma once

#include "cuda/rows_mma_step.h"

namespace llama_ext::cuda::rows_mma {

// `thread` is the calling one, 0 to kThreadCount - 1.

/// How a block goes over W. A row's steps are taken kTogether at a time, a share, by the warps of a tile in turn.
template <Kind kKind>
struct Walk {
  int chunks;        // of a row
  int steps;         // of a row, which is padded to whole ones
  int rounds;        // of a tile, a share of each of its warps
  int side_by_side;  // tiles
  int stride;        // tiles from one turn of a block to its next

  __device__ __forceinline__ explicit Walk(const RowsMmaView& v)
      : chunks(v.product.weight.stride / kChunkElements<kKind>),
        steps(chunks / 4),
        rounds((steps + v.along_k * kTogether - 1) / kTogether >> v.k_shift),
        side_by_side(kWarps >> v.k_shift),
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

/// Factors of a warp's next share. They are loaded for two steps at once, one by each lane: of row lane % 16, of the first step or the
/// second.
template <Kind kKind, bool kHasMin>
class Factors {
 public:
  __device__ __forceinline__ Factors(const RowsMmaView& v, int thread, const Walk<kKind>& walk)
      : lane_(thread % static_cast<int>(kWarp)),
        groups_(is_quantized(kKind) ? walk.chunks / (v.product.weight.group / kChunkElements<kKind>) : 0),
        mins_after_((v.product.weight.mins_at - v.product.weight.scales_at) / 2),
        all_(reinterpret_cast<const uint16_t*>(v.product.weight.data + v.product.weight.scales_at)) {}

  __device__ __forceinline__ void enter(const TileRows& rows, int tile) {
    if constexpr (is_quantized(kKind)) {
      scales_ = all_ + int64_t{rows.row(tile, lane_ / 8 % 2, lane_ % 8)} * groups_;
    }
  }
  /// Of the share whose step i is `step`, if i is odd: also of the step before.
  __device__ __forceinline__ void load(int group_shift, int step, int steps, int i) {
    if constexpr (is_quantized(kKind)) {
      if (i % 2 == 0) return;
      const int of_factors = lane_ < 16 ? step - 1 : step;
      if (of_factors >= steps) return;
      const int group = of_factors >> group_shift;
      factors_[i / 2][0] = scales_[group];
      if constexpr (kHasMin) factors_[i / 2][1] = scales_[mins_after_ + group];
    }
  }
  __device__ __forceinline__ void give(int i, Step& step) const {
    if constexpr (is_quantized(kKind)) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int from_lane = i % 2 * 16 + half * 8 + lane_ / 4;
        step.scales[half] = from_f16(static_cast<uint16_t>(__shfl_sync(kAllLanes, factors_[i / 2][0], from_lane)));
        if constexpr (kHasMin) {
          step.mins[half] = from_f16(static_cast<uint16_t>(__shfl_sync(kAllLanes, factors_[i / 2][1], from_lane)));
        }
      }
    }
  }

 private:
  static_assert(kTogether % 2 == 0);
  int lane_;
  int groups_;
  int64_t mins_after_;
  const uint16_t* all_;
  const uint16_t* scales_ = nullptr;  // of the lane's row
  uint32_t factors_[kTogether / 2][kHasMin ? 2 : 1] = {};
};

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

/// Turns of a block over its tiles, where all warps meet in each and its first threads add up what the warps have.
template <typename Sync>
class MeetingTurns {
 public:
  __device__ __forceinline__ MeetingTurns(int thread, Sync sync) : sync_(sync), thread_(thread) {}
  __device__ __forceinline__ int buffer() const { return buffer_; }
  __device__ __forceinline__ bool is_adding() const { return true; }
  __device__ __forceinline__ int first() const { return thread_; }
  __device__ __forceinline__ int step() const { return kThreadCount; }
  __device__ __forceinline__ void before_sums() {}
  __device__ __forceinline__ void after_sums() { sync_(); }
  __device__ __forceinline__ void next() { buffer_ = (buffer_ + 1) % kBuffers; }

 private:
  Sync sync_;
  int thread_;
  int buffer_ = 0;
};

/// y of the block's tiles. weights.enter(tile_rows, tile): the warp's next tile; load(is_there, i): step i of its next share begins to come, in
/// order; take(i): step i of that share is needed now; words(i, half): it. turns: before a warp stores its sums in buffer(), after it, and once they
/// are added up; is_adding(): numbers first(), first() + step(), ... of this turn are the calling thread's, of whole warps. wait: until x may be
/// read; sync: of the kThreadCount threads. memory: of the block, as Shared describes.
template <Kind kKind, bool kHasMin, typename Weights, typename Turns, typename Wait, typename Sync>
__device__ __forceinline__ void multiply_rows(const RowsMmaView& v, int thread, unsigned char* memory, Weights& weights,
                                              Turns& turns, Wait wait, Sync sync) {
  constexpr bool kIsCodes = is_quantized(kKind);
  constexpr int kRowsOfProduct = kIsCodes ? kColumns / kDigits : kColumns;
  const ProductView& p = v.product;
  const WeightView& w = p.weight;
  const int lane = thread % static_cast<int>(kWarp);
  const int warp = thread / static_cast<int>(kWarp);
  const int g = lane / 4;
  const int t = lane % 4;
  const Walk<kKind> walk(v);
  const int steps = walk.steps;
  const int rounds = walk.rounds;
  const int stride = walk.stride;
  const int along_k = v.along_k;
  const int tiles = v.tiles;
  const int my_side = warp >> v.k_shift;
  const int my_first = (warp & (along_k - 1)) * kTogether;  // step
  const int rows = static_cast<int>(p.rows);

  auto& shared = *reinterpret_cast<Shared*>(memory);
  auto* step_factors = reinterpret_cast<StepFactor*>(&shared + 1);
  auto* totals = reinterpret_cast<float*>(step_factors + (kIsCodes ? steps * kColumns : 0));
  auto* x = reinterpret_cast<unsigned char*>(totals + (kHasMin ? steps * kColumns : 0));
  const BroughtRows brought{shared, step_factors,         totals,
                            x,      steps * kStep<kKind>, column_pitch<kKind>(steps * kStep<kKind>)};

  const TileRows tile_rows(p);  // in registers: a link's view lies in shared memory
  Factors<kKind, kHasMin> factors(v, thread, walk);
  const auto enter = [&](int tile) {
    weights.enter(tile_rows, tile);
    factors.enter(tile_rows, tile);
  };
  const auto load = [&](bool is_tile, int step, int i) {
    weights.load(is_tile && step < steps, i);
    if (is_tile) factors.load(v.group_shift, step, steps, i);
  };
  // Of the block, the first one; the warp's is my_side after it.
  int tile = static_cast<int>(blockIdx.x) * walk.side_by_side;
  enter(tile + my_side);
#pragma unroll
  for (int i = 0; i < kTogether; ++i) load(true, my_first + i, i);
  float4 gains[kGains];
#pragma unroll
  for (int i = 0; i < kGains; ++i) {
    const int k = 4 * thread + i * kTurn;
    gains[i] = {0.0f, 0.0f, 0.0f, 0.0f};
    if (p.norm.weight != nullptr && k < brought.padded) gains[i] = load_four(p.norm.weight, k, w.cols, v.is_whole);
  }
  wait();
  bring_rows<kKind>(v, thread, brought, gains, sync);

  // Lanes of columns that there are not have some column: what they sum nobody reads.
  const int columns = kIsCodes ? kDigits * rows : rows;
  const auto column_of = [&](int n) { return (n < columns ? n : columns - 1) * brought.pitch; };
  const unsigned char* column = x + column_of(g) + my_first * kStepPitch<kKind> + t * static_cast<int>(sizeof(uint4));
  // Of rows of x beyond those of one product.
  const bool has_more = kIsCodes && rows > kRowsOfProduct;
  const int to_more = column_of(g + kColumns) - column_of(g);
  float before = 0.0f;  // on its way while the weights are read; where it is not needed nobody waits for it
  // Not kept in registers over the loop.
  const auto numbers = [&] { return Number::count(p, kWarps >> v.k_shift); };
  const auto y_rows = [&] { return p.is_gate_up ? p.width : w.rows; };
  for (; tile < tiles; tile += stride) {
    if (p.accumulate && turns.is_adding() && turns.first() < numbers()) {
      const Number mine(p, turns.first());
      if (mine.place(p, tile) < y_rows()) before = p.y.row(mine.m)[mine.place(p, tile)];
    }
    float sums[4] = {};
    const unsigned char* column_at = column;
    int step = my_first;
#pragma unroll 1
    for (int round = 0; round < rounds; ++round) {
      const bool is_last = round + 1 == rounds;
      const bool is_tile = !is_last || tile + my_side + stride < tiles;
      const int next_step = is_last ? my_first : step + along_k * kTogether;
      if (is_last && is_tile) enter(tile + my_side + stride);
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        weights.take(i);
        if (step + i < steps) {
          Step of{weights.words(i, 0), weights.words(i, 1), {}, {}};
          factors.give(i, of);
          if constexpr (kIsCodes) {
            const int at = (step + i) * kColumns + t;
            multiply_codes<kKind, kHasMin>(sums[0], sums[1], of, column_at + i * kStepPitch<kKind>, step_factors + at,
                                           totals + at);
            if (has_more) {
              multiply_codes<kKind, kHasMin>(sums[2], sums[3], of, column_at + to_more + i * kStepPitch<kKind>,
                                             step_factors + at + kRowsOfProduct, totals + at + kRowsOfProduct);
            }
          } else {
            multiply_numbers(sums, of, column_at + i * kStepPitch<kKind>);
          }
        }
        load(is_tile, next_step + i, i);
      }
      step += along_k * kTogether;
      column_at += along_k * kTogether * kStepPitch<kKind>;
    }
    auto& partial = shared.partial[turns.buffer()];
    turns.before_sums();
    if constexpr (kIsCodes) {
      partial[warp][g][t] = sums[0];
      partial[warp][g + 8][t] = sums[1];
      if (has_more) {
        partial[warp][g][t + kRowsOfProduct] = sums[2];
        partial[warp][g + 8][t + kRowsOfProduct] = sums[3];
      }
    } else {
      *reinterpret_cast<float2*>(&partial[warp][g][2 * t]) = {sums[0], sums[1]};
      *reinterpret_cast<float2*>(&partial[warp][g + 8][2 * t]) = {sums[2], sums[3]};
    }
    turns.after_sums();
    if (turns.is_adding()) {
#pragma unroll 1
      for (int number = turns.first(); number < numbers(); number += turns.step()) {
        const Number mine(p, number);
        const int row = mine.place(p, tile);
        if (row >= y_rows()) continue;
        float* y = p.y.row(mine.m) + row;
        const auto total = [&](int r) {
          float sum = 0.0f;
#pragma unroll
          for (int part = 0; part < kWarps; ++part) {
            if (part < along_k) sum += partial[mine.tile * along_k + part][r][mine.m];
          }
          return sum;
        };
        if (p.is_gate_up) {
          float gate = total(mine.r);
          float up = total(mine.r + 8);
          if (p.bias != nullptr) {
            const int of_gate = row / kGateGroup * (2 * kGateGroup) + row % kGateGroup;
            gate += p.bias[of_gate];
            up += p.bias[of_gate + kGateGroup];
          }
          *y = silu(gate) * up;
        } else {
          float sum = total(mine.r);
          if (p.bias != nullptr) sum += p.bias[row];
          if (p.accumulate) sum += number == turns.first() ? before : *y;
          *y = sum;
        }
      }
    }
    turns.next();
  }
}

}  // namespace llama_ext::cuda::rows_mma
