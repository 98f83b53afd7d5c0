// The avx512-bf16 tier: every kernel, compiled for it. Nothing here may use the standard library, nor leave a symbol outside this
// tier's namespace that a linker could hand to other code (tools/check_tier_symbols.py).
#define LLAMA_EXT_ISA_NAMESPACE isa_avx512_bf16

#include "cpu/simd/vec_avx512.h"
#include "cpu/kernels/attention_bf16_dot.h"
#include "cpu/kernels/codes_dot_vnni.h"
#include "cpu/kernels/codes_tile_512.h"
#include "cpu/kernels/gemm.h"
#include "cpu/kernels/gemm_bf16_dot.h"
#include "cpu/kernels/gemm_codes.h"
#include "cpu/kernels/table.h"

namespace llama_ext {

namespace LLAMA_EXT_ISA_NAMESPACE {
static constexpr GemmKernel kGemmBf16 = {
    .tile_rows = kTileRows,
    .k_block = 512,
    .group_panels = 8,
    .packed_bytes = packed_bytes_bf16,
    .pack = pack_bf16_pairs,
    .panel = panel_bf16_dot,
    .rows_without_next = kTileRows,
    .can_stream = true,
};
}

extern const KernelTable kTable_avx512_bf16;
constinit const KernelTable kTable_avx512_bf16 = LLAMA_EXT_ISA_NAMESPACE::make_table(
    "avx512-bf16", LLAMA_EXT_ISA_NAMESPACE::kGemmBf16, "VDPBF16PS, activations rounded to bfloat16",
    LLAMA_EXT_ISA_NAMESPACE::kCodes, LLAMA_EXT_ISA_NAMESPACE::kAttentionBf16Dot);

}  // namespace llama_ext
