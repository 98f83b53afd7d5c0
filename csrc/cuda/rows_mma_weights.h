// W as matmul_rows_mma.cu multiplies it: which rows and steps a warp takes, its weights and factors on their way into registers, and the
// products of a step with x from shared memory.
#pragma once

#include "cuda/mma.h"
#include "cuda/rows_mma.h"

namespace llama_ext::cuda::rows_mma {

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

/// A step of two rows of W, g and g + 8 of a warp's 16.
struct Step {
  const uint4& first;
  const uint4& second;
  float scales[2];
  float mins[2];

  __device__ __forceinline__ static uint32_t word(const uint4& of, int i) {
    return i == 0 ? of.x : i == 1 ? of.y : i == 2 ? of.z : of.w;
  }
  /// Product m, of words 2 m and 2 m + 1.
  __device__ __forceinline__ void operand(int m, uint32_t a[4], uint32_t mask = 0xffffffffu) const {
    a[0] = word(first, 2 * m) & mask;
    a[1] = word(second, 2 * m) & mask;
    a[2] = word(first, 2 * m + 1) & mask;
    a[3] = word(second, 2 * m + 1) & mask;
  }
};

/// Weights of a warp, which come into registers a share ahead.
template <Kind kKind>
class Weights {
 public:
  __device__ __forceinline__ explicit Weights(const RowsMmaView& v) : v_(v), chunks_(Walk<kKind>(v).chunks) {}
  /// The warp's next tile.
  __device__ __forceinline__ void enter(const TileRows& rows, int tile) {
    const int lane = static_cast<int>(threadIdx.x % kWarp);
    const int my_share = static_cast<int>(threadIdx.x / kWarp) & (v_.along_k - 1);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      from_[half] = v_.product.weight.data + int64_t{rows.row(tile, half, lane / 4)} * chunks_ * 16 +
                    my_share * kTogether * kStepBytes + lane % 4 * 16;
    }
  }
  /// Step i of the next share begins to come, in place of this one's. In order, also of steps that are not there.
  __device__ __forceinline__ void load(bool is_there, int i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (is_there) words_[i][half] = __ldcs(reinterpret_cast<const uint4*>(from_[half] + i * kStepBytes));
      if (i + 1 == kTogether) from_[half] += v_.along_k * kTogether * kStepBytes;
    }
  }
  __device__ __forceinline__ const uint4& words(int i, int half) const { return words_[i][half]; }

 private:
  const RowsMmaView& v_;
  int chunks_;
  const unsigned char* from_[2];
  uint4 words_[kTogether][2] = {};
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

/// sums += a step's rows of W, of bfloat16, times x. A lane's sums are of rows g and g + 8, rows 2 t and 2 t + 1 of x. column: the
/// lane's 8 numbers of x.
__device__ __forceinline__ void multiply_numbers(float (&sums)[4], const Step& w, const unsigned char* column) {
  const uint4 x = *reinterpret_cast<const uint4*>(column);
  const uint32_t b[2][2] = {{x.x, x.y}, {x.z, x.w}};
#pragma unroll
  for (int m = 0; m < 2; ++m) {
    uint32_t a[4];
    w.operand(m, a);
    mma<MmaType::kBF16>(sums, a, b[m]);
  }
}

/// The same of codes. A lane's sums are of rows g and g + 8 and row t of x: the columns of a product are the two digits of four rows.
template <Kind kKind, bool kHasMin>
__device__ __forceinline__ void multiply_codes(float& first_sum, float& second_sum, const Step& w,
                                               const unsigned char* column, const StepFactor* factor_at,
                                               const float* total_at) {
  constexpr int kHalves = kKind == Kind::kQ4 ? 2 : 1;
  int dots[kHalves][4] = {};  // of lower nibbles and upper ones, or of bytes
#pragma unroll
  for (int half = 0; half < kHalves; ++half) {
    const uint4 x = *reinterpret_cast<const uint4*>(column + half * 64);
    const uint32_t b[2][2] = {{x.x, x.y}, {x.z, x.w}};
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      uint32_t a[4];
      w.operand(m, a, kKind != Kind::kQ4 ? 0xffffffffu : half == 0 ? 0x0f0f0f0fu : 0xf0f0f0f0u);
      mma_codes(dots[half], a, b[m]);
    }
  }
  const StepFactor factor = *factor_at;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    // Sums of 128 codes times numbers of 16 bits, times 16: below 2^31. Without a sign, as what is no number may be anything.
    const auto digit = [&](int half, int d) { return static_cast<uint32_t>(dots[half][2 * r + d]); };
    uint32_t dot = digit(kHalves - 1, 0) * 256 + digit(kHalves - 1, 1) + factor.excess;
    if constexpr (kKind == Kind::kQ4) dot += digit(0, 0) * 4096 + digit(0, 1) * 16;
    float& sum = r == 0 ? first_sum : second_sum;
    sum = fmaf(w.scales[r] * factor.scale, static_cast<float>(static_cast<int>(dot)), sum);
    if constexpr (kHasMin) sum = fmaf(w.mins[r], *total_at, sum);
  }
}

}  // namespace llama_ext::cuda::rows_mma
