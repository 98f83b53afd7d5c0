#include <map>
#include <vector>

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

void ReferenceBackend::embedding_backward(const EmbeddingBackwardArgs& args) {
  check(args);
  const ReferenceMatrix& d_table = own(*args.d_table, "embedding_backward");
  const int64_t width = d_table.cols();
  const int32_t* ids = static_cast<const int32_t*>(args.ids.data());
  // Ids may be few and the table large, so that the sums of all its rows would cost more than the operation.
  std::map<int32_t, std::vector<double>> sums;
  for (int64_t t = 0; t < args.ids.rows(); ++t) {
    std::vector<double>& sum = sums[ids[t]];
    if (sum.empty()) {
      sum.resize(static_cast<size_t>(width));
      d_table.load_row(ids[t], sum.data());
    }
    const float* d_y = args.d_y.row<float>(t);
    for (int64_t c = 0; c < width; ++c) sum[static_cast<size_t>(c)] += static_cast<double>(d_y[c]);
  }
  for (const auto& [id, sum] : sums) {
    for (int64_t c = 0; c < width; ++c) {
      store_element(d_table.data(), d_table.dtype(), id * width + c, sum[static_cast<size_t>(c)]);
    }
  }
}

}  // namespace llama_ext::reference
