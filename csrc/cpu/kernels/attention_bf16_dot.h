// Attention with VDPBF16PS: queries and the softmax's weights rounded to bf16, keys and values bf16 or int8.
#pragma once

#include "cpu/kernels/attention.h"
#include "cpu/kernels/gemm_bf16_dot.h"

namespace llama_ext::LLAMA_EXT_ISA_NAMESPACE {

struct ProductsBf16Dot {
  using Element = uint16_t;
  static constexpr int64_t kStep = 2;

  static void multiply(const PanelProduct& p) { panel_bf16_dot(p); }
  static void pack_rows(const float* rows, int64_t depth, int64_t height, void* tile) {
    pack_pairs(rows, kKeyTile, height, depth, depth, static_cast<uint32_t*>(tile));
  }
};

static constexpr AttentionKernel kAttentionBf16Dot = {kTileRows, 2, 2, pack_bf16_pairs, attention<ProductsBf16Dot>};

}  // namespace llama_ext::LLAMA_EXT_ISA_NAMESPACE
