#include "reference/reference_ops.h"
#include "reference/storage.h"

namespace llama_ext::reference {

void ReferenceBackend::embedding(const EmbeddingArgs& args) {
  check(args);
  const ReferenceMatrix& table = own(*args.table, "embedding");
  const int32_t* ids = static_cast<const int32_t*>(args.ids.data());
  for (int64_t t = 0; t < args.ids.rows(); ++t) {
    for (int64_t c = 0; c < table.cols(); ++c) {
      args.y.row<float>(t)[c] =
          static_cast<float>(load_element(table.data(), table.dtype(), ids[t] * table.cols() + c));
    }
  }
}

}  // namespace llama_ext::reference
