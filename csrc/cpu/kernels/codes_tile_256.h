// Tiles of quantised products in the sixteen registers of AVX2.
#pragma once

#include "cpu/kernels/codes_tile_memory.h"

namespace llama_ext::LLAMA_EXT_ISA_NAMESPACE {

template <CodeFormat F>
constexpr int kOnlyCodeRows = kCodeRows;

/// Of R rows.
template <CodeFormat F, template <CodeFormat> typename Scales, int R>
constexpr CodeTile tile_of() {
  return tile_codes_in_memory<F, Scales, R>;
}

/// Of kCodeRows of many rows.
template <CodeFormat F>
static inline CodeTile full_tile(int64_t /*group*/, bool /*is_half*/) {
  return tile_of<F, WidenedScales, kCodeRows>();
}

}  // namespace llama_ext::LLAMA_EXT_ISA_NAMESPACE
