// The table of a tier, from the kernels above it in the same translation unit.
#pragma once

#include "cpu/kernel_table.h"
#include "cpu/kernels/attention.h"
#include "cpu/kernels/codes.h"
#include "cpu/kernels/gemm.h"
#include "cpu/kernels/logits.h"
#include "cpu/kernels/optimizer.h"
#include "cpu/kernels/rounding.h"
#include "cpu/kernels/row_gradients.h"
#include "cpu/kernels/rows.h"
#include "cpu/kernels/softmax_gradients.h"
#include "cpu/kernels/transpose.h"

namespace llama_ext::LLAMA_EXT_ISA_NAMESPACE {

static constexpr GemmKernel kGemmF32 = {
    .tile_rows = kTileRows,
    .k_block = 192,
    .group_panels = 4,
    .packed_bytes = packed_bytes_f32,
    .pack = pack_f32,
    .panel = panel<PanelF32>,
    .rows_without_next = kTileRows,
    .can_stream = true,
    .panel_in_place = panel<PanelF32, RowsInPlace>,
};
static constexpr GemmKernel kGemmF16 = {
    .tile_rows = kTileRows,
    .k_block = 256,
    .group_panels = 8,
    .packed_bytes = packed_bytes_f32,
    .pack = pack_f32,
    .panel = panel<PanelF16>,
    .rows_without_next = kTileRows,
    .can_stream = true,
};
static constexpr GemmKernel kGemmBf16Exact = {
    .tile_rows = kTileRows,
    .k_block = 256,
    .group_panels = 8,
    .packed_bytes = packed_bytes_f32,
    .pack = pack_f32,
    .panel = panel<PanelBf16>,
    .rows_without_next = kTileRows,
    .can_stream = true,
};

template <CodeFormat F>
static constexpr GemmKernel kExactKernel = {kTileRows, 256, 8, packed_bytes_f32, pack_f32, panel_codes_exact<F>};

static constexpr CodeKernels kCodesExact = {LLAMA_EXT_OF_EACH_FORMAT(kExactKernel), "widened to float32"};

static constexpr TrainingKernels kTraining = {transpose,
                                              pack_columns,
                                              pack_panel,
                                              round_panel,
                                              widen_f16,
                                              widen_bf16,
                                              LLAMA_EXT_OF_EACH_FORMAT(widen_codes),
                                              rope<true>,
                                              swiglu,
                                              swiglu_backward,
                                              rms_norm_backward,
                                              softmax_gradient,
                                              dropout,
                                              attention_softmax,
                                              attention_gradient,
                                              dot,
                                              scale,
                                              add,
                                              add_rows,
                                              adam,
                                              sgd,
                                              sum_of_squares};

static constexpr KernelTable make_table(const char* name, const GemmKernel& bf16, const char* bf16_note,
                                        const CodeKernels& codes, const AttentionKernel& attention_bf16) {
  KernelTable table = {name,
                       kGemmF32,
                       kGemmBf16Exact,
                       bf16,
                       kGemmF16,
                       {},
                       {},
                       bf16_note,
                       codes.note,
                       epilogue,
                       kAttentionF32,
                       kAttentionBf16Exact,
                       attention_bf16,
                       attention_merge,
                       multiply_row,
                       divide_row,
                       rms_norm,
                       rope<false>,
                       softmax,
                       log_sum_exp,
                       kRounding,
                       kLogits,
                       kTraining};
  for (int i = 0; i < kCodeFormatCount; ++i) {
    table.codes[i] = codes.kernels[i];
    table.codes_exact[i] = kCodesExact.kernels[i];
  }
  return table;
}

}  // namespace llama_ext::LLAMA_EXT_ISA_NAMESPACE
