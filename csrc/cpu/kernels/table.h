// The table of a tier, from the kernels above it in the same translation unit.
#pragma once

#include "cpu/kernel_table.h"
#include "cpu/kernels/attention.h"
#include "cpu/kernels/gemm.h"
#include "cpu/kernels/rows.h"

namespace llama_ext::LLAMA_EXT_ISA_NAMESPACE {

static constexpr GemmKernel kGemmF32 = {kTileRows, sizeof(float), 192, 4, pack_f32, panel<PanelF32>};
static constexpr GemmKernel kGemmBf16Exact = {kTileRows, sizeof(float), 256, 8, pack_f32, panel<PanelBf16>};

static constexpr KernelTable make_table(const char* name, const GemmKernel& bf16, const char* bf16_note) {
  return {name,      kGemmF32,        kGemmBf16Exact, bf16, bf16_note, epilogue,
          attention, attention_merge, rms_norm,       rope, softmax,   log_sum_exp};
}

}  // namespace llama_ext::LLAMA_EXT_ISA_NAMESPACE
