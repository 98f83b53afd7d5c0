// Tiles of quantised products in the thirty-two registers of AVX-512: int32 sums and float32 totals both in registers, for up to six rows.
#pragma once

#include "cpu/kernels/codes_tile_memory.h"

namespace llama_ext::LLAMA_EXT_ISA_NAMESPACE {

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

/// y += factor x total, of a row.
template <int NV>
static inline void add_scaled(const uint8_t* factor, const vf (&total)[NV], vf (&y)[NV]) {
  const vf all = vset1(*reinterpret_cast<const float*>(factor));
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) y[v] = vfma(all, total[v], y[v]);
}

template <int NV>
static inline void load_row(const float* from, bool is_zero, vf (&y)[NV]) {
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) y[v] = is_zero ? vzero() : vload(from + kWidth * v);
}

template <int NV>
static inline void store_row(const vf (&y)[NV], float* to) {
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) vstore(to + kWidth * v, y[v]);
}

/// R rows by a panel's columns. widened: all scales, for WidenedScales. kWhole: a group is a block of activations. Then the outputs
/// stay in registers for all blocks, and there is no branch between strips (1% each).
template <CodeFormat F, template <CodeFormat> typename Scales, int R, bool kWhole = false>
static void tile_codes(const PanelProduct& p, const uint8_t* a, float* c, const float* widened, const Ahead& next) {
  constexpr int NV = static_cast<int>(kPanel) / kWidth;
  Ahead ahead = next;
  // Counters that are known before the loops: what a group of 32 k costs besides its products shows.
  const int64_t group = F.has_superblocks ? F.group : kWhole ? kActivationBlock : p.group;
  const int64_t groups_of_block = kActivationBlock / group;
  const int64_t groups_of_unit = F.groups_of_unit(group);
  const int64_t strips_of_group = group / kStrip;
  const int64_t ldc = p.ldc;  // a store might change it
  const uint8_t* strip = static_cast<const uint8_t*>(p.b) + F.header_bytes();
  Scales<F> scales(p, widened);
  int64_t index = 0;  // of a group in its unit
  bool is_first = !p.accumulate;
  vf y[R][NV];
  if constexpr (kWhole) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) load_row(c + r * ldc, is_first, y[r]);
  }
  for (int64_t left = p.depth / group; left > 0; left -= groups_of_block) {
    const uint8_t* row_scales = a;
    const uint8_t* starts = row_scales + 4 * R;
    const uint8_t* codes = starts + 4 * groups_of_block * R;
    a = codes + kActivationBlock * R;
    vf total[R][NV];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) total[r][v] = vzero();
    }
    for (int64_t groups = left < groups_of_block ? left : groups_of_block; groups > 0;) {
      vi sum[chains(R)][R][NV];
      start_chains<F>(starts, sum);
      if constexpr (F.group == 16) {
        prefetch_ahead<F, R, F.strip_bytes()>(strip);
        ahead();
        dot_strip<F, 0, 4>(strip, codes, sum);
        join_chains(sum);
        finish_group<F>(scales, index, 0, starts, sum[0], total);
        // The scales of the superblock are loaded again rather than kept: no register is free.
        asm volatile("" : "+r"(scales.unit));
        starts += 4 * R;
        start_chains<F>(starts, sum);
        dot_strip<F, 4, 4>(strip, codes, sum);
        join_chains(sum);
        finish_group<F>(scales, index + 1, 0, starts, sum[0], total);
        codes += kStrip * R;
        strip += F.strip_bytes();
        index += 2;
        groups -= 2;
      } else {
        if constexpr (kWhole) {
          for (int64_t i = 0; i < kActivationBlock / kStrip; ++i) ahead();
#pragma GCC unroll 4
          for (int64_t i = 0; i < kActivationBlock / kStrip; ++i) {
            dot_strip<F, 0, 8>(strip + i * F.strip_bytes(), codes + i * kStrip * R, sum);
          }
          strip += kActivationBlock / kStrip * F.strip_bytes();
        } else {
          int64_t strips = strips_of_group;
          do {
            prefetch_ahead<F, R, F.strip_bytes()>(strip);
            ahead();
            dot_strip<F, 0, 8>(strip, codes, sum);
            codes += kStrip * R;
            strip += F.strip_bytes();
          } while (--strips > 0);
        }
        join_chains(sum);
        finish_group<F>(scales, index, 0, starts, sum[0], total);
        ++index;
        --groups;
      }
      starts += 4 * R;
      if (index == groups_of_unit) {
        scales.advance(strip);
        prefetch_ahead<F, R, F.header_bytes()>(strip);
        strip += F.header_bytes();
        index = 0;
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      if constexpr (!kWhole) load_row(c + r * ldc, is_first, y[r]);
      add_scaled(row_scales + 4 * r, total[r], y[r]);
      if constexpr (!kWhole) store_row(y[r], c + r * ldc);
    }
    is_first = false;
  }
  if constexpr (kWhole) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) store_row(y[r], c + r * ldc);
  }
}

/// Seven to nine rows are one tile where their codes have 8 bits: two tiles wait for the L2 cache between them. Narrower codes
/// take too many instructions for that to matter (int4 lost up to 13%, or gained as much, by how fast memory was), and so do more rows.
template <CodeFormat F>
constexpr int kOnlyCodeRows = F.bits == 8 ? kMostCodeRows : kCodeRows;

/// Of R rows.
template <CodeFormat F, template <CodeFormat> typename Scales, int R>
constexpr CodeTile tile_of() {
  if constexpr (R <= kCodeRows) {
    return tile_codes<F, Scales, R>;
  } else {
    return tile_codes_in_memory<F, Scales, R>;
  }
}

/// Of kCodeRows of many rows. is_half: one of two tiles, which ask for half of what is next each. With 8 bits that is too much at once for
/// the tile that asks before every four strips (12 rows gain 13 to 18% by the other, 16 rows lose 5%).
template <CodeFormat F>
static inline CodeTile full_tile(int64_t group, bool is_half) {
  if constexpr (F.group == 0) {
    if (group == kActivationBlock && !(is_half && F.bits == 8)) return tile_codes<F, WidenedScales, kCodeRows, true>;
  }
  return tile_codes<F, WidenedScales, kCodeRows>;
}

}  // namespace llama_ext::LLAMA_EXT_ISA_NAMESPACE
