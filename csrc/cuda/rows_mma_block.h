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

  __device__ __forceinline__ explicit Walk(const RowsMmaView& v)
      : chunks(v.product.weight.stride / kChunkElements<kKind>),
        steps(chunks / 4),
        rounds((steps + v.along_k * kTogether - 1) / kTogether >> v.k_shift),
        side_by_side(kWarps >> v.k_shift) {}
};

/// Which rows of W tiles have.
struct TileRows {
  bool is_gate_up;
  int count;  // of hidden numbers or of rows

  __host__ __device__ explicit TileRows(const ProductView& p)
      : is_gate_up(p.is_gate_up), count(p.is_gate_up ? p.width : p.weight.rows) {}
  /// Row `of_half` of a tile's first half. Beyond the last row it is the last one again, whose sums are not written.
  __device__ __forceinline__ int row(int tile, int of_half) const {
    if (!is_gate_up) return min(tile * kTileRows + of_half, count - 1);
    const int f = min(tile * 8 + of_half, count - 1);
    return f / kGateGroup * (2 * kGateGroup) + f % kGateGroup;
  }
  /// The same of the second half.
  __device__ __forceinline__ int second_row(int row) const {
    return is_gate_up ? row + kGateGroup : min(row + 8, count - 1);
  }
  __device__ __forceinline__ int row(int tile, int half, int of_half) const {
    return half == 0 ? row(tile, of_half) : second_row(row(tile, of_half));
  }
};

/// Factors of a warp's share, and of the next one, which are on their way. A lane has those of its two rows, of four groups: a share has no more.
template <Kind kKind, bool kHasMin>
class Factors {
 public:
  __device__ __forceinline__ Factors(const RowsMmaView& v, const TileRows& rows) : v_(v), rows_(rows) {}

  /// of_half: the lane's row of a half.
  __device__ __forceinline__ void enter(int tile, int of_half) {
    if constexpr (is_quantized(kKind)) row_ = rows_.row(tile, of_half);
  }
  /// Of the share that begins with `step`: they begin to come. Asked for also where there is none, of some other share: a register that is
  /// loaded or not is copied at once, and so waited for.
  __device__ __forceinline__ void load(int step) {
    if constexpr (is_quantized(kKind)) {
      const WeightView& w = v_.product.weight;
      const int group = (step >> v_.group_shift) / kGroups * kGroups;
      const auto each = [&](auto load_groups) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int at = (half == 0 ? row_ : rows_.second_row(row_)) * v_.groups;
          next_[half][0] = load_groups(reinterpret_cast<const uint16_t*>(w.data + w.scales_at) + at);
          if constexpr (kHasMin) {
            next_[half][1] = load_groups(reinterpret_cast<const uint16_t*>(w.data + w.mins_at) + at);
          }
        }
      };
      const int last = v_.groups - 1;
      if (v_.groups % 2 == 0) {
        each([&](const uint16_t* row) {
          const auto pair = [&](int first) { return *reinterpret_cast<const uint32_t*>(row + first); };
          return uint2{pair(group), pair(min(group + 2, last - 1))};
        });
      } else {
        // Made of two loads each, and so waited for here.
        each([&](const uint16_t* row) {
          const auto pair = [&](int first) {
            return row[min(first, last)] | static_cast<uint32_t>(row[min(first + 1, last)]) << 16;
          };
          return uint2{pair(group), pair(group + 2)};
        });
      }
    }
  }
  /// Those of that share are needed now, and others may come.
  __device__ __forceinline__ void take(int step) {
    if constexpr (is_quantized(kKind)) {
      const int shift = v_.group_shift;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int which = 0; which < kWhich; ++which) {
          const uint2 of = next_[half][which];
          uint32_t (&pairs)[2] = pairs_[half][which];
          pairs[0] = shift == 0 ? of.x : twice(of, step >> shift);
          pairs[1] = shift == 0 ? of.y : twice(of, (step + 2) >> shift);
        }
      }
    }
  }
  __device__ __forceinline__ void give(int i, Step& step) const {
    if constexpr (is_quantized(kKind)) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        step.scales[half] = from_f16(static_cast<uint16_t>(pairs_[half][0][i / 2] >> (i % 2 * 16)));
        if constexpr (kHasMin) {
          step.mins[half] = from_f16(static_cast<uint16_t>(pairs_[half][1][i / 2] >> (i % 2 * 16)));
        }
      }
    }
  }

 private:
  static constexpr int kGroups = 4;
  static constexpr int kWhich = kHasMin ? 2 : 1;
  static_assert(kTogether == kGroups);

  /// Group `group` of those that were loaded, for two steps.
  __device__ __forceinline__ static uint32_t twice(const uint2& of, int group) {
    return ((group & 2 ? of.y : of.x) >> (group & 1) * 16 & 0xffffu) * 0x10001u;
  }

  const RowsMmaView& v_;
  const TileRows& rows_;
  int row_;  // of the first half
  uint2 next_[2][kWhich] = {};
  uint32_t pairs_[2][kWhich][2];  // of steps 0 and 1, 2 and 3 of a share
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
  __device__ __forceinline__ MeetingTurns(const RowsMmaView& v, int thread, Sync sync)
      : sync_(sync), thread_(thread), stride_(static_cast<int>(gridDim.x) * (kWarps >> v.k_shift)) {}
  __device__ __forceinline__ int stride() const { return stride_; }
  __device__ __forceinline__ int buffer() const { return buffer_; }
  __device__ __forceinline__ bool is_adding() const { return true; }
  __device__ __forceinline__ int first() const { return thread_; }
  __device__ __forceinline__ int step() const { return kThreadCount; }
  __device__ __forceinline__ void before_sums() {}
  __device__ __forceinline__ void after_sums() { sync_(); }
  __device__ __forceinline__ void next() {
    __syncwarp();  // not all lanes have numbers to add up
    buffer_ = (buffer_ + 1) % kBuffers;
  }

 private:
  Sync sync_;
  int thread_;
  int stride_;
  int buffer_ = 0;
};

