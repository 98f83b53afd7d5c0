// Attention with VDPBF16PS: queries and the softmax's weights rounded to bf16, keys and values bf16 or int8.
#pragma once

#include "cpu/kernels/attention.h"
#include "cpu/kernels/gemm_bf16_dot.h"

namespace llama_ext::LLAMA_EXT_ISA_NAMESPACE {

struct ProductsBf16Dot {
  using Element = uint16_t;
  static constexpr int64_t kStep = 2;

  static void multiply(const PanelProduct& p) { panel_bf16_dot(p); }
  /// Row r of a tile of `height` rows: [depth / 2][height][2]. Room for 128 in `row`.
  static void pack_row(const float* row, int64_t depth, int64_t height, int64_t r, void* tile) {
    alignas(64) uint32_t pairs[kKeyTile / 2];
    for (int64_t j = 0; j < depth; j += 32) {
      const __m512bh rounded = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(row + j + 16), _mm512_loadu_ps(row + j));
      _mm512_store_si512(pairs + j / 2, reinterpret_cast<__m512i>(rounded));
    }
    uint32_t* to = static_cast<uint32_t*>(tile) + r;
    for (int64_t j = 0; j < depth / 2; ++j) to[j * height] = pairs[j];
  }
};

static constexpr AttentionKernel kAttentionBf16Dot = {kTileRows, 2, 2, pack_bf16_pairs, attention<ProductsBf16Dot>};

}  // namespace llama_ext::LLAMA_EXT_ISA_NAMESPACE
