#include "train/block_training.h"

#include <cmath>

#include "model/scaled.h"

namespace llama_ext {
namespace {

// Places with dropout, of each layer.
enum Site : int {
  kAttention,
  kAttentionBranch,
  kFeedForwardBranch,
  kAdapterInputs,
  kSites = kAdapterInputs + kTargetCount
};

TensorView columns(const TensorView& x, int64_t begin, int64_t count) {
  return {x.f32() + begin, DType::kF32, {x.rows(), count}, x.row_stride()};
}

TensorView head_view(const TensorView& x, int64_t begin, int64_t heads, int64_t dim) {
  return {x.f32() + begin, DType::kF32, {x.rows(), heads, dim}, x.row_stride()};
}

/// The first `count` columns' worth of memory, contiguous.
TensorView part_of(const TensorView& scratch, int64_t rows, int64_t count) {
  return {scratch.data(), DType::kF32, {rows, count}};
}

Backend& backend_of(const TrainingPass& pass) { return pass.model->backend(); }

/// Where the gradient of a matrix is added up, or none when it is frozen; and of a vector.
Matrix* gradient_of(const TrainingPass& pass, const Matrix* matrix) {
  return pass.parameters == nullptr ? nullptr : pass.parameters->gradient_of(matrix);
}
TensorView gradient_of(const TrainingPass& pass, const TensorView& vector) {
  return pass.parameters == nullptr ? TensorView() : pass.parameters->gradient_of(vector);
}

/// Q, K and V within the fused rows.
struct Heads {
  TensorView q;
  TensorView k;
  TensorView v;
};

Heads split_heads(const TrainingPass& pass, const TensorView& qkv) {
  const ModelConfig& config = pass.model->config();
  return {head_view(qkv, 0, config.heads, config.head_dim),
          head_view(qkv, config.q_size(), config.kv_heads, config.head_dim),
          head_view(qkv, config.q_size() + config.kv_size(), config.kv_heads, config.head_dim)};
}

/// Q and K, whose heads follow each other, at once.
void rotate(const TrainingPass& pass, const TensorView& qkv, bool inverse) {
  const ModelConfig& config = pass.model->config();
  backend_of(pass).rope({.x = head_view(qkv, 0, config.heads + config.kv_heads, config.head_dim),
                         .cos = pass.cos,
                         .sin = pass.sin,
                         .inverse = inverse});
}

double attention_scale(const TrainingPass& pass) {
  return 1.0 / std::sqrt(static_cast<double>(pass.model->config().head_dim));
}

const LowRank* low_rank_of(const TrainingPass& pass, int64_t layer, Target target) {
  if (pass.adapter == nullptr) return nullptr;
  const LowRank& part = pass.adapter->part(layer, target);
  return part ? &part : nullptr;
}

/// What an adapter's product reads: x, or x with dropout.
TensorView adapter_input(const TrainingPass& pass, int64_t layer, Target target, const TensorView& x) {
  if (pass.dropout.adapter == 0.0) return x;
  const TensorView dropped = part_of(pass.scratch.dropped, x.rows(), x.dim(1));
  backend_of(pass).dropout({.x = x,
                            .y = dropped,
                            .p = pass.dropout.adapter,
                            .seed = place_seed(pass, layer, kAdapterInputs + static_cast<int>(target))});
  return dropped;
}

void adapter_forward(const TrainingPass& pass, int64_t layer, Target target, const TensorView& x, const TensorView& y) {
  const LowRank* part = low_rank_of(pass, layer, target);
  if (part == nullptr) return;
  add_low_rank(backend_of(pass), *part, adapter_input(pass, layer, target, x), y, pass.scratch.low_rank);
}

void adapter_backward(const TrainingPass& pass, int64_t layer, Target target, const TensorView& d_y,
                      const TensorView& x, const TensorView& d_x) {
  const LowRank* part = low_rank_of(pass, layer, target);
  if (part == nullptr) return;
  Backend& backend = backend_of(pass);
  const TensorView input = adapter_input(pass, layer, target, x);
  const TensorView inner = part_of(pass.scratch.low_rank, x.rows(), part->a->rows());
  const TensorView d_inner = part_of(pass.scratch.d_low_rank, x.rows(), part->a->rows());
  backend.matmul({.x = input, .weight = part->a.get(), .bias = {}, .y = inner, .compute = Compute::kExact});
  set_scaled(backend, inner, inner, part->scale);
  backend.matmul_backward(
      {.d_y = d_y, .weight = part->b.get(), .x = inner, .d_x = d_inner, .d_weight = gradient_of(pass, part->b.get())});
  set_scaled(backend, d_inner, d_inner, part->scale);
  const bool drops = pass.dropout.adapter > 0.0;
  const TensorView d_input = drops ? part_of(pass.scratch.d_dropped, x.rows(), x.dim(1)) : d_x;
  backend.matmul_backward({.d_y = d_inner,
                           .weight = part->a.get(),
                           .x = input,
                           .d_x = d_input,
                           .accumulate = !drops,
                           .d_weight = gradient_of(pass, part->a.get())});
  if (!drops) return;
  backend.dropout({.x = d_input,
                   .y = d_x,
                   .p = pass.dropout.adapter,
                   .seed = place_seed(pass, layer, kAdapterInputs + static_cast<int>(target)),
                   .accumulate = true});
}

/// stream = before + dropout(x W^T + b + what the adapter adds). `before` may be `stream`.
void add_branch(const TrainingPass& pass, int64_t layer, Target target, int site, const TensorView& x,
                const Linear& linear, const TensorView& before, const TensorView& stream) {
  Backend& backend = backend_of(pass);
  if (before.data() != stream.data()) set_scaled(backend, before, stream);
  if (pass.dropout.residual == 0.0) {
    linear_forward(pass, x, *linear.weight, linear.bias, stream, /*accumulate=*/true);
    adapter_forward(pass, layer, target, x, stream);
    return;
  }
  const TensorView& branch = pass.scratch.branch;
  linear_forward(pass, x, *linear.weight, linear.bias, branch, /*accumulate=*/false);
  adapter_forward(pass, layer, target, x, branch);
  backend.dropout({.x = branch,
                   .y = stream,
                   .p = pass.dropout.residual,
                   .seed = place_seed(pass, layer, site),
                   .accumulate = true});
}

/// The gradient of a branch, from that of the stream it joined.
TensorView branch_gradient(const TrainingPass& pass, int64_t layer, int site, const TensorView& d) {
  if (pass.dropout.residual == 0.0) return d;
  backend_of(pass).dropout(
      {.x = d, .y = pass.scratch.branch, .p = pass.dropout.residual, .seed = place_seed(pass, layer, site)});
  return pass.scratch.branch;
}

void attention_backward(const TrainingPass& pass, int64_t layer, const Saved& saved, const TensorView& d) {
  const ModelConfig& config = pass.model->config();
  const BlockWeights& weights = pass.model->weights().block(layer);
  const BlockScratch& scratch = pass.scratch;
  Backend& backend = backend_of(pass);

  const Deferred* deferred = pass.deferred;
  if (deferred != nullptr) set_scaled(backend, d, deferred->d_middle);
  const TensorView d_branch = branch_gradient(pass, layer, kAttentionBranch, d);
  linear_backward(pass, d_branch, saved.attended, *weights.o.weight, weights.o.bias, scratch.d_heads, false);
  adapter_backward(pass, layer, Target::kO, d_branch, saved.attended, scratch.d_heads);

  const auto [q, k, v] = split_heads(pass, saved.qkv);
  const auto as_heads = [&](const TensorView& x) { return head_view(x, 0, config.heads, config.head_dim); };
  backend.causal_attention_backward({.sequences = pass.sequences,
                                     .q = q,
                                     .k = k,
                                     .v = v,
                                     .scale = attention_scale(pass),
                                     .y = as_heads(saved.attended),
                                     .log_sums = saved.log_sums,
                                     .d_y = as_heads(scratch.d_heads),
                                     .d_q = q,
                                     .d_k = k,
                                     .d_v = v,
                                     .dropout = pass.dropout.attention,
                                     .seed = place_seed(pass, layer, kAttention),
                                     .compute = pass.compute});
  rotate(pass, saved.qkv, /*inverse=*/true);

  const TensorView& normed = deferred != nullptr ? deferred->attention_normed : scratch.normed;
  norm_forward(pass, weights.attention_norm, saved.x, normed);
  bool accumulate = false;
  for (const Projection& part : weights.qkv) {
    linear_backward(pass, columns(saved.qkv, part.begin, part.linear.weight->rows()), normed, *part.linear.weight,
                    part.linear.bias, scratch.d_normed, accumulate);
    accumulate = true;
  }
  const int64_t k_begin = config.q_size();
  const int64_t v_begin = k_begin + config.kv_size();
  adapter_backward(pass, layer, Target::kQ, columns(saved.qkv, 0, config.q_size()), normed, scratch.d_normed);
  adapter_backward(pass, layer, Target::kK, columns(saved.qkv, k_begin, config.kv_size()), normed, scratch.d_normed);
  adapter_backward(pass, layer, Target::kV, columns(saved.qkv, v_begin, config.kv_size()), normed, scratch.d_normed);
  norm_backward(pass, weights.attention_norm, saved.x, scratch.d_normed, d, /*accumulate=*/true,
                deferred != nullptr ? deferred->d_attention_norm : gradient_of(pass, weights.attention_norm.weight));
}

void feed_forward_backward(const TrainingPass& pass, int64_t layer, const Saved& saved, const TensorView& d) {
  const BlockWeights& weights = pass.model->weights().block(layer);
  const BlockScratch& scratch = pass.scratch;
  Backend& backend = backend_of(pass);

  const Deferred* deferred = pass.deferred;
  if (deferred != nullptr) set_scaled(backend, d, deferred->d_out);
  const TensorView& wide = deferred != nullptr ? deferred->wide : scratch.wide;
  const TensorView d_branch = branch_gradient(pass, layer, kFeedForwardBranch, d);
  // The activation once more, for the gradients of what it was multiplied by: together with its own, unless an adapter is first.
  const bool adapts = low_rank_of(pass, layer, Target::kDown) != nullptr;
  if (adapts) backend.swiglu({.gate = saved.gate, .up = saved.up, .y = wide});
  input_backward(pass, d_branch, *weights.down.weight, scratch.d_wide, /*accumulate=*/false);
  adapter_backward(pass, layer, Target::kDown, d_branch, wide, scratch.d_wide);
  backend.swiglu_backward({.gate = saved.gate,
                           .up = saved.up,
                           .d_y = scratch.d_wide,
                           .d_gate = saved.gate,
                           .d_up = saved.up,
                           .y = adapts ? TensorView() : wide});
  if (deferred == nullptr) weight_backward(pass, d_branch, wide, *weights.down.weight, weights.down.bias);

  const TensorView& normed = deferred != nullptr ? deferred->ffn_normed : scratch.normed;
  norm_forward(pass, weights.ffn_norm, saved.middle, normed);
  linear_backward(pass, saved.gate, normed, *weights.gate.weight, weights.gate.bias, scratch.d_normed, false);
  linear_backward(pass, saved.up, normed, *weights.up.weight, weights.up.bias, scratch.d_normed, true);
  adapter_backward(pass, layer, Target::kGate, saved.gate, normed, scratch.d_normed);
  adapter_backward(pass, layer, Target::kUp, saved.up, normed, scratch.d_normed);
  norm_backward(pass, weights.ffn_norm, saved.middle, scratch.d_normed, d, /*accumulate=*/true,
                deferred != nullptr ? deferred->d_ffn_norm : gradient_of(pass, weights.ffn_norm.weight));
}

}  // namespace

uint64_t place_seed(const TrainingPass& pass, int64_t layer, int site) {
  return dropout_seed(pass.seed, static_cast<uint64_t>((layer + 1) * kSites + site));
}

void norm_forward(const TrainingPass& pass, const Norm& norm, const TensorView& x, const TensorView& y) {
  backend_of(pass).rms_norm(
      {.x = x, .weight = norm.weight, .eps = pass.model->config().norm_eps, .y = y, .inv_rms = {}});
}

void norm_backward(const TrainingPass& pass, const Norm& norm, const TensorView& x, const TensorView& d_y,
                   const TensorView& d_x, bool accumulate, const TensorView& d_weight) {
  backend_of(pass).rms_norm_backward({.x = x,
                                      .weight = norm.weight,
                                      .eps = pass.model->config().norm_eps,
                                      .d_y = d_y,
                                      .d_x = d_x,
                                      .accumulate = accumulate,
                                      .d_weight = d_weight});
}

void linear_forward(const TrainingPass& pass, const TensorView& x, const Matrix& weight, const TensorView& bias,
                    const TensorView& y, bool accumulate) {
  backend_of(pass).matmul(
      {.x = x, .weight = &weight, .bias = bias, .y = y, .accumulate = accumulate, .compute = pass.compute});
}

void input_backward(const TrainingPass& pass, const TensorView& d_y, const Matrix& weight, const TensorView& d_x,
                    bool accumulate) {
  if (pass.transposed != nullptr) {
    backend_of(pass).matmul({.x = d_y,
                             .weight = pass.transposed->at(&weight).get(),
                             .bias = {},
                             .y = d_x,
                             .accumulate = accumulate,
                             .compute = Compute::kExact});
    return;
  }
  backend_of(pass).matmul_backward(
      {.d_y = d_y, .weight = &weight, .d_x = d_x, .accumulate = accumulate, .compute = pass.compute});
}

MatmulBackwardArgs weight_gradient(const TrainingPass& pass, const TensorView& d_y, const TensorView& x,
                                   const Matrix& weight, const TensorView& bias) {
  return {.d_y = d_y,
          .weight = nullptr,
          .x = x,
          .d_weight = gradient_of(pass, &weight),
          .d_bias = gradient_of(pass, bias),
          .compute = pass.compute};
}

void weight_backward(const TrainingPass& pass, const TensorView& d_y, const TensorView& x, const Matrix& weight,
                     const TensorView& bias) {
  if (pass.parameters == nullptr) return;
  backend_of(pass).matmul_backward(weight_gradient(pass, d_y, x, weight, bias));
}

void linear_backward(const TrainingPass& pass, const TensorView& d_y, const TensorView& x, const Matrix& weight,
                     const TensorView& bias, const TensorView& d_x, bool accumulate) {
  input_backward(pass, d_y, weight, d_x, accumulate);
  if (pass.deferred == nullptr) weight_backward(pass, d_y, x, weight, bias);
}

void block_forward(const TrainingPass& pass, int64_t layer, const Saved& saved, const TensorView& next,
                   bool recompute) {
  const ModelConfig& config = pass.model->config();
  const BlockWeights& weights = pass.model->weights().block(layer);
  const BlockScratch& scratch = pass.scratch;
  Backend& backend = backend_of(pass);

  norm_forward(pass, weights.attention_norm, saved.x, scratch.normed);
  for (const Projection& part : weights.qkv) {
    linear_forward(pass, scratch.normed, *part.linear.weight, part.linear.bias,
                   columns(saved.qkv, part.begin, part.linear.weight->rows()), /*accumulate=*/false);
  }
  const int64_t k_begin = config.q_size();
  const int64_t v_begin = k_begin + config.kv_size();
  adapter_forward(pass, layer, Target::kQ, scratch.normed, columns(saved.qkv, 0, config.q_size()));
  adapter_forward(pass, layer, Target::kK, scratch.normed, columns(saved.qkv, k_begin, config.kv_size()));
  adapter_forward(pass, layer, Target::kV, scratch.normed, columns(saved.qkv, v_begin, config.kv_size()));

  const auto [q, k, v] = split_heads(pass, saved.qkv);
  rotate(pass, saved.qkv, /*inverse=*/false);
  backend.causal_attention({.sequences = pass.sequences,
                            .q = q,
                            .k = k,
                            .v = v,
                            .scale = attention_scale(pass),
                            .y = head_view(saved.attended, 0, config.heads, config.head_dim),
                            .log_sums = saved.log_sums,
                            .dropout = pass.dropout.attention,
                            .seed = place_seed(pass, layer, kAttention),
                            .compute = pass.compute});
  add_branch(pass, layer, Target::kO, kAttentionBranch, saved.attended, weights.o, saved.x, saved.middle);

  norm_forward(pass, weights.ffn_norm, saved.middle, scratch.normed);
  linear_forward(pass, scratch.normed, *weights.gate.weight, weights.gate.bias, saved.gate, /*accumulate=*/false);
  adapter_forward(pass, layer, Target::kGate, scratch.normed, saved.gate);
  linear_forward(pass, scratch.normed, *weights.up.weight, weights.up.bias, saved.up, /*accumulate=*/false);
  adapter_forward(pass, layer, Target::kUp, scratch.normed, saved.up);
  if (recompute) return;
  backend.swiglu({.gate = saved.gate, .up = saved.up, .y = scratch.wide});
  add_branch(pass, layer, Target::kDown, kFeedForwardBranch, scratch.wide, weights.down, saved.middle, next);
}

void block_backward(const TrainingPass& pass, int64_t layer, const Saved& saved, const TensorView& d) {
  feed_forward_backward(pass, layer, saved, d);
  attention_backward(pass, layer, saved, d);
}

void block_weights_backward(const TrainingPass& pass, int64_t layer, const Saved& saved, const Deferred& deferred) {
  const BlockWeights& weights = pass.model->weights().block(layer);
  std::vector<MatmulBackwardArgs> all;
  const auto add = [&](const TensorView& d_y, const TensorView& x, const Linear& linear) {
    all.push_back(weight_gradient(pass, d_y, x, *linear.weight, linear.bias));
  };
  // What was written last first, as it is the nearest.
  for (const Projection& part : weights.qkv) {
    add(columns(saved.qkv, part.begin, part.linear.weight->rows()), deferred.attention_normed, part.linear);
  }
  add(deferred.d_middle, saved.attended, weights.o);
  add(saved.gate, deferred.ffn_normed, weights.gate);
  add(saved.up, deferred.ffn_normed, weights.up);
  add(deferred.d_out, deferred.wide, weights.down);
  // A bias' gradient is the sum of rows, and so are these.
  const auto add_rows = [&](const TensorView& parts, const Norm& norm) {
    all.push_back({.d_y = parts, .weight = nullptr, .d_bias = gradient_of(pass, norm.weight)});
  };
  add_rows(deferred.d_attention_norm, weights.attention_norm);
  add_rows(deferred.d_ffn_norm, weights.ffn_norm);
  backend_of(pass).weights_backward(all);
}

}  // namespace llama_ext
