// What matmul_rows_mma.cu multiplies: sizes, and rows of x in shared memory, normalised, as the tensor cores take them.
#pragma once

#include "cuda/kernels.h"
#include "cuda/mma.h"
#include "cuda/numeric.h"
#include "cuda/row_norm.h"
#include "cuda/weight_codes.h"

namespace llama_ext::cuda::rows_mma {

struct RowsMmaView {
  ProductView product;
  int tiles;
  int along_k;      // warps that share a tile's k: a block has kWarps / along_k tiles at a time
  int k_shift;      // along_k as a power of two
  int groups;       // of a row, with codes
  int group_shift;  // steps of a group, as a power of two
  bool is_whole;    // rows of x are as long as W's padded ones, and they and the norm's weight lie at 16 bytes
};
/// Of a product of at most rows_of_mma() rows.
RowsMmaView view_of(const ProductView& product);

inline constexpr int kWarps = 16;
inline constexpr int kThreadCount = kWarps * static_cast<int>(kWarp);
inline constexpr int kTogether = 4;  // steps, one after the other in a row of W, that a warp takes at a time
inline constexpr int kStepBytes = 64;
inline constexpr int kTileRows = 16;
inline constexpr int kLeastAlongK = 4;  // warps that share a tile's k, the fewest
inline constexpr int kBuffers = 2;      // of warps' sums, in turns
inline constexpr int kColumns = 8;      // of a product: rows of x, with codes digits of them
inline constexpr int kGateGroup = 16;   // ops/feed_forward.h

template <Kind kKind>
inline constexpr int kStep = 4 * kChunkElements<kKind>;  // elements of a row that a warp multiplies at a time

// With codes x is whole numbers of 16 bits, in two digits of 8 with a sign: 256 upper + lower. The numbers of a step share a power of two,
// as large as leaves them in kLargestNumber. Of nibbles, lower ones are multiplied as such and upper ones where they are, 16 times as large.
inline constexpr int kDigits = 2;
inline constexpr float kLargestNumber = 32639.0f;  // 256 127 + 127
template <Kind kKind>
inline constexpr int kUnit = kKind == Kind::kQ4 ? 16 : 1;  // of a step's sums

/// Where the digit of element k of a row of x lies: a lane loads 16 neighbours at once, and the four lanes of a row neighbours, which do not
/// meet in a bank.
template <Kind kKind>
__host__ __device__ constexpr int place_of_digit(int k) {
  if (kKind != Kind::kQ4) return k;
  const int e = k % kChunk;
  return k / kStep<kKind> * kStep<kKind> + e / 16 * 64 + k % kStep<kKind> / kChunk * 16 + e % 16;
}

/// Bytes of a step in a column of x.
template <Kind kKind>
inline constexpr int kStepPitch = kStep<kKind> * (is_quantized(kKind) ? 1 : 2);

/// Bytes between columns of x: rows of lanes must not meet in a bank.
template <Kind kKind>
__host__ __device__ constexpr int column_pitch(int padded) {
  const int bytes = is_quantized(kKind) ? padded : 2 * padded;
  return bytes + (bytes % 128 == 0 ? 64 : 0);
}

/// Of a step and a row of x.
struct alignas(8) StepFactor {
  uint32_t excess;  // what is to be added to a step's sum, as codes are larger than what they stand for by `zero`
  float scale;      // of the sum
};

/// The block's shared memory.
struct Shared {
  float partial[kBuffers][kWarps][kTileRows][kColumns];
  float before[kThreadCount];  // what a thread's next number is added to
  // Then for codes StepFactor (steps, kColumns) and where there are minima as many sums of x; then x: for each row, or for each digit of
  // each row, one column.
};

inline constexpr int kTurn = 4 * kThreadCount;  // elements of a row of x, a vector of 4 for each thread
inline constexpr int kAhead = 4;                // vectors of x that a thread has on their way
inline constexpr int kGains = 2;                // and of the norm's weight, the first ones before x is known

/// Where bring_rows() puts rows of x.
struct BroughtRows {
  Shared& shared;
  StepFactor* factors;
  float* totals;
  unsigned char* x;
  int padded;
  int pitch;
};

// Over so many lanes that are neighbours, 16 or all.
template <int kLanes>
__device__ __forceinline__ uint32_t largest_of_lanes(uint32_t value) {
#pragma unroll
  for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) {
    const uint32_t other = __shfl_xor_sync(kAllLanes, value, lanes);
    value = value > other ? value : other;
  }
  return value;
}
template <int kLanes>
__device__ __forceinline__ uint32_t sum_of_lanes(uint32_t value) {
#pragma unroll
  for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) value += __shfl_xor_sync(kAllLanes, value, lanes);
  return value;
}
#if defined(__CUDA_ARCH__)
template <>
__device__ __forceinline__ uint32_t largest_of_lanes<32>(uint32_t value) {
  return __reduce_max_sync(kAllLanes, value);
}
template <>
__device__ __forceinline__ uint32_t sum_of_lanes<32>(uint32_t value) {
  return __reduce_add_sync(kAllLanes, value);
}
#endif

