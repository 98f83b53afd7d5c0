#include "reference/reference_ops.h"

namespace llama_ext::reference {
namespace {

[[noreturn]] void missing(const char* op) { fail(ErrorKind::kUnsupported, op, ": not on this backend yet"); }

}  // namespace

TensorView ReferenceBackend::values(Matrix&) { missing("values"); }
void ReferenceBackend::copy_rows(Matrix&, const RowMap&, const Matrix&, const RowMap&, int64_t) {
  missing("copy_rows");
}
double ReferenceBackend::sum_of_squares(const TensorView&) { missing("sum_of_squares"); }
void ReferenceBackend::swiglu(const SwigluArgs&) { missing("swiglu"); }
void ReferenceBackend::causal_attention(const CausalAttentionArgs&) { missing("causal_attention"); }
void ReferenceBackend::dropout(const DropoutArgs&) { missing("dropout"); }
void ReferenceBackend::embedding_backward(const EmbeddingBackwardArgs&) { missing("embedding_backward"); }
void ReferenceBackend::matmul_backward(const MatmulBackwardArgs&) { missing("matmul_backward"); }
void ReferenceBackend::rms_norm_backward(const RmsNormBackwardArgs&) { missing("rms_norm_backward"); }
void ReferenceBackend::swiglu_backward(const SwigluBackwardArgs&) { missing("swiglu_backward"); }
void ReferenceBackend::causal_attention_backward(const CausalAttentionBackwardArgs&) {
  missing("causal_attention_backward");
}
void ReferenceBackend::cross_entropy_backward(const CrossEntropyBackwardArgs&) { missing("cross_entropy_backward"); }
void ReferenceBackend::adam(const AdamArgs&) { missing("adam"); }
void ReferenceBackend::sgd(const SgdArgs&) { missing("sgd"); }

}  // namespace llama_ext::reference
