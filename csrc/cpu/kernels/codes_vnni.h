// Products of codes and int8 activations with VPDPBUSD: four k in one instruction, activations as its broadcast operand.
#pragma once

#include "cpu/kernels/tile_codes.h"

namespace llama_ext::LLAMA_EXT_ISA_NAMESPACE {

template <CodeFormat>
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

/// R rows by NV vectors of columns from `column` on.
template <CodeFormat F, int R, int NV>
static inline void tile_codes(const PanelProduct& p, const uint8_t* a, int64_t column, float* c, Ahead ahead) {
  const int64_t unit = F.unit(p.group);
  const uint8_t* header = static_cast<const uint8_t*>(p.b);
  const uint8_t* strip = header + F.header_bytes();
  int64_t in_unit = 0;  // k since the unit began
  for (int64_t k0 = 0; k0 < p.depth; k0 += kActivationBlock) {
    const float* scales = reinterpret_cast<const float*>(a);
    const uint8_t* starts = a + 4 * R;
    const uint8_t* codes = starts + 4 * (kActivationBlock / p.group) * R;
    a = codes + kActivationBlock * static_cast<int64_t>(sizeof(Activation<F>)) * R;
    const int64_t end = p.depth - k0 < kActivationBlock ? p.depth - k0 : kActivationBlock;
    vf total[R][NV];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) total[r][v] = vzero();
    }
    for (int64_t k = 0; k < end;) {
      const int64_t group_begin = k;
      const int64_t index = F.has_superblocks ? in_unit / F.group : 0;
      vi sum[R][NV];
      start_sums<F>(starts, sum);
      if constexpr (F.group == 16) {
        prefetch_strip<F, R>(strip);
        ahead();
        dot_strip<F, R, NV, 0, 4>(strip, column, codes, sum);
        finish_group<F>(header, index, column, starts, sum, total);
        // The scales of the superblock are loaded again rather than kept: no register is free.
        asm volatile("" : "+r"(header));
        starts += 4 * R;
        start_sums<F>(starts, sum);
        dot_strip<F, R, NV, 4, 4>(strip, column, codes, sum);
        finish_group<F>(header, index + 1, column, starts, sum, total);
        codes += kStrip * static_cast<int64_t>(sizeof(Activation<F>)) * R;
        strip += F.strip_bytes();
        k += kStrip;
      } else {
        do {
          prefetch_strip<F, R>(strip);
          ahead();
          dot_strip<F, R, NV, 0, 8>(strip, column, codes, sum);
          codes += kStrip * static_cast<int64_t>(sizeof(Activation<F>)) * R;
          strip += F.strip_bytes();
          k += kStrip;
        } while (k - group_begin < p.group);
        finish_group<F>(header, index, column, starts, sum, total);
      }
      starts += 4 * R;
      in_unit += k - group_begin;
      if (in_unit == unit) {
        header = strip;
        strip += F.header_bytes();
        in_unit = 0;
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const vf scale = vset1(scales[r]);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        float* to = c + r * p.ldc + column + kWidth * v;
        vstore(to, vfma(scale, total[r][v], p.accumulate || k0 > 0 ? vload(to) : vzero()));
      }
    }
  }
}

template <CodeFormat F, int R>
static void tile_codes_rows(const PanelProduct& p, const uint8_t* a, float* c, const Ahead& ahead) {
  constexpr int NV = code_vectors(R);
  tile_codes<F, R, NV>(p, a, 0, c, ahead);
  for (int64_t column = NV * kWidth; column < kPanel; column += NV * kWidth) {
    tile_codes<F, R, NV>(p, a, column, c, {});
  }
}

}  // namespace llama_ext::LLAMA_EXT_ISA_NAMESPACE
