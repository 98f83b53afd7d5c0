// Rows of x as matmul_rows_mma.cu multiplies them: in shared memory, normalised, rounded, in the product's order.
#pragma once

#include "cuda/link_views.h"
#include "cuda/numeric.h"
#include "cuda/weight_codes.h"

namespace llama_ext::cuda::rows_mma {

inline constexpr int kWarps = 16;
inline constexpr int kThreadCount = kWarps * static_cast<int>(kWarp);
inline constexpr int kInFlight = 4;  // steps
inline constexpr int kTileRows = 16;
inline constexpr int kColumns = 8;
inline constexpr int kGateGroup = 16;  // ops/feed_forward.h

template <Kind kKind>
inline constexpr int kStep = 4 * kChunkElements<kKind>;  // elements of a row that a warp multiplies at a time

/// Where the product wants element e of a chunk, so that a word of codes gives pairs without being sorted.
template <Kind kKind>
__host__ __device__ constexpr int place_in_chunk(int e) {
  if (kKind != Kind::kQ4) return e;
  const int word = e % 16 / 4;
  const int is_high = e / 16;  // nibbles
  return ((2 * word + is_high) * 2 + e % 2) * 2 + e % 4 / 2;
}

inline constexpr int kAtOnce = 8;  // elements that a lane loads at once

/// Where element k of a row of x lies: a step is its four chunks' first vectors, then their second ones, and so on, so that what the
/// four lanes of a row load at once are neighbours, which do not meet in a bank.
template <Kind kKind>
__host__ __device__ constexpr int place_in_column(int k) {
  constexpr int kElements = kChunkElements<kKind>;
  const int place = place_in_chunk<kKind>(k % kElements);
  return k / kStep<kKind> * kStep<kKind> + (place / kAtOnce * 4 + k % kStep<kKind> / kElements) * kAtOnce +
         place % kAtOnce;
}

/// Elements between columns of x: rows of lanes must not meet in a bank.
__host__ __device__ constexpr int column_pitch(int padded) { return padded + (padded % 64 == 0 ? 32 : 0); }

// As float16, 0x6400 | n is 1024 + n: codes become numbers by putting bytes or nibbles there, and what is too much is a sum of x
// that is taken off again, group by group. The upper nibble of a byte counts 16 times, so x is divided by 16 there.
inline constexpr uint32_t kBase = 0x64006400;
inline constexpr float kBaseValue = 1024.0f;

__device__ __forceinline__ float4 load_four(const float* row, int k, int cols, bool is_aligned) {
  if (is_aligned && k + 4 <= cols) return *reinterpret_cast<const float4*>(row + k);
  float4 four{0.0f, 0.0f, 0.0f, 0.0f};
  if (k < cols) four.x = row[k];
  if (k + 1 < cols) four.y = row[k + 1];
  if (k + 2 < cols) four.z = row[k + 2];
  if (k + 3 < cols) four.w = row[k + 3];
  return four;
}

/// Four elements of x at k = 0, 4, ... of a row, to where the product wants them.
template <Kind kKind>
__device__ __forceinline__ void store_four(uint16_t* column, int k, const uint16_t four[4]) {
  // The places of e, e + 2, e + 1, e + 3 of a chunk of nibbles are neighbours.
  constexpr int kSecond = kKind == Kind::kQ4 ? 2 : 1;
  *reinterpret_cast<uint2*>(column + place_in_column<kKind>(k)) = {
      static_cast<uint32_t>(four[0]) | static_cast<uint32_t>(four[kSecond]) << 16,
      static_cast<uint32_t>(four[3 - kSecond]) | static_cast<uint32_t>(four[3]) << 16};
}

/// The block's shared memory.
struct Shared {
  float partial[2][kWarps][kTileRows][kColumns];
  float2 looks[2][kWarps];  // at a row of x: the sum of squares, the largest
  float row_scales[kColumns];
  // Then for codes (steps, kColumns) times the negative of what a step's sums are too large by, and where there are minima as many sums of x;
  // then x, (kColumns or fewer, pitch).
};

// Of a row of x, what a thread keeps in registers between its two looks at it: vectors of 4.
inline constexpr int kKept = 4;
// Of what does not fit there, on their way together. More spill on sm_80.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
template <Kind kKind>
inline constexpr int kMore = kKind == Kind::kQ4 ? 1 : 2;
#else
template <Kind kKind>
inline constexpr int kMore = 3;
#endif
inline constexpr int kGains = 2;  // and of the norm's weight, before x is known

/// Rows of x in shared memory: normalised, rounded, in the product's order, zeros beyond the last column. gains: the thread's first
/// ones, which were loaded early. thread: of the kThreadCount, for which sync is.
template <Kind kKind, typename Sync>
__device__ __forceinline__ void bring_rows(const RowsMmaView& v, int thread, int padded, int pitch, Shared& shared,
                                           uint16_t* x, float* excess, float* totals, const float4 (&gains)[kGains],
                                           Sync sync) {
  constexpr bool kIsCodes = is_quantized(kKind);
  constexpr int kAfter = kMore<kKind>;
  const ProductView& p = v.product;
  const int cols = p.weight.cols;
  const bool has_norm = p.norm.weight != nullptr;
  const int first = 4 * thread;
  const auto gained = [](const float4& of, const float4& gain) {
    return float4{of.x * gain.x, of.y * gain.y, of.z * gain.z, of.w * gain.w};
  };
  const auto gain_of = [&](int i) {
    if (i < kGains || !has_norm) return gains[i < kGains ? i : 0];
    return load_four(p.norm.weight, first + 4 * i * kThreadCount, cols, v.is_aligned);
  };
#pragma unroll 1
  for (int m = 0; m < static_cast<int>(p.rows); ++m) {
    const float* row = p.x.row(m);
    const auto load_more = [&](int base, float4(&more)[kAfter]) {
#pragma unroll
      for (int i = 0; i < kAfter; ++i) {
        more[i] = load_four(row, base + first + 4 * i * kThreadCount, cols, v.is_aligned);
      }
    };
    float4 kept[kKept];
#pragma unroll
    for (int i = 0; i < kKept; ++i) kept[i] = load_four(row, first + 4 * i * kThreadCount, cols, v.is_aligned);
    float inverse = 1.0f;
    float power = 1.0f;
    if (has_norm || kIsCodes) {
      float sum = 0.0f;
      float largest = 0.0f;
      const auto look = [&](const float4& four, const float4& gain) {
        sum = fmaf(four.x, four.x, sum);
        sum = fmaf(four.y, four.y, sum);
        sum = fmaf(four.z, four.z, sum);
        sum = fmaf(four.w, four.w, sum);
        if constexpr (kIsCodes) {
          const float4 all = has_norm ? gained(four, gain) : four;
          largest = max_or_nan(max_or_nan(largest, fabsf(all.x)), fabsf(all.y));
          largest = max_or_nan(max_or_nan(largest, fabsf(all.z)), fabsf(all.w));
        }
      };
#pragma unroll
      for (int i = 0; i < kKept; ++i) look(kept[i], gain_of(i));
#pragma unroll 1
      for (int base = 4 * kKept * kThreadCount; base < cols; base += 4 * kAfter * kThreadCount) {
        float4 more[kAfter];
        load_more(base, more);
#pragma unroll
        for (int i = 0; i < kAfter; ++i) {
          float4 gain{1.0f, 1.0f, 1.0f, 1.0f};
          if (kIsCodes && has_norm) {
            gain = load_four(p.norm.weight, base + first + 4 * i * kThreadCount, cols, v.is_aligned);
          }
          look(more[i], gain);
        }
      }
      sum = warp_sum(sum);
      if (kIsCodes) largest = warp_max(largest);
      if (thread % static_cast<int>(kWarp) == 0) shared.looks[m % 2][thread / static_cast<int>(kWarp)] = {sum, largest};
      sync();
      sum = 0.0f;
      largest = 0.0f;
#pragma unroll 4  // all at once would take registers from the loads on their way
      for (int i = 0; i < kWarps; ++i) {
        const float2 look_of_warp = shared.looks[m % 2][i];
        sum += look_of_warp.x;
        largest = max_or_nan(largest, look_of_warp.y);
      }
      if (has_norm) inverse = 1.0f / sqrtf(sum / static_cast<float>(cols) + p.norm.eps);
      if constexpr (kIsCodes) {
        power = power_for_f16(largest * inverse);
        if (thread == 0) shared.row_scales[m] = 1.0f / power;
      }
    }
    const auto store = [&](int k, const float4& four, const float4& gain) {
      float values[4] = {four.x, four.y, four.z, four.w};
      const float gain_at[4] = {gain.x, gain.y, gain.z, gain.w};
      const float part = kKind == Kind::kQ4 && k % kChunk >= 16 ? 0.0625f : 1.0f;
      uint16_t rounded[4];
      float sum = 0.0f;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (has_norm) values[e] = normalized(values[e], inverse, gain_at[e]);
        if constexpr (kIsCodes) {
          rounded[e] = to_f16(values[e] * power * part);
          sum += from_f16(rounded[e]);
        } else {
          rounded[e] = to_bf16(values[e]);
        }
      }
      if (k < padded) store_four<kKind>(x + m * pitch, k, rounded);
      if constexpr (kIsCodes) {
        // The lanes that have a step are neighbours.
        float excess_of_step = -(kBaseValue + static_cast<float>(p.weight.zero) / part) * sum;
        float total = sum / part;
#pragma unroll
        for (int lanes = kStep<kKind> / 8; lanes > 0; lanes /= 2) {
          excess_of_step += __shfl_xor_sync(kAllLanes, excess_of_step, lanes);
          total += __shfl_xor_sync(kAllLanes, total, lanes);
        }
        if (k < padded && k % kStep<kKind> == 0) {
          excess[k / kStep<kKind> * kColumns + m] = excess_of_step;
          if (p.weight.has_min) totals[k / kStep<kKind> * kColumns + m] = total;
        }
      }
    };
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
      if (4 * i * kThreadCount >= padded) break;
      store(first + 4 * i * kThreadCount, kept[i], gain_of(i));
    }
#pragma unroll 1
    for (int base = 4 * kKept * kThreadCount; base < padded; base += 4 * kAfter * kThreadCount) {
      float4 more[kAfter];
      load_more(base, more);
#pragma unroll
      for (int i = 0; i < kAfter; ++i) {
        const int at = base + 4 * i * kThreadCount;
        if (at >= padded) break;
        float4 gain{1.0f, 1.0f, 1.0f, 1.0f};
        if (has_norm) gain = load_four(p.norm.weight, at + first, cols, v.is_aligned);
        store(at + first, more[i], gain);
      }
    }
  }
  sync();
}

}  // namespace llama_ext::cuda::rows_mma
