// Products of one row of x and codes, for matmul_one_row.cu and chain.cu: what a block does.
#pragma once

#include "cuda/rows_mma.h"

namespace llama_ext::cuda::rows_mma {

inline constexpr int kOneRowThreads = 256;
inline constexpr int kOneRowWarps = kOneRowThreads / static_cast<int>(kWarp);
inline constexpr int kShareBytes = kTogether * kStepBytes;  // of a row
inline constexpr int kXTurn = 4 * kOneRowThreads;
// Fours of x that a thread asks for before it needs the first: all of most rows, or of short ones.
inline constexpr int kFew = 4;
inline constexpr int kMany = 14;
inline constexpr int kMostPartialBytes = 40 * 1024;  // where a pass is not the least

/// A place has the first 128 bytes of each of 16 rows, then the second, in sixteens that lie where Hopper's copy engine would put them
/// (CU_TENSOR_MAP_SWIZZLE_128B): of lanes that read at once, rows do not meet in a bank.
inline constexpr int kCodesOfPlace = kTileRows * kShareBytes;
__device__ __forceinline__ int code_at(int row, int sixteen) {
  return sixteen / 8 * (kCodesOfPlace / 2) + row * 128 + ((sixteen ^ row) & 7) * 16;
}

/// Bytes from a step's upper digits to its lower ones, and from there to the next step's: lanes do not meet in a bank.
template <Kind kKind>
inline constexpr int kDigitPitch = kStep<kKind> + 16;

struct OneRowView {
  RowsMmaView rows;
  int parts;  // of W's rows, `part_rows` each, that blocks share out
  int part_rows;
  int pass_rows;
  int row_bytes;
  int steps;      // of a row
  int shares;     // of a row
  int pitch;      // sums of a row of W
  int totals_at;  // bytes into shared memory, which StepFactor begin
  int x_at;
  int places_at;
  int partial_at;
};

/// Where x goes.
struct BroughtRow {
  StepFactor* factors;
  float* totals;
  unsigned char* digits;
};

/// Four numbers of x, at k, in digits. All lanes of a step call it together.
template <Kind kKind>
__device__ __forceinline__ void store_digits_of_row(const WeightView& w, const BroughtRow& to, int k,
                                                    const float4& four) {
  const StepNumbers numbers = whole_numbers<kKind>(four);
  if (k >= w.stride) return;
  uint32_t up[4];  // so that their second bytes are the upper digits
#pragma unroll
  for (int e = 0; e < 4; ++e) up[e] = numbers.numbers[e] + 128u;
  const int step = k / kStep<kKind>;
  unsigned char* digits = to.digits + kDigits * step * kDigitPitch<kKind> + place_of_digit<kKind>(k % kStep<kKind>);
  *reinterpret_cast<uint32_t*>(digits) = bytes_of<1>(up);
  *reinterpret_cast<uint32_t*>(digits + kDigitPitch<kKind>) = bytes_of<0>(numbers.numbers);
  if (k % kStep<kKind> != 0) return;
  to.factors[step] = numbers.factor(kUnit<kKind>, w.zero);
  if (w.has_min) to.totals[step] = numbers.total();
}

/// The row of x in digits, zeros beyond its last column, normalised where there is a norm. gains: the thread's first ones.
template <Kind kKind, bool kIsWhole, int kHeld>
__device__ __forceinline__ void bring_row(const OneRowView& v, const BroughtRow& to, float* squares,
                                          const float4 (&gains)[kFew]) {
  const ProductView& p = v.rows.product;
  const WeightView& w = p.weight;
  const float* row = p.x.row(0);
  const int thread = static_cast<int>(threadIdx.x);
  const bool has_norm = p.norm.weight != nullptr;
  const auto load = [&](const float* from, int k) {
    return load_four(from, k < w.stride ? k : 0, w.cols, kIsWhole || v.rows.is_whole);
  };
  float inverse = 1.0f;
#pragma unroll 1
  for (int first = 0; first < w.stride; first += kHeld * kXTurn) {
    float4 fours[kHeld];
#pragma unroll
    for (int i = 0; i < kHeld; ++i) fours[i] = load(row, first + 4 * thread + i * kXTurn);
    if (has_norm && first == 0) inverse = block_inverse_rms(fours, row, w.cols, p.norm.eps, squares);
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (first + i * kXTurn >= w.stride) break;  // for all threads
      const int k = first + 4 * thread + i * kXTurn;
      if (has_norm) {
        const float4 gain = kHeld == kFew && first == 0 ? gains[i % kFew] : load(p.norm.weight, k);
        fours[i] = normalized(fours[i], inverse, gain);
      }
      store_digits_of_row<kKind>(w, to, k, fours[i]);
    }
  }
  __syncthreads();
}

