#include "ops/sample_next.h"

#include "ops/argument_checks.h"

namespace llama_ext {

void check(const SampleNextArgs& args) {
  const char* op = "sample_next";
  require(args.options != nullptr, ErrorKind::kInternal, op, ": options are missing");
  require_tensor(args.logits, DType::kF32, {-1, -1}, Rows::kContiguous, op, "logits");
  const int64_t rows = args.logits.rows();
  const int64_t vocabulary = args.logits.dim(1);
  require(vocabulary > 0, ErrorKind::kShape, op, ": rows of logits must not be empty");
  check(*args.options, vocabulary);
  require_tensor(args.tokens, DType::kI32, {rows}, Rows::kContiguous, op, "tokens");
  require_tensor(args.positions, DType::kI32, {rows}, Rows::kContiguous, op, "positions");
  require(rows == 0 || (args.rows != nullptr && args.results != nullptr && args.slots > 0), ErrorKind::kInternal, op,
          ": rows or results are missing");
  if (!args.options->logit_bias.empty()) require_vector(args.bias, vocabulary, op, "bias");
  if (has_penalties(*args.options)) {
    require_tensor(args.occurrences, DType::kI32, {rows, vocabulary}, Rows::kContiguous, op, "occurrences");
  }
}

}  // namespace llama_ext
