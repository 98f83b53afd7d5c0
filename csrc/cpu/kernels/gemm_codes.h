// Quantised weights by activations rounded to int8: int32 sums within a group of k, float32 totals across groups. The tiles come
// from codes_tile_512.h or codes_tile_256.h, their products from codes_dot_vnni.h or codes_dot_madd.h.
//
// A group's sum starts at -zero x (sum of its activations), so codes need no correction. An output is one chain of float32
// additions over ascending groups and blocks of 128 k, whatever rows surround it.
// Bound: arithmetic (from cache 92% of VPDPBUSD's peak with groups of 128 and 83% with 32 on Zen 4, 90% and 81% on Zen 5),
// reading codes with few rows.
#pragma once

#include "cpu/kernel_table.h"
#include "cpu/kernels/codes_tile.h"

namespace llama_ext::LLAMA_EXT_ISA_NAMESPACE {

/// k whose scales are widened at a time: a block of k of many rows.
constexpr int64_t kWidenedDepth = 512;

using CodeTile = void (*)(const PanelProduct&, const uint8_t*, float*, const float*, const Ahead&);

/// The tile of most rows of many.
template <CodeFormat F>
static CodeTile full_tile(int64_t group) {
  if constexpr (F.group == 0 && kHasWholeTile) {
    if (group == kActivationBlock) return tile_codes<F, WidenedScales, kCodeRows, true>;
  }
  return tile_codes<F, WidenedScales, kCodeRows>;
}

template <CodeFormat F>
static void panel_codes(const PanelProduct& p) {
  static constexpr CodeTile kTiles[6] = {
      tile_codes<F, PackedScales, 1>, tile_codes<F, PackedScales, 2>, tile_codes<F, PackedScales, 3>,
      tile_codes<F, PackedScales, 4>, tile_codes<F, PackedScales, 5>, tile_codes<F, PackedScales, kCodeRows>,
  };
  if (p.depth == 0 && !p.accumulate) {
    // No block of k will write the sums.
    for (int64_t r = 0; r < p.rows; ++r) {
      for (int64_t column = 0; column < kPanel; column += kWidth) vstore(p.c + r * p.ldc + column, vzero());
    }
    return;
  }
  const uint8_t* tiles = static_cast<const uint8_t*>(p.a);
  const int64_t row_bytes = packed_bytes_codes<Activation<F>>(p.depth, p.group);
  const int64_t parts = (p.rows + kCodeRows - 1) / kCodeRows;
  // Few tiles have to ask for much of the next block each: a burst would hold them up.
  const bool spreads = p.next != nullptr && parts <= kSpreadTiles;
  const int64_t lines = p.next_bytes / 64;
  const int64_t per_strip = spreads ? (lines + parts * (p.depth / kStrip) - 1) / (parts * (p.depth / kStrip)) : 0;
  // The only tile asks for its own panel: whole lines for each strip, so a bit further ahead with each.
  const int64_t own_per_strip = (F.unit_bytes(p.group) / (F.unit(p.group) / kStrip) + 63) / 64;
  // Several tiles use the same scales.
  alignas(64) float scales[kWidenedDepth / F.smallest_group() * WidenedScales<F>::kFloats];
  const bool is_widened = parts > 1 && p.depth <= kWidenedDepth;
  const CodeTile full = full_tile<F>(p.group);
  if (is_widened) widen_scales<F>(static_cast<const uint8_t*>(p.b), p.depth, p.group, scales);
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t row = part * kCodeRows;
    const int64_t height = p.rows - row < kCodeRows ? p.rows - row : kCodeRows;
    Ahead ahead;
    if (parts == 1 && p.next == nullptr && height > kPrefetchRows) {
      ahead = {static_cast<const uint8_t*>(p.b) + kCodesAhead<F>, own_per_strip};
    } else if (spreads) {
      ahead = {static_cast<const uint8_t*>(p.next) + 64 * part * per_strip * (p.depth / kStrip), per_strip};
    } else {
      prefetch_next(p, part, parts);
    }
    const CodeTile tile = is_widened && height == kCodeRows ? full : kTiles[height - 1];
    tile(p, tiles + row * row_bytes, p.c + row * p.ldc, scales, ahead);
  }
}

template <CodeFormat F>
static constexpr GemmKernel kCodeKernel = {
    .tile_rows = kCodeRows,
    .k_block = kWidenedDepth,
    .group_panels = 8,
    .packed_bytes = packed_bytes_codes<Activation<F>>,
    .pack = pack_codes<F, Activation<F>>,
    .panel = panel_codes<F>,
    .rows_without_next = kCodeRows,
};

static constexpr CodeKernels kCodes = {LLAMA_EXT_OF_EACH_FORMAT(kCodeKernel), kDotNote};

}  // namespace llama_ext::LLAMA_EXT_ISA_NAMESPACE
