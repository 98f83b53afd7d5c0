// Quantised weights by activations rounded to int8: int32 sums within a group of k, float32 totals across groups. The products of
// a strip come from dot_vnni.h or dot_madd.h.
//
// A group's sum starts at -zero x (sum of its activations), so codes need no correction. An output is one chain of float32
// additions over ascending groups and blocks of 128 k, whatever rows surround it.
// Bound: arithmetic (92% of VPDPBUSD's peak with groups of 128, 83% with 32, from cache on Zen 4), reading codes with few rows.
#pragma once

#include "cpu/kernel_table.h"
#include "cpu/kernels/codes.h"

namespace llama_ext::LLAMA_EXT_ISA_NAMESPACE {

template <CodeFormat F, int R, int NV>
static inline void start_sums(const uint8_t* starts, vi (&sum)[R][NV]) {
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      sum[r][v] = iset1(F.has_min ? 0 : reinterpret_cast<const int32_t*>(starts)[r]);
      // Each zero by itself: g++ 12 spills copies of a common one.
      if constexpr (F.has_min) asm volatile("" : "+v"(sum[r][v]));
    }
  }
}

/// total += scale x sum (+ min x sum of activations)
template <CodeFormat F, int R, int NV>
static inline void finish_group(const uint8_t* unit, int64_t group, int64_t column, const uint8_t* starts,
                                const vi (&sum)[R][NV], vf (&total)[R][NV]) {
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) {
    const vf scale = group_scale<F>(unit, group, column + kWidth * v);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) total[r][v] = vfma(vfloat(sum[r][v]), scale, total[r][v]);
    if constexpr (F.has_min) {
      const vf min = group_min<F>(unit, group, column + kWidth * v);
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
    a = codes + kActivationBlock * static_cast<int64_t>(sizeof(Activation)) * R;
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
        codes += kStrip * static_cast<int64_t>(sizeof(Activation)) * R;
        strip += F.strip_bytes();
        k += kStrip;
      } else {
        do {
          prefetch_strip<F, R>(strip);
          ahead();
          dot_strip<F, R, NV, 0, 8>(strip, column, codes, sum);
          codes += kStrip * static_cast<int64_t>(sizeof(Activation)) * R;
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

template <CodeFormat F>
static void panel_codes(const PanelProduct& p) {
  using Tile = void (*)(const PanelProduct&, const uint8_t*, float*, const Ahead&);
  static constexpr Tile kTiles[6] = {
      tile_codes_rows<F, 1>, tile_codes_rows<F, 2>, tile_codes_rows<F, 3>,
      tile_codes_rows<F, 4>, tile_codes_rows<F, 5>, tile_codes_rows<F, kCodeRows>,
  };
  if (p.depth == 0 && !p.accumulate) {
    // No block of k will write the sums.
    for (int64_t r = 0; r < p.rows; ++r) {
      for (int64_t column = 0; column < kPanel; column += kWidth) vstore(p.c + r * p.ldc + column, vzero());
    }
    return;
  }
  const uint8_t* tiles = static_cast<const uint8_t*>(p.a);
  const int64_t row_bytes = packed_bytes_codes<Activation>(p.depth, p.group);
  const int64_t parts = (p.rows + kCodeRows - 1) / kCodeRows;
  // Few tiles have to ask for much of the next block each: a burst would hold them up.
  const bool spreads = p.next != nullptr && parts <= kSpreadTiles;
  const int64_t lines = p.next_bytes / 64;
  const int64_t per_strip = spreads ? (lines + parts * (p.depth / kStrip) - 1) / (parts * (p.depth / kStrip)) : 0;
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t row = part * kCodeRows;
    const int64_t height = p.rows - row < kCodeRows ? p.rows - row : kCodeRows;
    Ahead ahead;
    if (spreads) {
      ahead = {static_cast<const uint8_t*>(p.next) + 64 * part * per_strip * (p.depth / kStrip), per_strip};
    } else {
      prefetch_next(p, part, parts);
    }
    kTiles[height - 1](p, tiles + row * row_bytes, p.c + row * p.ldc, ahead);
  }
}

template <CodeFormat F>
static constexpr GemmKernel kCodeKernel = {
    kCodeRows, 512, 8, packed_bytes_codes<Activation>, pack_codes<F, Activation>, panel_codes<F>};

static constexpr CodeKernels kCodes = {LLAMA_EXT_OF_EACH_FORMAT(kCodeKernel), kDotNote};

}  // namespace llama_ext::LLAMA_EXT_ISA_NAMESPACE
