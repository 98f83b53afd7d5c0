// Products of codes and int8 activations with VPDPBUSD: four k in one instruction.
#pragma once

#include "cpu/kernels/codes_tile.h"

namespace llama_ext::LLAMA_EXT_ISA_NAMESPACE {

template <CodeFormat>
using Activation = int8_t;
constexpr const char* kDotNote = "VPDPBUSD, activations rounded to int8";

/// Vectors of columns that a tile of so many rows spans where its totals are in memory.
constexpr int code_vectors(int rows) { return kWidth == 16 || rows > 2 ? 2 : 4; }

/// Few rows have few sums, each of which waits for the product before: their quads take turns with this many. They are whole
/// numbers, so in what order they are added up makes no difference.
constexpr int chains(int rows) {
  if (kWidth == 16) return rows == 1 ? 4 : rows <= 3 ? 2 : 1;
  return rows == 1 || rows == 3 ? 2 : 1;
}

/// sum += codes (unsigned) x activations (signed), four of each per lane. Inline and volatile: around the intrinsic, or when
/// it may reorder them, g++ 12 spills the sums.
static inline void dot_quad(vi& sum, vi codes, vi activations) {
#ifdef __AVX512VNNI__
  asm volatile("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(activations));
#else
  // AVX-VNNI's form of it, which assemblers do not take by themselves.
  asm volatile("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(codes), "x"(activations));
#endif
}

/// sum += the products of quads [kFirst, kFirst + kCount) of a strip. a: its activations, [8][R][4].
template <CodeFormat F, int kFirst, int kCount, int C, int R, int NV>
static inline void dot_strip(const uint8_t* strip, const uint8_t* a, vi (&sum)[C][R][NV]) {
#pragma GCC unroll 8
  for (int quad = kFirst; quad < kFirst + kCount; ++quad) {
    // Of sixteen registers none is free for what quads share: loaded again, it does not go through the stack (10% with 5 bits).
    if constexpr (kWidth < 16 && F.bits < 8) asm volatile("" : "+r"(strip));
    vi codes[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) codes[v] = codes_of<F>(strip, quad, kWidth * v);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const vi x = broadcast_quad(a + 4 * (quad * R + r));
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) dot_quad(sum[quad % C][r][v], codes[v], x);
    }
  }
}

}  // namespace llama_ext::LLAMA_EXT_ISA_NAMESPACE
