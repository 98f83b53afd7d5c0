#include "ops/embedding.h"

#include "ops/argument_checks.h"

namespace llama_ext {

void check(const EmbeddingArgs& args) {
  const Matrix& table = require_present(args.table, "embedding", "table");
  require_tensor(args.ids, DType::kI32, {-1}, Rows::kContiguous, "embedding", "ids");
  require_tensor(args.y, DType::kF32, {args.ids.rows(), table.cols()}, Rows::kContiguous, "embedding", "y");
  require_disjoint(args.y, args.ids, "embedding", "y", "ids");
  if (!args.live_ids) check_token_ids(static_cast<const int32_t*>(args.ids.data()), args.ids.rows(), table.rows());
}

void check_token_ids(const int32_t* ids, int64_t count, int64_t vocabulary) {
  for (int64_t i = 0; i < count; ++i) {
    require(ids[i] >= 0 && ids[i] < vocabulary, ErrorKind::kTokenId, "token id ", ids[i], " at index ", i,
            " is out of range: the vocabulary has ", vocabulary,
            " tokens, ids start at 0. Was the text encoded with another model's tokenizer?");
  }
}

void check(const EmbeddingBackwardArgs& args) {
  const char* op = "embedding_backward";
  const Matrix& table = require_present(args.d_table, op, "d_table");
  require(table.type() == WeightType{Encoding::kF32}, ErrorKind::kDType, op, ": d_table must be float32, got ",
          table.type().text());
  require_tensor(args.ids, DType::kI32, {-1}, Rows::kContiguous, op, "ids");
  require_tensor(args.d_y, DType::kF32, {args.ids.rows(), table.cols()}, Rows::kContiguous, op, "d_y");
  check_token_ids(static_cast<const int32_t*>(args.ids.data()), args.ids.rows(), table.rows());
}

}  // namespace llama_ext
