// Products of codes and int8 activations for AVX2, which has no instruction that sums four products of bytes.
//
// Codes of 4 to 6 bits: VPMADDUBSW sums two products in int16, and as many of those sums are added up as cannot overflow (8, 4 or
// 2 instructions) before VPMADDWD by ones widens them. Codes of 8 bits would saturate: codes and activations are widened to int16
// for VPMADDWD, two instructions for four k.
#pragma once

#include "cpu/kernels/codes_tile.h"

namespace llama_ext::LLAMA_EXT_ISA_NAMESPACE {

constexpr const char* kDotNote = "VPMADDUBSW (8 bits: VPMADDWD), activations rounded to int8";

/// Vectors of columns that a tile of so many rows spans.
constexpr int code_vectors(int rows) { return rows == 1 ? 4 : rows == 2 ? 2 : 1; }

/// Additions take one cycle: no sum waits.
constexpr int chains(int /*rows*/) { return 1; }

template <int kBits>
struct ActivationOf {
  using type = int8_t;
};
template <>
struct ActivationOf<8> {
  using type = int16_t;
};
template <CodeFormat F>
using Activation = typename ActivationOf<F.bits>::type;

// Inline and volatile: g++ 12 computes the products of a whole strip before it adds them up, and spills them all.

/// products = codes (unsigned bytes) x activations (signed), two of each in int16.
static inline void first_products(vi& products, vi codes, vi activations) {
  asm volatile("vpmaddubsw %2, %1, %0" : "=x"(products) : "x"(codes), "x"(activations));
}

/// products += the same.
static inline void add_products(vi& products, vi codes, vi activations) {
  vi more;
  asm volatile("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0"
               : "+x"(products), "=&x"(more)
               : "x"(codes), "x"(activations));
}

/// sum += pairs of int16 x pairs of int16.
static inline void add_pairs(vi& sum, vi pairs, vi others) {
  vi more;
  asm volatile("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(sum), "=&x"(more) : "x"(pairs), "x"(others));
}

/// sum += the products of quads [kFirst, kFirst + kCount) of a strip. a: its activations, [8][R][4]; of 8-bit codes a quad of one
/// row is the pairs 0 and 2, 1 and 3.
template <CodeFormat F, int kFirst, int kCount, int R, int NV>
static inline void dot_strip(const uint8_t* strip, const uint8_t* a, vi (&sum)[1][R][NV]) {
  if constexpr (F.bits == 8) {
#pragma GCC unroll 8
    for (int quad = kFirst; quad < kFirst + kCount; ++quad) {
      vi even[NV], odd[NV];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        const vi codes = codes_of<F>(strip, quad, kWidth * v);
        even[v] = iand(codes, iset1(0x00ff00ff));
        odd[v] = _mm256_srli_epi16(codes, 8);
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const uint8_t* pairs = a + 8 * (quad * R + r);
        const vi first = broadcast_quad(pairs);
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) add_pairs(sum[0][r][v], even[v], first);
        const vi second = broadcast_quad(pairs + 4);
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) add_pairs(sum[0][r][v], odd[v], second);
      }
    }
  } else {
    // The largest code x 127, twice, so many times: 30,480, 31,496 and 32,004.
    constexpr int kLongest = F.bits == 4 ? 8 : F.bits == 5 ? 4 : 2;
    constexpr int kRun = kCount < kLongest ? kCount : kLongest;
    static_assert(kCount % kRun == 0);
#pragma GCC unroll 4
    for (int begin = kFirst; begin < kFirst + kCount; begin += kRun) {
      vi products[R][NV];
#pragma GCC unroll 8
      for (int i = 0; i < kRun; ++i) {
        vi codes[NV];
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) codes[v] = codes_of<F>(strip, begin + i, kWidth * v);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          const vi four = broadcast_quad(a + 4 * ((begin + i) * R + r));
#pragma GCC unroll 4
          for (int v = 0; v < NV; ++v) {
            if (i == 0) {
              first_products(products[r][v], codes[v], four);
            } else {
              add_products(products[r][v], codes[v], four);
            }
          }
        }
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) add_pairs(sum[0][r][v], products[r][v], iset1(0x00010001));
      }
    }
  }
}

}  // namespace llama_ext::LLAMA_EXT_ISA_NAMESPACE
