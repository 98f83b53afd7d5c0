// The x86-64-v2 tier: every kernel, compiled for it. Nothing here may use the standard library, nor leave a symbol outside this
// tier's namespace that a linker could hand to other code (tools/check_tier_symbols.py).
#define LLAMA_EXT_ISA_NAMESPACE isa_x86_64_v2

#include "cpu/simd/vec_sse.h"
#include "cpu/kernels/table.h"

namespace llama_ext {

extern const KernelTable kTable_x86_64_v2;
constinit const KernelTable kTable_x86_64_v2 = LLAMA_EXT_ISA_NAMESPACE::make_table(
    "x86-64-v2", LLAMA_EXT_ISA_NAMESPACE::kGemmBf16Exact, "widened to float32", LLAMA_EXT_ISA_NAMESPACE::kCodesExact);

}  // namespace llama_ext