/// Byte kByte of four words.
template <int kByte>
__device__ __forceinline__ uint32_t bytes_of(const uint32_t (&words)[4]) {
#if defined(__CUDA_ARCH__)
  constexpr uint32_t kPair = kByte | (4 + kByte) << 4;
  return __byte_perm(__byte_perm(words[0], words[1], kPair), __byte_perm(words[2], words[3], kPair), 0x5410);
#else
  uint32_t bytes = 0;
  for (int i = 0; i < 4; ++i) bytes |= (words[i] >> (8 * kByte) & 255u) << (8 * i);
  return bytes;
#endif
}

/// The lower halves of two words, that of `a` below.
__device__ __forceinline__ uint32_t lower_halves(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  return __byte_perm(a, b, 0x5410);
#else
  return (a & 0xffffu) | b << 16;
#endif
}

/// Four elements of x as whole numbers, and what they have of their step: the power of two that they share, and the sum of its numbers.
struct StepNumbers {
  uint32_t numbers[4];  // of 16 bits with a sign, in lower halves
  uint32_t sum;
  float unit;  // what 1 stands for; NaN where something is no number

  /// Of a step's sum, `unit_of_sum` times that of codes times numbers.
  __device__ __forceinline__ StepFactor factor(int unit_of_sum, int zero) const {
    return {0u - static_cast<uint32_t>(unit_of_sum * zero) * sum, unit / static_cast<float>(unit_of_sum)};
  }
  /// What x sums up to.
  __device__ __forceinline__ float total() const { return unit * static_cast<float>(static_cast<int>(sum)); }
};

/// All lanes of a step call it together.
template <Kind kKind>
__device__ __forceinline__ StepNumbers whole_numbers(const float4& four) {
  constexpr int kLanes = kStep<kKind> / 4;
  constexpr uint32_t kBias = 127;
  const float values[4] = {four.x, four.y, four.z, four.w};
  uint32_t bits = 0;  // of magnitudes, which order like these; those of what is no number are the largest
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const uint32_t magnitude = __float_as_uint(values[e]) & 0x7fffffffu;
    bits = bits > magnitude ? bits : magnitude;
  }
  const float largest = __uint_as_float(largest_of_lanes<kLanes>(bits));
  // The power that brings the largest one to 2^14 or beyond, but below 2^15 also when it is larger by what kLargestNumber is less than that.
  const uint32_t exponent = __float_as_uint(largest * (32768.0f / kLargestNumber)) >> 23;
  const uint32_t wanted = 2 * kBias + 14 - exponent;
  const uint32_t biased = wanted < kBias + 100 ? wanted : kBias + 100;
  const float power = __uint_as_float(biased << 23);
  constexpr float kRounds = 12582912.0f;  // 1.5 2^23: what is added to it is a whole number in the sum's lower bits
  StepNumbers step;
  step.sum = 0;
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    step.numbers[e] = __float_as_uint(fmaf(values[e], power, kRounds));
    step.sum += step.numbers[e] - 0x4b400000u;
  }
  step.sum = sum_of_lanes<kLanes>(step.sum);
  step.unit = __uint_as_float((2 * kBias - biased) << 23) + (largest - largest);
  return step;
}