/// A warp's units of a pass: neighbours in the order of shares, and of tiles of 16 rows within a share, so that few shares of x are met.
struct UnitWalk {
  int tiles;
  int share;
  int tile;
  int left;

  __device__ __forceinline__ UnitWalk(const OneRowView& v, int rows, int warp) : tiles(rows / kTileRows) {
    const int units = tiles * v.shares;
    const int first = units * warp / kOneRowWarps;
    left = units * (warp + 1) / kOneRowWarps - first;
    share = first / tiles;
    tile = first - share * tiles;
  }
  __device__ __forceinline__ void next() {
    --left;
    if (++tile < tiles) return;
    tile = 0;
    ++share;
  }
};

/// Which 16 bytes of its step a lane meets in turn: of lanes that read at once, steps do not meet in a bank either.
__device__ __forceinline__ int chunk_of_turn(int turn, int lane) { return turn ^ (lane & 2); }

/// Rows that a block has, the most.
__host__ __device__ constexpr int rows_of_block(const OneRowView& v, int blocks) {
  return (v.parts + blocks - 1) / blocks * v.part_rows;
}

/// The first of W's rows that are a block's.
__device__ __forceinline__ int first_row_of(const OneRowView& v, unsigned block) {
  return static_cast<int>(static_cast<unsigned>(v.parts) * block / gridDim.x) * v.part_rows;
}

/// Of x, what a lane meets in a unit.
template <Kind kKind, bool kHasMin>
struct MetX {
  static constexpr int kVectors = kStep<kKind> / 16;
  uint4 digits[kVectors];
  StepFactor factor{};
  float total = 0.0f;
  int step = 0;
  int share = -1;

  __device__ __forceinline__ void load(const unsigned char* memory, int totals_at, int x_at, int of, int lane) {
    if (of == share) return;
    share = of;
    const int t = lane % 4;
    step = share * kTogether + t;
    factor = reinterpret_cast<const StepFactor*>(memory)[step];
    if constexpr (kHasMin) total = reinterpret_cast<const float*>(memory + totals_at)[step];
    // The lane's column, lane / 4, has a digit of a step, and the lane's share of k is that of step t.
    const bool is_met = lane / 8 == t;
    const unsigned char* from = memory + x_at + (kDigits * step + lane / 4 % 2) * kDigitPitch<kKind>;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      digits[i] = is_met ? *reinterpret_cast<const uint4*>(from + 16 * chunk_of_turn(i, lane)) : uint4{0, 0, 0, 0};
    }
  }
};

/// Of codes, for rows g and g + 8 of a unit and a lane's step.
struct UnitFactors {
  float scales[2];
  float mins[2];
};

