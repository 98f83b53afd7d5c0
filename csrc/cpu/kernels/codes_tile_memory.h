// Tiles of quantised products whose float32 totals lie in memory, which a group touches once: int32 sums, and for codes_dot_madd.h's
// narrow codes int16 sums beside them, fill the registers.
//
// With AVX2's sixteen a tile is six rows by one or two vectors of columns, or fewer by more (code_vectors); with thirty-two up to nine
// rows by two. All columns of a group are done before the next group, those of one row at once: what waits for memory reads a panel in
// one stream.
// Bound: arithmetic. With VPMADDUBSW four vector instructions a cycle on Zen 3 (54 multiply-adds a cycle with 4 bits and groups of
// 128, 29 with 8 bits); with VPDPBUSD on 256 bits two of those a cycle, of which on Zen 5 80% are reached with groups of 128, 71% with 32.
#pragma once

#include "cpu/kernels/codes_tile.h"

namespace llama_ext::LLAMA_EXT_ISA_NAMESPACE {

/// total += scale x sum (+ min x sum of activations): a vector at a time, as no more registers are free.
/// kIsFirst: a block's first group finds no totals there. Clearing the memory would take longer than a branch (g++ 12 clears with
/// REP STOS, 7% of an int8 prefill on Zen 3).
template <CodeFormat F, bool kIsFirst, typename Scales, int R, int NV>
static inline void add_group_in_memory(const Scales& scales, int64_t group, int64_t column, const uint8_t* starts,
                                       const vi (&sum)[R][NV], float (&totals)[R][kPanel]) {
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) {
    const vf scale = scales.scale(group, column + kWidth * v);
    vf min;
    if constexpr (F.has_min) min = scales.min(group, column + kWidth * v);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      float* at = &totals[r][column + kWidth * v];
      vf total = vfma(sum_value(sum[r][v]), scale, kIsFirst ? vzero() : vload(at));
      if constexpr (F.has_min) total = vfma(vset1(reinterpret_cast<const float*>(starts)[r]), min, total);
      vstore(at, total);
    }
  }
}

template <CodeFormat F, typename Scales, int R, int NV>
static inline void finish_group_in_memory(const Scales& scales, int64_t group, int64_t column, const uint8_t* starts,
                                          const vi (&sum)[R][NV], bool is_first, float (&totals)[R][kPanel]) {
  if (is_first) {
    add_group_in_memory<F, true>(scales, group, column, starts, sum, totals);
  } else {
    add_group_in_memory<F, false>(scales, group, column, starts, sum, totals);
  }
}

/// R rows by a panel's columns. widened: all scales, for WidenedScales.
template <CodeFormat F, template <CodeFormat> typename Scales, int R>
static void tile_codes_in_memory(const PanelProduct& p, const uint8_t* a, float* c, const float* widened,
                                 const Ahead& next) {
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
    alignas(64) float totals[R][kPanel];
    for (int64_t k = 0; k < end; k += step) {
      const int64_t index = F.has_superblocks ? in_unit / group : 0;
      for (int64_t column = 0; column < kPanel; column += NV * kWidth) {
        vi sum[chains(R)][R][NV];
        const uint8_t* at = strip + 4 * column;
        const uint8_t* with = codes;
        start_chains<F>(starts, sum);
        for (int64_t i = 0; i < step; i += kStrip, at += F.strip_bytes(), with += kActivationBytes) {
          if (column == 0) {
            prefetch_ahead<F, R, F.strip_bytes()>(at);
            ahead();
          }
          // One address each: where a group is a strip, g++ 12 keeps forty of them on the stack.
          asm volatile("" : "+r"(at), "+r"(with));
          if constexpr (F.group == 16) {
            dot_strip<F, 0, 4>(at, with, sum);
            join_chains(sum);
            finish_group_in_memory<F>(scales, index, column, starts, sum[0], k == 0, totals);
            start_chains<F>(starts + 4 * R, sum);
            dot_strip<F, 4, 4>(at, with, sum);
          } else {
            dot_strip<F, 0, 8>(at, with, sum);
          }
        }
        join_chains(sum);
        constexpr int64_t kLast = F.group == 16 ? 1 : 0;
        finish_group_in_memory<F>(scales, index + kLast, column, starts + 4 * R * kLast, sum[0], kLast == 0 && k == 0,
                                  totals);
      }
      strip += step / kStrip * F.strip_bytes();
      codes += step / kStrip * kActivationBytes;
      starts += 4 * R * (step / group);
      in_unit += step;
      if (in_unit == unit) {
        scales.advance(strip);
        prefetch_ahead<F, R, F.header_bytes()>(strip);
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
