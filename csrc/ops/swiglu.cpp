#include "ops/swiglu.h"

#include "ops/argument_checks.h"

namespace llama_ext {

void check(const SwigluArgs& args) {
  const char* op = "swiglu";
  require_tensor(args.gate, DType::kF32, {-1, -1}, Rows::kStrided, op, "gate");
  const int64_t rows = args.gate.dim(0);
  const int64_t width = args.gate.dim(1);
  require_tensor(args.up, DType::kF32, {rows, width}, Rows::kStrided, op, "up");
  require_tensor(args.y, DType::kF32, {rows, width}, Rows::kStrided, op, "y");
  require_same_or_disjoint(args.y, args.gate, op, "y", "gate");
  require_same_or_disjoint(args.y, args.up, op, "y", "up");
}

void check(const SwigluBackwardArgs& args) {
  const char* op = "swiglu_backward";
  require_tensor(args.gate, DType::kF32, {-1, -1}, Rows::kStrided, op, "gate");
  const int64_t rows = args.gate.dim(0);
  const int64_t width = args.gate.dim(1);
  require_tensor(args.up, DType::kF32, {rows, width}, Rows::kStrided, op, "up");
  require_tensor(args.d_y, DType::kF32, {rows, width}, Rows::kStrided, op, "d_y");
  require_tensor(args.d_gate, DType::kF32, {rows, width}, Rows::kStrided, op, "d_gate");
  require_tensor(args.d_up, DType::kF32, {rows, width}, Rows::kStrided, op, "d_up");
  require_same_or_disjoint(args.d_gate, args.gate, op, "d_gate", "gate");
  require_disjoint(args.d_gate, args.up, op, "d_gate", "up");
  require_disjoint(args.d_gate, args.d_y, op, "d_gate", "d_y");
  require_same_or_disjoint(args.d_up, args.up, op, "d_up", "up");
  require_disjoint(args.d_up, args.gate, op, "d_up", "gate");
  require_disjoint(args.d_up, args.d_y, op, "d_up", "d_y");
  require_disjoint(args.d_up, args.d_gate, op, "d_up", "d_gate");
  if (args.y || args.y.rank() != 0) {
    require_tensor(args.y, DType::kF32, {rows, width}, Rows::kStrided, op, "y");
    require_same_or_disjoint(args.y, args.d_y, op, "y", "d_y");
    for (const auto& [other, name] : {std::pair{&args.gate, "gate"}, std::pair{&args.up, "up"},
                                      std::pair{&args.d_gate, "d_gate"}, std::pair{&args.d_up, "d_up"}}) {
      require_disjoint(args.y, *other, op, "y", name);
    }
  }
}

}  // namespace llama_ext