/// Sums of a unit's share, of rows g and g + 8 of those at `place`: lane t = 3 has them.
template <Kind kKind, bool kHasMin>
__device__ __forceinline__ void sum_share(int steps, const MetX<kKind, kHasMin>& x, const UnitFactors& factors,
                                          const unsigned char* place, int lane, float (&sums)[2]) {
  constexpr int kHalves = kKind == Kind::kQ4 ? 2 : 1;
  const int g = lane / 4;
  const int t = lane % 4;
  int dots[kHalves][2][4] =
      {};  // of lower nibbles and upper ones, or of bytes; two of each, which do not wait for each other
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const unsigned char* at = place + code_at(g, 4 * t + chunk_of_turn(j, lane));
    const uint4 first = *reinterpret_cast<const uint4*>(at);
    const uint4 second = *reinterpret_cast<const uint4*>(at + 8 * 128);
    const uint32_t codes[2][4] = {{first.x, second.x, first.y, second.y}, {first.z, second.z, first.w, second.w}};
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      const uint4& digits = x.digits[half * 4 + j];
      const uint32_t numbers[2][2] = {{digits.x, digits.y}, {digits.z, digits.w}};
      const uint32_t mask = kKind != Kind::kQ4 ? 0xffffffffu : half == 0 ? 0x0f0f0f0fu : 0xf0f0f0f0u;
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        const uint32_t a[4] = {codes[m][0] & mask, codes[m][1] & mask, codes[m][2] & mask, codes[m][3] & mask};
        mma_codes(dots[half][m], a, numbers[m]);
      }
    }
  }
  float scales[2];
  float of_step[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const auto digit = [&](int half, int d) {
      return static_cast<uint32_t>(dots[half][0][2 * r + d]) + static_cast<uint32_t>(dots[half][1][2 * r + d]);
    };
    uint32_t dot = digit(kHalves - 1, 0) * 256 + digit(kHalves - 1, 1) + x.factor.excess;
    if constexpr (kKind == Kind::kQ4) dot += digit(0, 0) * 4096 + digit(0, 1) * 16;
    of_step[r] = static_cast<float>(static_cast<int>(dot));
    scales[r] = factors.scales[r] * x.factor.scale;
    sums[r] = 0.0f;
  }
  // One step after the other, as one warp does in matmul_rows_mma.cu.
#pragma unroll
  for (int i = 0; i < kTogether; ++i) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float mine = fmaf(scales[r], of_step[r], sums[r]);
      if constexpr (kHasMin) mine = fmaf(factors.mins[r], x.total, mine);
      if (x.step >= steps) mine = sums[r];
      sums[r] = i + 1 < kTogether ? __shfl_sync(kAllLanes, mine, (lane & 28) + i) : mine;
    }
  }
}

/// Of a row of W, in the order of matmul_rows_mma.cu: a warp's shares there, then warps. Four at a time, as each sum would wait for its load.
__device__ __forceinline__ float sum_of_row(const OneRowView& v, const float* sums) {
  float all = 0.0f;
#pragma unroll 1
  for (int first = 0; first < v.rows.along_k; first += kLeastAlongK) {
    float of_warps[kLeastAlongK] = {};
    for (int share = first; share < v.shares; share += v.rows.along_k) {
#pragma unroll
      for (int i = 0; i < kLeastAlongK; ++i) {
        if (share + i < v.shares) of_warps[i] += sums[share + i];
      }
    }
#pragma unroll
    for (int i = 0; i < kLeastAlongK; ++i) all += of_warps[i];
  }
  return all;
}

/// Number i of y of a pass that begins with row `begin` of W. before: what it is added to.
__device__ __forceinline__ float y_of_pass(const OneRowView& v, const float* partial, int begin, int i, float before) {
  const ProductView& p = v.rows.product;
  const int row = p.is_gate_up ? i / kGateGroup * (2 * kGateGroup) + i % kGateGroup : i;
  float sum = sum_of_row(v, partial + row * v.pitch);
  if (p.bias != nullptr) sum += p.bias[begin + row];
  if (!p.is_gate_up) return p.accumulate ? sum + before : sum;
  float up = sum_of_row(v, partial + (row + kGateGroup) * v.pitch);
  if (p.bias != nullptr) up += p.bias[begin + row + kGateGroup];
  return silu(sum) * up;
}

