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

/// Of R rows, with the scales as they lie; none where so many are several tiles.
template <CodeFormat F, int R>
constexpr CodeTile packed_tile() {
  if constexpr (R <= kOnlyCodeRows<F>) {
    return tile_of<F, PackedScales, R>();
  } else {
    return nullptr;
  }
}

template <CodeFormat F>
static void panel_codes(const PanelProduct& p) {
  static constexpr CodeTile kTiles[kMostCodeRows] = {
      packed_tile<F, 1>(), packed_tile<F, 2>(), packed_tile<F, 3>(), packed_tile<F, 4>(), packed_tile<F, 5>(),
      packed_tile<F, 6>(), packed_tile<F, 7>(), packed_tile<F, 8>(), packed_tile<F, 9>(),
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
  // A tile of more than kCodeRows is the only one of its product. (Dividing by p.tile_rows would take 2% of 12 rows.)
  const int64_t parts = p.rows <= p.tile_rows ? 1 : (p.rows + kCodeRows - 1) / kCodeRows;
  // Few tiles have to ask for much of the next block each: a burst would hold them up.
  const bool spreads = p.next != nullptr && parts <= kSpreadTiles;
  const int64_t lines = p.next_bytes / 64;
  const int64_t per_strip = spreads ? (lines + parts * (p.depth / kStrip) - 1) / (parts * (p.depth / kStrip)) : 0;
  // The only tile asks for its own panel: whole lines for each strip, so a bit further ahead with each.
  const int64_t own_per_strip = (F.unit_bytes(p.group) / (F.unit(p.group) / kStrip) + 63) / 64;
  // Several tiles use the same scales.
  alignas(64) float scales[kWidenedDepth / F.smallest_group() * WidenedScales<F>::kFloats];
  const bool is_widened = parts > 1 && p.depth <= kWidenedDepth;
  const CodeTile full = full_tile<F>(p.group, spreads && parts == 2);
  if (is_widened) widen_scales<F>(static_cast<const uint8_t*>(p.b), p.depth, p.group, scales);
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t row = part * kCodeRows;
    const int64_t height = parts == 1 || p.rows - row < kCodeRows ? p.rows - row : kCodeRows;
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
    .rows_of_one_tile = kOnlyCodeRows<F>,
    .rows_without_next = kOnlyCodeRows<F>,
};

static constexpr CodeKernels kCodes = {LLAMA_EXT_OF_EACH_FORMAT(kCodeKernel), kDotNote};

}  // namespace llama_ext::LLAMA_EXT_ISA_NAMESPACE