/// Four elements of x at k = 0, 4, ... of row m, for codes. All lanes of a step call it together.
template <Kind kKind>
__device__ __forceinline__ void store_digits(const WeightView& w, const BroughtRows& to, int m, int k,
                                             const float4& four) {
  const StepNumbers step = whole_numbers<kKind>(four);
  if (k >= to.padded) return;
  uint32_t up[4];  // so that their second bytes are the upper digits
#pragma unroll
  for (int e = 0; e < 4; ++e) up[e] = step.numbers[e] + 128u;
  unsigned char* column = to.x + kDigits * m * to.pitch + place_of_digit<kKind>(k);
  *reinterpret_cast<uint32_t*>(column) = bytes_of<1>(up);
  *reinterpret_cast<uint32_t*>(column + to.pitch) = bytes_of<0>(step.numbers);
  if (k % kStep<kKind> != 0) return;
  const int at = k / kStep<kKind> * kColumns + m;
  to.factors[at] = step.factor(kUnit<kKind>, w.zero);
  if (w.has_min) to.totals[at] = step.total();
}

/// Rows of x in shared memory, zeros beyond the last column: normalised where there is a norm, then rounded to bfloat16 or cut into digits. gains:
/// the thread's first ones, which were loaded early.
template <Kind kKind>
__device__ __forceinline__ void bring_rows(const RowsMmaView& v, const BroughtRows& to, const float4 (&gains)[kGains]) {
  const auto thread = static_cast<int>(threadIdx.x);
  const ProductView& p = v.product;
  const int cols = p.weight.cols;
  const bool has_norm = p.norm.weight != nullptr;
#pragma unroll 1
  for (int m = 0; m < static_cast<int>(p.rows); ++m) {
    const float* row = p.x.row(m);
    // What is beyond is part of no step; each lane loads something.
    const auto load = [&](const float* from, int k, float4& four) {
      if (k - 4 * thread < to.padded) four = load_four(from, k < to.padded ? k : 0, cols, v.is_whole);
    };
    float4 next[kAhead] = {};
    float4 next_gains[kGains] = {gains[0], gains[1]};
#pragma unroll
    for (int i = 0; i < kAhead; ++i) load(row, 4 * thread + i * kTurn, next[i]);
    // In memory that sums of tiles will have; the last row's may still be read.
    static_assert(sizeof(Shared::partial) >= 2 * kMostSquares * sizeof(float));
    float* squares = &to.shared.partial[0][0][0][0] + m % 2 * kMostSquares;
    const float inverse = has_norm ? block_inverse_rms(next, row, cols, p.norm.eps, squares) : 1.0f;
#pragma unroll 1
    for (int k = 4 * thread; k - 4 * thread < to.padded; k += kTurn) {
      float4 four = next[0];
#pragma unroll
      for (int i = 0; i + 1 < kAhead; ++i) next[i] = next[i + 1];
      load(row, k + kAhead * kTurn, next[kAhead - 1]);
      if (has_norm) {
        const float4 gain = next_gains[0];
        next_gains[0] = next_gains[1];
        load(p.norm.weight, k + kGains * kTurn, next_gains[1]);
        four = normalized(four, inverse, gain);
      }
      if constexpr (is_quantized(kKind)) {
        store_digits<kKind>(p.weight, to, m, k, four);
      } else if (k < to.padded) {
        *reinterpret_cast<uint2*>(to.x + m * to.pitch + 2 * k) = {round_pair(four.x, four.y),
                                                                  round_pair(four.z, four.w)};
      }
    }
  }
  __syncthreads();
}

}  // namespace llama_ext::cuda::rows_mma