/// y of the block's tiles. weights.enter(tile_rows, tile): the warp's next tile; load(is_there, i): step i of its next share begins to come, in
/// order; take(i): step i of that share is needed now; words(i, half): it. turns: before a warp stores its sums in buffer(), after it, and once
/// they are added up; stride(): tiles from one of the block's turns to its next; is_adding(): numbers first(), first() + step(), ... of this turn
/// are the calling thread's, of whole warps. wait: until x may be read; sync: of the kThreadCount threads. memory: of the block, as Shared
/// describes.
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
  const int along_k = v.along_k;
  const int tiles = v.tiles;
  const int my_side = warp >> v.k_shift;
  const int my_first = (warp & (along_k - 1)) * kTogether;       // step
  const int end = walk.rounds * along_k * kTogether + my_first;  // steps of a tile, in whole rounds
  const int rows = static_cast<int>(p.rows);

  auto& shared = *reinterpret_cast<Shared*>(memory);
  auto* step_factors = reinterpret_cast<StepFactor*>(&shared + 1);
  auto* totals = reinterpret_cast<float*>(step_factors + (kIsCodes ? steps * kColumns : 0));
  auto* x = reinterpret_cast<unsigned char*>(totals + (kHasMin ? steps * kColumns : 0));
  const BroughtRows brought{shared, step_factors,         totals,
                            x,      steps * kStep<kKind>, column_pitch<kKind>(steps * kStep<kKind>)};

  const TileRows tile_rows(p);  // in registers: a link's view lies in shared memory
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
  wait();
  bring_rows<kKind>(v, thread, brought, gains, sync);

  // Lanes of columns that there are not have some column: what they sum nobody reads.
  const int columns = kIsCodes ? kDigits * rows : rows;
  const auto column_of = [&](int n) { return (n < columns ? n : columns - 1) * brought.pitch; };
  const unsigned char* column = x + column_of(g) + t * static_cast<int>(sizeof(uint4));
  // Of rows of x beyond those of one product.
  const auto has_more = [&] { return kIsCodes && static_cast<int>(p.rows) > kRowsOfProduct; };
  // Not kept in registers over the loop.
  const auto numbers = [&] { return Number::count(p, kWarps >> v.k_shift); };
  const auto y_rows = [&] { return p.is_gate_up ? p.width : w.rows; };
  for (; tile < tiles; tile += turns.stride()) {
    // What a number is added to: into shared memory, as a register would be waited for together with the next tile's weights.
    const auto bring_before = [&](int number) {
      if (!p.accumulate || number >= numbers()) return;
      const Number mine(p, number);
      if (mine.place(p, tile) < y_rows()) copy_async(&shared.before[thread], p.y.row(mine.m) + mine.place(p, tile));
      commit_copies();
    };
    if (turns.is_adding()) bring_before(turns.first());
    float sums[4] = {};
#pragma unroll 1
    for (int step = my_first; step < end; step += along_k * kTogether) {
      const bool is_last = step + along_k * kTogether >= end;
      const bool is_tile = !is_last || tile + my_side + turns.stride() < tiles;
      const int next_step = is_last ? my_first : step + along_k * kTogether;
      if (is_last && is_tile) enter(tile + my_side + turns.stride());
      factors.take(step);
      factors.load(next_step < steps ? next_step : 0);
      const auto multiply_step = [&](int i, bool with_more) {
        Step of{weights.words(i, 0), weights.words(i, 1), {}, {}};
        factors.give(i, of);
        const unsigned char* at = column + (step + i) * kStepPitch<kKind>;
        if constexpr (kIsCodes) {
          const int place = (step + i) * kColumns + t;
          multiply_codes<kKind, kHasMin>(sums[0], sums[1], of, at, step_factors + place, totals + place);
          if (with_more) {
            const int to_more = column_of(g + kColumns) - column_of(g);
            multiply_codes<kKind, kHasMin>(sums[2], sums[3], of, at + to_more, step_factors + place + kRowsOfProduct,
                                           totals + place + kRowsOfProduct);
          }
        } else {
          multiply_numbers(sums, of, at);
        }
      };
      if (!has_more() && step + kTogether <= steps) {
        // Without a branch between the steps, so that each runs while others wait for what they have loaded or multiplied.
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
          weights.take(i);
          multiply_step(i, false);
          weights.load(is_tile && next_step + i < steps, i);
        }
      } else {
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
          weights.take(i);
          if (step + i < steps) multiply_step(i, has_more());
          weights.load(is_tile && next_step + i < steps, i);
        }
      }
    }
    auto& partial = shared.partial[turns.buffer()];
    turns.before_sums();
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
    turns.after_sums();
    if (turns.is_adding()) {
#pragma unroll 1
      for (int number = turns.first(); number < numbers(); number += turns.step()) {
        float before = 0.0f;
        if (p.accumulate) {
          wait_for_copies<0>();
          before = shared.before[thread];
          bring_before(number + turns.step());
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
    }
    turns.next();
  }
}

}  // namespace llama_ext::cuda::rows_mma
