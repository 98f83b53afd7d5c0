#include "ops/log_sum_exp.h"

#include <cmath>
#include <limits>

#include "ops/argument_checks.h"

namespace llama_ext {
namespace {

int64_t plain_argmax(const float* logits, int64_t size) {
  int64_t best = 0;
  for (int64_t i = 0; i < size; ++i) {
    if (!(logits[i] <= std::numeric_limits<float>::max())) return -1;
    if (logits[i] > logits[best]) best = i;
  }
  return best;
}

double plain_exp_sum(const float* logits, int64_t size, float largest) {
  return exp_sum_in_lanes(logits, size, largest);
}

void plain_weights(double* x, int64_t size, double largest, double temperature) {
  weights_in_place(x, size, largest, temperature);
}

}  // namespace

const LogitsLoops kPlainLogitsLoops = {plain_argmax, plain_exp_sum, plain_weights};

void check(const LogSumExpArgs& args) {
  require_tensor(args.logits, DType::kF32, {-1, -1}, Rows::kStrided, "log_sum_exp", "logits");
  require(args.logits.dim(1) > 0, ErrorKind::kShape, "log_sum_exp: rows of logits must not be empty");
  require(args.out != nullptr || args.logits.rows() == 0, ErrorKind::kInternal, "log_sum_exp: out is missing");
}

LogSumExp log_sum_exp_on_host(const float* logits, int64_t size, std::string_view op, const LogitsLoops& loops) {
  const int64_t argmax = loops.argmax(logits, size);
  if (argmax < 0) {
    for (int64_t token = 0; token < size; ++token) {
      require(logits[token] <= std::numeric_limits<float>::max(), ErrorKind::kNumeric, op, ": the logit of token ",
              token, " is ", logits[token], ". Are the weights corrupt, or too large for their dtype?");
    }
  }
  const float largest = logits[argmax];
  require(largest > -std::numeric_limits<float>::infinity(), ErrorKind::kNumeric, op,
          ": every logit is -inf, so there is no token to choose");
  return {argmax, static_cast<double>(largest) + std::log(loops.exp_sum(logits, size, largest))};
}

}  // namespace llama_ext
