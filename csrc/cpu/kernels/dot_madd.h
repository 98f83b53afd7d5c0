// Products of codes and activations with VPMADDWD, for AVX2: both widened to int16, so that nothing saturates (VPMADDUBSW would,
// with 8-bit codes). Two instructions for four k: codes 0 and 2, then 1 and 3.
#pragma once

#include "cpu/kernels/codes.h"

namespace llama_ext::LLAMA_EXT_ISA_NAMESPACE {

using Activation = int16_t;
constexpr const char* kDotNote = "VPMADDWD, activations rounded to int8";
constexpr int kCodeRows = 5;
/// Vectors of columns that a tile of so many rows spans. One row waits for memory, so it reads its panel in one stream.
constexpr int code_vectors(int rows) { return rows == 1 ? 4 : rows == 2 ? 2 : 1; }

/// A quad of one row is 8 bytes: activations 0 and 2, 1 and 3.
static inline vi broadcast_pair(const uint8_t* activations) {
  return iset1(*reinterpret_cast<const int32_t*>(activations));
}

/// sum += the products of quads [kFirst, kFirst + kCount) of a strip. a: its activations, [8][R][4].
template <CodeFormat F, int R, int NV, int kFirst, int kCount>
static inline void dot_strip(const uint8_t* strip, int64_t column, const uint8_t* a, vi (&sum)[R][NV]) {
#pragma GCC unroll 8
  for (int quad = kFirst; quad < kFirst + kCount; ++quad) {
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      const vi codes = codes_of<F>(strip, quad, column + kWidth * v);
      const vi even = iand(codes, iset1(0x00ff00ff));
      const vi odd = _mm256_srli_epi16(codes, 8);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const uint8_t* pairs = a + 8 * (quad * R + r);
        sum[r][v] = _mm256_add_epi32(sum[r][v], _mm256_madd_epi16(even, broadcast_pair(pairs)));
        sum[r][v] = _mm256_add_epi32(sum[r][v], _mm256_madd_epi16(odd, broadcast_pair(pairs + 4)));
      }
    }
  }
}

}  // namespace llama_ext::LLAMA_EXT_ISA_NAMESPACE
