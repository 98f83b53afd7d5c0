#include "ops/causal_attention.h"

#include <algorithm>
#include <cmath>
#include <tuple>

#include "ops/argument_checks.h"
#include "ops/dropout.h"

namespace llama_ext {
namespace {

/// What both directions share.
template <typename Args>
void check_inputs(const Args& args, const char* op) {
  require_tensor(args.q, DType::kF32, {-1, -1, -1}, Rows::kStrided, op, "q");
  const int64_t rows = args.q.dim(0);
  const int64_t heads = args.q.dim(1);
  const int64_t dim = args.q.dim(2);
  require_tensor(args.k, DType::kF32, {rows, -1, dim}, Rows::kStrided, op, "k");
  const int64_t kv_heads = args.k.dim(1);
  require_tensor(args.v, DType::kF32, {rows, kv_heads, dim}, Rows::kStrided, op, "v");
  require(kv_heads > 0 && heads % kv_heads == 0, ErrorKind::kShape, op,
          ": the heads of q must be a multiple of those of k, got ", heads, " and ", kv_heads);
  require_tensor(args.y, DType::kF32, {rows, heads, dim}, Rows::kStrided, op, "y");
  require_tensor(args.log_sums, DType::kF32, {rows, heads}, Rows::kContiguous, op, "log_sums");
  require(std::isfinite(static_cast<float>(args.scale)), ErrorKind::kOption, op,
          ": scale must be finite in float32, got ", args.scale);
  require_dropout(args.dropout, op);
  std::vector<RowRange> ranges = args.sequences;
  std::sort(ranges.begin(), ranges.end(), [](const RowRange& a, const RowRange& b) { return a.row < b.row; });
  int64_t end = 0;
  for (const RowRange& range : ranges) {
    // A sequence of no tokens meets no other, wherever it lies.
    const int64_t first = range.tokens == 0 ? 0 : end;
    require(range.tokens >= 0 && range.tokens <= kMostAttentionTokens && range.row >= first &&
                range.row <= rows - range.tokens,
            ErrorKind::kShape, op, ": sequences must be disjoint ranges within ", rows, " rows, of at most ",
            kMostAttentionTokens, " tokens, got rows [", range.row, ", ", range.row, " + ", range.tokens, ")");
    end = std::max(end, range.row + range.tokens);
  }
}

}  // namespace

void check(const CausalAttentionArgs& args) {
  const char* op = "causal_attention";
  check_inputs(args, op);
  require_disjoint(args.y, args.q, op, "y", "q");
  require_disjoint(args.y, args.k, op, "y", "k");
  require_disjoint(args.y, args.v, op, "y", "v");
}

void check(const CausalAttentionBackwardArgs& args) {
  const char* op = "causal_attention_backward";
  check_inputs(args, op);
  require_tensor(args.d_y, DType::kF32, {args.q.dim(0), args.q.dim(1), args.q.dim(2)}, Rows::kStrided, op, "d_y");
  require_tensor(args.d_q, DType::kF32, {args.q.dim(0), args.q.dim(1), args.q.dim(2)}, Rows::kStrided, op, "d_q");
  require_tensor(args.d_k, DType::kF32, {args.k.dim(0), args.k.dim(1), args.k.dim(2)}, Rows::kStrided, op, "d_k");
  require_tensor(args.d_v, DType::kF32, {args.k.dim(0), args.k.dim(1), args.k.dim(2)}, Rows::kStrided, op, "d_v");
  require_same_or_disjoint(args.d_q, args.q, op, "d_q", "q");
  require_same_or_disjoint(args.d_k, args.k, op, "d_k", "k");
  require_same_or_disjoint(args.d_v, args.v, op, "d_v", "v");
  for (const auto& [output, name] :
       {std::pair{&args.d_q, "d_q"}, std::pair{&args.d_k, "d_k"}, std::pair{&args.d_v, "d_v"}}) {
    require_disjoint(*output, args.y, op, name, "y");
    require_disjoint(*output, args.d_y, op, name, "d_y");
    for (const auto& [input, of, input_name] :
         {std::tuple{&args.q, &args.d_q, "q"}, std::tuple{&args.k, &args.d_k, "k"},
          std::tuple{&args.v, &args.d_v, "v"}}) {
      if (of != output) require_disjoint(*output, *input, op, name, input_name);
    }
  }
  require_disjoint(args.d_q, args.d_k, op, "d_q", "d_k");
  require_disjoint(args.d_q, args.d_v, op, "d_q", "d_v");
  require_disjoint(args.d_k, args.d_v, op, "d_k", "d_v");
}

}  // namespace llama_ext
