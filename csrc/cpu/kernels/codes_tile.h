// What the tiles of quantised products share: where a group's sums start, how chains of them end, and what is fetched meanwhile.
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
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      sum[r][v] = iset1(F.has_min ? kSumBits : reinterpret_cast<const int32_t*>(starts)[r]);
      // Each by itself: g++ 12 spills copies of a common one.
      if constexpr (F.has_min) asm volatile("" : "+v"(sum[r][v]));
    }
  }
}

template <CodeFormat F, int C, int R, int NV>
static inline void start_chains(const uint8_t* starts, vi (&sum)[C][R][NV]) {
  start_sums<F>(starts, sum[0]);
#pragma GCC unroll 4
  for (int chain = 1; chain < C; ++chain) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) sum[chain][r][v] = iset1(0);
    }
  }
}

/// Into the first chain.
template <int C, int R, int NV>
static inline void join_chains(vi (&sum)[C][R][NV]) {
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
#pragma GCC unroll 4
      for (int chain = 1; chain < C; ++chain) sum[0][r][v] = iadd(sum[0][r][v], sum[chain][r][v]);
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

using CodeTile = void (*)(const PanelProduct&, const uint8_t*, float*, const float*, const Ahead&);

}  // namespace llama_ext::LLAMA_EXT_ISA_NAMESPACE
