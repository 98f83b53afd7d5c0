// The avx2-vnni tier: every kernel, compiled for it. Nothing here may use the standard library, nor leave a symbol outside this
// tier's namespace that a linker could hand to other code (tools/check_tier_symbols.py).
#define LLAMA_EXT_ISA_NAMESPACE isa_avx2_vnni

#include "cpu/simd/vec_avx2.h"
#include "cpu/kernels/codes_dot_vnni.h"
#include "cpu/kernels/codes_tile_256.h"
#include "cpu/kernels/gemm_codes.h"
#include "cpu/kernels/table.h"

namespace llama_ext {

extern const KernelTable kTable_avx2_vnni;
constinit const KernelTable kTable_avx2_vnni =
    LLAMA_EXT_ISA_NAMESPACE::make_table("avx2-vnni", LLAMA_EXT_ISA_NAMESPACE::kGemmBf16Exact, "widened to float32",
                                        LLAMA_EXT_ISA_NAMESPACE::kCodes, LLAMA_EXT_ISA_NAMESPACE::kAttentionBf16Exact);

}  // namespace llama_ext
