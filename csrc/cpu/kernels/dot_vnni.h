// Products of codes and int8 activations with VPDPBUSD: four k in one instruction, activations as its broadcast operand.
#pragma once

#include "cpu/kernels/codes.h"

namespace llama_ext::LLAMA_EXT_ISA_NAMESPACE {

using Activation = int8_t;
constexpr const char* kDotNote = "VPDPBUSD, activations rounded to int8";
// Six rows leave registers for both kinds of sums: 12 of int32, 12 of float32, the rest for codes and masks.
constexpr int kCodeRows = 6;
/// Vectors of columns that a tile of so many rows spans.
constexpr int code_vectors(int) { return 2; }

/// sum += codes (unsigned) x activations (signed), four of each per lane. Inline and
/// volatile: around the intrinsic, or when it may reorder them, g++ 12 spills the sums.
static inline void dot_quad(vi& sum, vi codes, const uint8_t* activations) {
  asm volatile("vpdpbusd %2%{1to16%}, %1, %0"
               : "+v"(sum)
               : "v"(codes), "m"(*reinterpret_cast<const uint32_t*>(activations)));
}

/// sum += the products of quads [kFirst, kFirst + kCount) of a strip. a: its activations, [8][R][4].
template <CodeFormat F, int R, int NV, int kFirst, int kCount>
static inline void dot_strip(const uint8_t* strip, int64_t column, const uint8_t* a, vi (&sum)[R][NV]) {
#pragma GCC unroll 8
  for (int quad = kFirst; quad < kFirst + kCount; ++quad) {
    vi codes[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) codes[v] = codes_of<F>(strip, quad, column + kWidth * v);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) dot_quad(sum[r][v], codes[v], a + 4 * (quad * R + r));
    }
  }
}

}  // namespace llama_ext::LLAMA_EXT_ISA_NAMESPACE
