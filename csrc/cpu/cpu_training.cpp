#include "cpu/cpu_backend_internal.h"

namespace llama_ext {
namespace {

[[noreturn]] void missing(const char* op) { fail(ErrorKind::kUnsupported, op, ": not on this backend yet"); }

}  // namespace

TensorView CpuBackend::values(Matrix&) { missing("values"); }
void CpuBackend::copy_rows(Matrix&, const RowMap&, const Matrix&, const RowMap&, int64_t) { missing("copy_rows"); }
double CpuBackend::sum_of_squares(const TensorView&) { missing("sum_of_squares"); }
void CpuBackend::swiglu(const SwigluArgs&) { missing("swiglu"); }
void CpuBackend::causal_attention(const CausalAttentionArgs&) { missing("causal_attention"); }
void CpuBackend::dropout(const DropoutArgs&) { missing("dropout"); }
void CpuBackend::embedding_backward(const EmbeddingBackwardArgs&) { missing("embedding_backward"); }
void CpuBackend::matmul_backward(const MatmulBackwardArgs&) { missing("matmul_backward"); }
void CpuBackend::rms_norm_backward(const RmsNormBackwardArgs&) { missing("rms_norm_backward"); }
void CpuBackend::swiglu_backward(const SwigluBackwardArgs&) { missing("swiglu_backward"); }
void CpuBackend::causal_attention_backward(const CausalAttentionBackwardArgs&) { missing("causal_attention_backward"); }
void CpuBackend::cross_entropy_backward(const CrossEntropyBackwardArgs&) { missing("cross_entropy_backward"); }
void CpuBackend::adam(const AdamArgs&) { missing("adam"); }
void CpuBackend::sgd(const SgdArgs&) { missing("sgd"); }

}  // namespace llama_ext
