// The avx512 tier: every kernel, compiled for it. Nothing here may use the standard library, nor leave a symbol outside this
// tier's namespace that a linker could hand to other code (tools/check_tier_symbols.py).
#define LLAMA_EXT_ISA_NAMESPACE isa_avx512

#include "cpu/simd/vec_avx512.h"
#include "cpu/kernels/codes_dot_vnni.h"
#include "cpu/kernels/codes_tile_512.h"
#include "cpu/kernels/gemm_codes.h"
#include "cpu/kernels/table.h"

namespace llama_ext {

extern const KernelTable kTable_avx512;
constinit const KernelTable kTable_avx512 =
    LLAMA_EXT_ISA_NAMESPACE::make_table("avx512", LLAMA_EXT_ISA_NAMESPACE::kGemmBf16Exact, "widened to float32",
                                        LLAMA_EXT_ISA_NAMESPACE::kCodes, LLAMA_EXT_ISA_NAMESPACE::kAttentionBf16Exact);

}  // namespace llama_ext
