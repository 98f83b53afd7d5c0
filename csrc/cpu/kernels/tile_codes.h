// What the tiles of quantised products share: where a group's sums start, how they end, and what is fetched meanwhile.
#pragma once

#include "cpu/kernels/codes.h"

namespace llama_ext::LLAMA_EXT_ISA_NAMESPACE {

/// Four bytes of activations, in every lane. Loaded once for all columns of a tile: as a memory operand of each product they
/// would take more loads than the two a cycle that a processor has beside two products. Volatile as the products, to stay beside them.
static inline vi broadcast_quad(const uint8_t* activations) {
  vi quad;
  asm volatile("vpbroadcastd %1, %0" : "=v"(quad) : "m"(*reinterpret_cast<const uint32_t*>(activations)));
  return quad;
}

template <CodeFormat F, int R, int NV>
static inline void start_sums(const uint8_t* starts, vi (&sum)[R][NV]) {
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      sum[r][v] = iset1(F.has_min ? kSumBits : reinterpret_cast<const int32_t*>(starts)[r]);
      // Each by itself: g++ 12 spills copies of a common one.
      if constexpr (F.has_min) asm volatile("" : "+v"(sum[r][v]));
    }
  }
}

/// total += scale x sum (+ min x sum of activations)
template <CodeFormat F, typename Scales, int R, int NV>
static inline void finish_group(const Scales& scales, int64_t group, int64_t column, const uint8_t* starts,
                                const vi (&sum)[R][NV], vf (&total)[R][NV]) {
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) {
    const vf scale = scales.scale(group, column + kWidth * v);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) total[r][v] = vfma(sum_value(sum[r][v]), scale, total[r][v]);
    if constexpr (F.has_min) {
      const vf min = scales.min(group, column + kWidth * v);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        total[r][v] = vfma(vset1(reinterpret_cast<const float*>(starts)[r]), min, total[r][v]);
      }
    }
  }
}

/// What a tile asks for while it computes: some lines with each strip, so that reading and multiplying overlap.
constexpr int64_t kSpreadTiles = 6;
struct Ahead {
  const uint8_t* line = nullptr;  // none
  int64_t per_strip = 0;

  void operator()() {
    if (line == nullptr) return;
    for (int64_t i = 0; i < per_strip; ++i, line += 64) __builtin_prefetch(line, 0, 2);
  }
};

}  // namespace llama_ext::LLAMA_EXT_ISA_NAMESPACE