/// y of a block's rows of W; x is in shared memory. units: wait(), the place of the warp's next unit once it is there; factors<kHasMin>(place,
/// row, group): of the block's row and the lane's step; give_back(), once all of it has been read.
template <Kind kKind, bool kHasMin, typename Units>
__device__ __forceinline__ void multiply_row(const OneRowView& v, unsigned char* memory, Units& units) {
  const ProductView& p = v.rows.product;
  auto* partial = reinterpret_cast<float*>(memory + v.partial_at);
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % static_cast<int>(kWarp);
  const int warp = thread / static_cast<int>(kWarp);
  const int begin = first_row_of(v, blockIdx.x);
  const int end = first_row_of(v, blockIdx.x + 1);
  // Where the view is in shared memory, it would be read again after each sum that is stored there.
  const int steps = v.steps;
  const int group_shift = v.rows.group_shift;
  const int pitch = v.pitch;
  const int x_at = v.x_at;
  const int totals_at = v.totals_at;
  MetX<kKind, kHasMin> x;
#pragma unroll 1
  for (int pass = begin; pass < end; pass += v.pass_rows) {
    const int pass_rows = min(v.pass_rows, end - pass);
    // The numbers of y that are the pass's. Surplus gates are not written.
    const int first = p.is_gate_up ? pass / 2 : pass;
    const int count = p.is_gate_up ? min(pass_rows / 2, p.width - first) : pass_rows;
    float before = 0.0f;
    if (p.accumulate && thread < count) before = p.y.row(0)[first + thread];
    UnitWalk walk(v, pass_rows, warp);
#pragma unroll 1
    for (; walk.left > 0; walk.next()) {
      x.load(memory, totals_at, x_at, walk.share, lane);
      const unsigned char* from = units.wait();
      float sums[2];
      const UnitFactors factors =
          units.factors(from, pass - begin + walk.tile * kTileRows + lane / 4, min(x.step, steps - 1) >> group_shift);
      sum_share(steps, x, factors, from, lane, sums);
      if (lane % 4 == 3) {
        float* sum = partial + (walk.tile * kTileRows + lane / 4) * pitch + walk.share;
        sum[0] = sums[0];
        sum[8 * pitch] = sums[1];
      }
      units.give_back();
    }
    __syncthreads();
    for (int i = thread; i < count; i += kOneRowThreads) {
      float* y = p.y.row(0) + first + i;
      *y = y_of_pass(v, partial, pass, i, i == thread || !p.accumulate ? before : *y);
    }
    __syncthreads();  // the next pass has the same memory
  }
}

/// The thread's first gains of the norm, which do not wait for x.
template <bool kIsWhole>
__device__ __forceinline__ void load_gains(const OneRowView& v, float4 (&gains)[kFew]) {
  const ProductView& p = v.rows.product;
#pragma unroll
  for (int i = 0; i < kFew; ++i) {
    gains[i] = float4{0.0f, 0.0f, 0.0f, 0.0f};
    const int k = 4 * static_cast<int>(threadIdx.x) + i * kXTurn;
    if (p.norm.weight != nullptr) {
      gains[i] = load_four(p.norm.weight, k < p.weight.stride ? k : 0, p.weight.cols, kIsWhole || v.rows.is_whole);
    }
  }
}

/// x in shared memory, for multiply_row(). kIsWhole: v.rows.is_whole, as is known.
template <Kind kKind, bool kIsWhole>
__device__ __forceinline__ void bring_row(const OneRowView& v, unsigned char* memory, const float4 (&gains)[kFew]) {
  // With sums in memory that is not in use yet.
  const BroughtRow to{reinterpret_cast<StepFactor*>(memory), reinterpret_cast<float*>(memory + v.totals_at),
                      memory + v.x_at};
  auto* squares = reinterpret_cast<float*>(memory + v.partial_at);
  v.rows.product.weight.stride <= kFew* kXTurn ? bring_row<kKind, kIsWhole, kFew>(v, to, squares, gains)
                                               : bring_row<kKind, kIsWhole, kMany>(v, to, squares, gains);
}

/// Of a product that takes_one_row() takes; places: bytes of them, between x and the sums of shares, if they are there.
OneRowView view_of_row(const Gpu& gpu, const ProductView& product, size_t places_bytes);
/// Shared memory that a block needs for it, with its places.
size_t one_row_shared_bytes(const OneRowView& view);
void start_one_row(const Gpu& gpu, const ProductView& product);

}  // namespace llama_ext::cuda::rows_mma
