// The amx tier: every kernel, compiled for it. Nothing here may use the standard library, nor leave a symbol outside this
// tier's namespace that a linker could hand to other code (tools/check_tier_symbols.py).
#define LLAMA_EXT_ISA_NAMESPACE isa_amx

#include "cpu/simd/vec_avx512.h"
#include "cpu/kernels/codes_dot_vnni.h"
#include "cpu/kernels/codes_tile_512.h"
#include "cpu/kernels/gemm.h"
#include "cpu/kernels/gemm_amx.h"
#include "cpu/kernels/gemm_codes.h"
#include "cpu/kernels/table.h"

namespace llama_ext {

namespace LLAMA_EXT_ISA_NAMESPACE {
static constexpr GemmKernel kGemmBf16 = {kAmxRows, 256, 8, packed_bytes_bf16, pack_amx, panel_amx};
}

extern const KernelTable kTable_amx;
constinit const KernelTable kTable_amx = LLAMA_EXT_ISA_NAMESPACE::make_table(
    "amx", LLAMA_EXT_ISA_NAMESPACE::kGemmBf16, "AMX tiles, activations rounded to bfloat16",
    LLAMA_EXT_ISA_NAMESPACE::kCodes, LLAMA_EXT_ISA_NAMESPACE::kAttentionBf16Exact);

}  // namespace llama_ext
