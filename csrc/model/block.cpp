#include "model/block.h"

#include <algorithm>
#include <cmath>

#include "backend/range.h"
#include "model/scaled.h"

namespace llama_ext {
namespace {

/// Columns [begin, begin + heads * D) of the fused projection, seen as (M, heads, D).
TensorView head_slice(const Model& model, const TensorView& qkv, int64_t begin, int64_t heads) {
  return {qkv.f32() + begin, DType::kF32, {qkv.rows(), heads, model.config().head_dim}, qkv.row_stride()};
}

/// y = x W^T + b, or y += x W^T + b; x normalised first, where a norm is given.
MatmulArgs projection(const Model& model, const TensorView& x, const InputNorm& norm, const Linear& linear,
                      const TensorView& y, bool accumulate) {
  MatmulArgs args;
  args.x = x;
  args.weight = linear.weight.get();
  args.bias = linear.bias;
  args.y = y;
  args.accumulate = accumulate;
  args.compute = model.compute();
  args.norm = norm;
  return args;
}

void project(const Model& model, const TensorView& x, const InputNorm& norm, const Linear& linear, const TensorView& y,
             bool accumulate) {
  model.backend().matmul(projection(model, x, norm, linear, y, accumulate));
}

/// Of attended = softmax(Q K^T / sqrt(D)) V over each sequence's cache, which gets this pass's keys and values first.
struct SelfAttention {
  KvStoreArgs store;
  AttentionArgs attention;
};

SelfAttention self_attention(const Model& model, int64_t layer, const Pass& pass) {
  const ModelConfig& config = model.config();

  const TensorView q = head_slice(model, pass.qkv, 0, config.heads);
  SelfAttention args;
  args.store = {.segments = pass.segments,
                .layer = layer,
                .k = head_slice(model, pass.qkv, config.q_size(), config.kv_heads),
                .v = head_slice(model, pass.qkv, config.q_size() + config.kv_size(), config.kv_heads),
                .q = q,
                .cos = pass.cos,
                .sin = pass.sin};

  AttentionArgs& attention = args.attention;
  attention.segments = pass.segments;
  attention.q = q;
  attention.layer = layer;
  attention.compute = model.compute();
  attention.scale = 1.0 / std::sqrt(static_cast<double>(config.head_dim));
  attention.y = TensorView(pass.attended.data(), DType::kF32, {pass.attended.rows(), config.heads, config.head_dim});
  return args;
}

/// x += SwiGLU(norm(x))
void feed_forward(const Model& model, const BlockWeights& weights, const TensorView& x) {
  FeedForwardArgs args;
  args.x = x;
  args.gate_up = weights.gate_up.weight.get();
  args.gate_up_bias = weights.gate_up.bias;
  args.gate = weights.gate.weight.get();
  args.gate_bias = weights.gate.bias;
  args.up = weights.up.weight.get();
  args.up_bias = weights.up.bias;
  args.down = weights.down.weight.get();
  args.down_bias = weights.down.bias;
  args.y = x;
  args.accumulate = true;
  args.compute = model.compute();
  args.norm = input_norm(model, weights.ffn_norm);
  model.backend().feed_forward(args);
}

/// What the rows' adapters add to a product of x.
void add_adapters(const Model& model, int64_t layer, const Pass& pass, Target target, const TensorView& x,
                  const TensorView& y) {
  for (const AdapterRows& rows : pass.adapters) {
    const LowRank& part = rows.adapter->part(layer, target);
    if (!part) continue;
    add_low_rank(model.backend(), part, x.slice_rows(rows.row, rows.rows), y.slice_rows(rows.row, rows.rows),
                 pass.low_rank.slice_rows(rows.row, rows.rows));
  }
}

TensorView columns(const TensorView& x, int64_t begin, int64_t count) {
  return {x.f32() + begin, DType::kF32, {x.rows(), count}, x.row_stride()};
}

/// qkv = normed W^T + b, and what adapters add.
void project_qkv(const Model& model, int64_t layer, const Pass& pass) {
  const ModelConfig& config = model.config();
  for (const Projection& part : model.weights().block(layer).qkv) {
    project(model, pass.normed, {}, part.linear, columns(pass.qkv, part.begin, part.linear.weight->rows()), false);
  }
  const int64_t k_begin = config.q_size();
  const int64_t v_begin = k_begin + config.kv_size();
  add_adapters(model, layer, pass, Target::kQ, pass.normed, columns(pass.qkv, 0, config.q_size()));
  add_adapters(model, layer, pass, Target::kK, pass.normed, columns(pass.qkv, k_begin, config.kv_size()));
  add_adapters(model, layer, pass, Target::kV, pass.normed, columns(pass.qkv, v_begin, config.kv_size()));
}

/// gate, up = normed W^T + b, and what adapters add.
void project_gate_up(const Model& model, int64_t layer, const Pass& pass) {
  const BlockWeights& weights = model.weights().block(layer);
  if (weights.gate_up.weight != nullptr) {
    project(model, pass.normed, {}, weights.gate_up, pass.gate_up, /*accumulate=*/false);
    const int64_t width = model.config().ffn_width;
    for (int64_t begin = 0; begin < width; begin += kGateGroup) {
      const int64_t count = std::min(kGateGroup, width - begin);
      model.backend().copy(columns(pass.gate, begin, count), columns(pass.gate_up, 2 * begin, count));
      model.backend().copy(columns(pass.up, begin, count), columns(pass.gate_up, 2 * begin + kGateGroup, count));
    }
    return;  // adapters need the two apart
  }
  project(model, pass.normed, {}, weights.gate, pass.gate, /*accumulate=*/false);
  add_adapters(model, layer, pass, Target::kGate, pass.normed, pass.gate);
  project(model, pass.normed, {}, weights.up, pass.up, /*accumulate=*/false);
  add_adapters(model, layer, pass, Target::kUp, pass.normed, pass.up);
}

/// The same block product by product, so that adapters can add to each.
void block_with_adapters(const Model& model, int64_t layer, const Pass& pass) {
  const BlockWeights& weights = model.weights().block(layer);
  normalize(model, pass.x, weights.attention_norm, pass.normed);
  project_qkv(model, layer, pass);
  const SelfAttention args = self_attention(model, layer, pass);
  model.backend().attend(args.store, args.attention);
  project(model, pass.attended, {}, weights.o, pass.x, /*accumulate=*/true);
  add_adapters(model, layer, pass, Target::kO, pass.attended, pass.x);

  normalize(model, pass.x, weights.ffn_norm, pass.normed);
  project_gate_up(model, layer, pass);
  model.backend().swiglu({.gate = pass.gate, .up = pass.up, .y = pass.gate});
  project(model, pass.gate, {}, weights.down, pass.x, /*accumulate=*/true);
  add_adapters(model, layer, pass, Target::kDown, pass.gate, pass.x);
}

/// x += y W^T + b and what adapters add. Who wants to see the sum gets it computed by itself, once more: added to x at once, it is
/// rounded as in a pass that nobody looks at, and so are the rows that nobody changes.
void add_to_residual(const Model& model, int64_t layer, const Pass& pass, Site site, const TensorView& y,
                     const Linear& linear, Target target) {
  std::vector<RowRun> changed;
  if (pass.observation->wants(site, layer)) {
    project(model, y, {}, linear, pass.added, /*accumulate=*/false);
    add_adapters(model, layer, pass, target, y, pass.added);
    changed = pass.observation->show(site, layer, pass.added);
  }
  const TensorView& before = pass.normed;  // memory that is free: this half of the block has read it
  if (!changed.empty()) model.backend().copy(before, pass.x);
  project(model, y, {}, linear, pass.x, /*accumulate=*/true);
  add_adapters(model, layer, pass, target, y, pass.x);
  for (const RowRun& run : changed) {
    const TensorView rows = pass.x.slice_rows(run.begin, run.count);
    model.backend().copy(rows, before.slice_rows(run.begin, run.count));
    add_scaled(model.backend(), pass.added.slice_rows(run.begin, run.count), rows);
  }
}

/// The same block once more, which stops wherever there is something to see. The same bits, unless something is changed, as those of
/// feed_forward() and of its products one by one are.
void block_observed(const Model& model, int64_t layer, const Pass& pass) {
  const BlockWeights& weights = model.weights().block(layer);
  const ModelConfig& config = model.config();
  Backend& backend = model.backend();
  const int64_t k_begin = config.q_size();
  const int64_t v_begin = k_begin + config.kv_size();
  const auto show = [&](Site site, const TensorView& values) { pass.observation->show(site, layer, values); };

  show(Site::kResidualBefore, pass.x);
  normalize(model, pass.x, weights.attention_norm, pass.normed);
  show(Site::kAttentionNorm, pass.normed);
  project_qkv(model, layer, pass);
  show(Site::kQ, columns(pass.qkv, 0, config.q_size()));
  show(Site::kK, columns(pass.qkv, k_begin, config.kv_size()));
  show(Site::kV, columns(pass.qkv, v_begin, config.kv_size()));
  for (const TensorView& x :
       {head_slice(model, pass.qkv, 0, config.heads), head_slice(model, pass.qkv, k_begin, config.kv_heads)}) {
    backend.rope({.x = x, .cos = pass.cos, .sin = pass.sin});
  }
  show(Site::kRotatedQ, columns(pass.qkv, 0, config.q_size()));
  show(Site::kRotatedK, columns(pass.qkv, k_begin, config.kv_size()));
  SelfAttention args = self_attention(model, layer, pass);
  args.store.q = args.store.cos = args.store.sin = {};  // q and k are rotated
  backend.attend(args.store, args.attention);
  show(Site::kAttended, pass.attended);
  add_to_residual(model, layer, pass, Site::kAttentionOut, pass.attended, weights.o, Target::kO);
  show(Site::kResidualMiddle, pass.x);

  if (pass.adapters.empty() && !pass.observation->wants_any(layer, Site::kFeedForwardNorm, Site::kFeedForwardOut)) {
    feed_forward(model, weights, pass.x);
    return show(Site::kResidualAfter, pass.x);
  }
  normalize(model, pass.x, weights.ffn_norm, pass.normed);
  show(Site::kFeedForwardNorm, pass.normed);
  project_gate_up(model, layer, pass);
  show(Site::kGate, pass.gate);
  show(Site::kUp, pass.up);
  backend.swiglu({.gate = pass.gate, .up = pass.up, .y = pass.gate});
  show(Site::kActivation, pass.gate);
  add_to_residual(model, layer, pass, Site::kFeedForwardOut, pass.gate, weights.down, Target::kDown);
  show(Site::kResidualAfter, pass.x);
}

}  // namespace

InputNorm input_norm(const Model& model, const Norm& norm) {
  return {.weight = norm.weight, .eps = model.config().norm_eps};
}

void normalize(const Model& model, const TensorView& x, const Norm& norm, const TensorView& y) {
  model.backend().rms_norm({.x = x, .weight = norm.weight, .eps = model.config().norm_eps, .y = y, .inv_rms = {}});
}

void block(const Model& model, int64_t layer, const Pass& pass) {
  const Range range(model.backend(), "layer ", layer);
  if (pass.observation != nullptr && pass.observation->wants_any(layer)) return block_observed(model, layer, pass);
  if (!pass.adapters.empty()) return block_with_adapters(model, layer, pass);
  const BlockWeights& weights = model.weights().block(layer);

  const InputNorm norm = input_norm(model, weights.attention_norm);
  for (const Projection& part : weights.qkv) {
    project(model, pass.x, norm, part.linear, columns(pass.qkv, part.begin, part.linear.weight->rows()), false);
  }
  const SelfAttention args = self_attention(model, layer, pass);
  model.backend().attend_and_project(args.store, args.attention,
                                     projection(model, pass.attended, {}, weights.o, pass.x, /*accumulate=*/true));

  feed_forward(model, weights, pass.x);
}

}  // namespace llama_ext
