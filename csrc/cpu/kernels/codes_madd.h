// Tiles of quantised products for AVX2, which has no instruction that sums four products of bytes.
//
// Codes of 4 to 6 bits: VPMADDUBSW sums two products in int16, and as many of those sums are added up as cannot overflow (8, 4 or
// 2 instructions) before VPMADDWD by ones widens them. Codes of 8 bits would saturate: codes and activations are widened to int16
// for VPMADDWD, two instructions for four k.
// A tile is six rows by one vector of columns, or fewer by more: int32 sums, and for narrow codes int16 sums beside them, fill the
// registers, so the float32 totals lie in memory, which a group touches once. All columns of a group are done before the next
// group, those of one row at once: what waits for memory reads a panel in one stream.
// Bound: four vector instructions a cycle on Zen 3: 54 multiply-adds a cycle with 4 bits and groups of 128, 29 with 8.
#pragma once

#include "cpu/kernels/tile_codes.h"

namespace llama_ext::LLAMA_EXT_ISA_NAMESPACE {

constexpr bool kHasWholeTile = false;
constexpr const char* kDotNote = "VPMADDUBSW (8 bits: VPMADDWD), activations rounded to int8";
/// Vectors of columns that a tile of so many rows spans.
constexpr int code_vectors(int rows) { return rows == 1 ? 4 : rows == 2 ? 2 : 1; }

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
template <CodeFormat F, int R, int NV, int kFirst, int kCount>
static inline void dot_strip(const uint8_t* strip, int64_t column, const uint8_t* a, vi (&sum)[R][NV]) {
  if constexpr (F.bits == 8) {
#pragma GCC unroll 8
    for (int quad = kFirst; quad < kFirst + kCount; ++quad) {
      vi even[NV], odd[NV];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        const vi codes = codes_of<F>(strip, quad, column + kWidth * v);
        even[v] = iand(codes, iset1(0x00ff00ff));
        odd[v] = _mm256_srli_epi16(codes, 8);
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const uint8_t* pairs = a + 8 * (quad * R + r);
        const vi first = broadcast_quad(pairs);
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) add_pairs(sum[r][v], even[v], first);
        const vi second = broadcast_quad(pairs + 4);
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) add_pairs(sum[r][v], odd[v], second);
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
        for (int v = 0; v < NV; ++v) codes[v] = codes_of<F>(strip, begin + i, column + kWidth * v);
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
        for (int v = 0; v < NV; ++v) add_pairs(sum[r][v], products[r][v], iset1(0x00010001));
      }
    }
  }
}

/// Totals of R rows by NV vectors, between memory and registers. The first group of a block finds none there: clearing the memory
/// takes longer than this branch (g++ 12 clears with REP STOS, 7% of an int8 prefill on Zen 3).
template <int R, int NV>
static inline void load_totals(bool is_first, const float (&from)[R][kPanel], int64_t column, vf (&total)[R][NV]) {
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) total[r][v] = is_first ? vzero() : vload(&from[r][column + kWidth * v]);
  }
}
template <int R, int NV>
static inline void store_totals(const vf (&total)[R][NV], int64_t column, float (&to)[R][kPanel]) {
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) vstore(&to[r][column + kWidth * v], total[r][v]);
  }
}

/// R rows by a panel's columns. widened: all scales, for WidenedScales.
template <CodeFormat F, template <CodeFormat> typename Scales, int R>
static void tile_codes(const PanelProduct& p, const uint8_t* a, float* c, const float* widened, const Ahead& next) {
  constexpr int NV = code_vectors(R);
  Ahead ahead = next;
  const int64_t unit = F.unit(p.group);
  const int64_t group = F.has_superblocks ? F.group : p.group;
  // Groups of 16 come in pairs, a strip.
  const int64_t step = group < kStrip ? kStrip : group;
  constexpr int64_t kActivationBytes = kStrip * static_cast<int64_t>(sizeof(Activation<F>)) * R;  // of a strip
  Scales<F> scales(p, widened);
  const uint8_t* strip = static_cast<const uint8_t*>(p.b) + F.header_bytes();
  int64_t in_unit = 0;  // k since the unit began
  for (int64_t k0 = 0; k0 < p.depth; k0 += kActivationBlock) {
    const float* row_scales = reinterpret_cast<const float*>(a);
    const uint8_t* starts = a + 4 * R;
    const uint8_t* codes = starts + 4 * (kActivationBlock / p.group) * R;
    a = codes + kActivationBlock / kStrip * kActivationBytes;
    const int64_t end = p.depth - k0 < kActivationBlock ? p.depth - k0 : kActivationBlock;
    alignas(32) float totals[R][kPanel];
    for (int64_t k = 0; k < end; k += step) {
      const int64_t index = F.has_superblocks ? in_unit / group : 0;
      for (int64_t column = 0; column < kPanel; column += NV * kWidth) {
        vi sum[R][NV];
        vf total[R][NV];
        start_sums<F>(starts, sum);
        if constexpr (F.group == 16) {
          if (column == 0) {
            prefetch_ahead<R, F.strip_bytes()>(strip);
            ahead();
          }
          dot_strip<F, R, NV, 0, 4>(strip, column, codes, sum);
          load_totals(k == 0, totals, column, total);
          finish_group<F>(scales, index, column, starts, sum, total);
          start_sums<F>(starts + 4 * R, sum);
          dot_strip<F, R, NV, 4, 4>(strip, column, codes, sum);
          finish_group<F>(scales, index + 1, column, starts + 4 * R, sum, total);
        } else {
          const uint8_t* at = strip;
          const uint8_t* with = codes;
          for (int64_t i = 0; i < step; i += kStrip) {
            if (column == 0) {
              prefetch_ahead<R, F.strip_bytes()>(at);
              ahead();
            }
            dot_strip<F, R, NV, 0, 8>(at, column, with, sum);
            at += F.strip_bytes();
            with += kActivationBytes;
          }
          load_totals(k == 0, totals, column, total);
          finish_group<F>(scales, index, column, starts, sum, total);
        }
        store_totals(total, column, totals);
      }
      strip += step / kStrip * F.strip_bytes();
      codes += step / kStrip * kActivationBytes;
      starts += 4 * R * (step / group);
      in_unit += step;
      if (in_unit == unit) {
        scales.advance(strip);
        prefetch_ahead<R, F.header_bytes()>(strip);
        strip += F.header_bytes();
        in_unit = 0;
      }
    }
    for (int r = 0; r < R; ++r) {
      const vf scale = vset1(row_scales[r]);
      for (int64_t column = 0; column < kPanel; column += kWidth) {
        float* to = c + r * p.ldc + column;
        vstore(to, vfma(scale, vload(&totals[r][column]), p.accumulate || k0 > 0 ? vload(to) : vzero()));
      }
    }
  }
}

}  // namespace llama_ext::LLAMA_EXT_ISA_NAMESPACE
