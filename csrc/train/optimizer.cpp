#include "train/optimizer.h"

#include <algorithm>
#include <cmath>

#include "core/interrupt.h"

namespace llama_ext {

void check(const OptimizerOptions& options) {
  const auto fraction = [](double value, const char* name) {
    require(value >= 0.0 && value < 1.0, ErrorKind::kOption, "optimizer: ", name, " must be in [0, 1), got ", value);
  };
  fraction(options.beta1, "beta1");
  fraction(options.beta2, "beta2");
  fraction(options.momentum, "momentum");
  require(std::isfinite(options.eps) && options.eps >= 0.0, ErrorKind::kOption,
          "optimizer: eps must be at least 0, got ", options.eps);
  require(std::isfinite(options.weight_decay) && options.weight_decay >= 0.0, ErrorKind::kOption,
          "optimizer: weight_decay must be at least 0, got ", options.weight_decay);
  require(!options.nesterov || options.momentum > 0.0 || options.kind == OptimizerKind::kMuon, ErrorKind::kOption,
          "optimizer: nesterov needs a momentum");
}

std::vector<std::string> moment_names(const OptimizerOptions& options, bool is_block_matrix) {
  if (options.kind == OptimizerKind::kMuon && is_block_matrix) return {"velocity"};
  if (options.kind != OptimizerKind::kSgd) return {"first", "second"};
  if (options.momentum > 0.0) return {"velocity"};
  return {};
}

void optimizer_step(Backend& backend, const OptimizerOptions& options, Parameters& parameters, Muon* muon, int64_t step,
                    double lr, double gradient_scale) {
  std::vector<bool> is_directed(parameters.all().size(), false);
  if (options.kind == OptimizerKind::kMuon) is_directed = muon->set_directions(options, parameters, gradient_scale);
  const InterruptScope to_the_end(nullptr);  // weights of two steps would be worse than a moment's patience
  for (size_t i = 0; i < parameters.all().size(); ++i) {
    const Parameter& parameter = parameters.all()[i];
    const double decay = options.decay_all || parameter.is_matrix() ? options.weight_decay : 0.0;
    if (is_directed[i]) {
      backend.sgd({.parameter = parameter.value, .gradient = parameter.gradient, .lr = lr, .decay = decay});
    } else if (options.kind == OptimizerKind::kSgd) {
      backend.sgd({.parameter = parameter.value,
                   .gradient = parameter.gradient,
                   .velocity = parameter.moments.empty() ? TensorView() : parameter.moments[0],
                   .gradient_scale = gradient_scale,
                   .lr = lr,
                   .momentum = options.momentum,
                   .decay = decay,
                   .nesterov = options.nesterov});
    } else {
      backend.adam({.parameter = parameter.value,
                    .gradient = parameter.gradient,
                    .first = parameter.moments[0],
                    .second = parameter.moments[1],
                    .gradient_scale = gradient_scale,
                    .lr = lr,
                    .beta1 = options.beta1,
                    .beta2 = options.beta2,
                    .eps = options.eps,
                    .decay = decay,
                    .decoupled = options.kind != OptimizerKind::kAdam,
                    .step = step});
    }
  }
  backend.synchronize();
}

}  // namespace llama_ext
