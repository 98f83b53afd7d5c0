#include "train/trainer.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "backend/range.h"
#include "core/checked.h"
#include "core/interrupt.h"
#include "model/scaled.h"
#include "train/workspace.h"

namespace llama_ext {
namespace {

// Tokens of a pass. Of a small model, which goes in parts, as many as leave what is kept for backward in an L3 cache, but enough
// sequences for eight threads.
constexpr int64_t kPassTokens = 2048;
constexpr int64_t kKeptInCache = int64_t{12} << 20;
constexpr int64_t kLeastPassTokens = 512;
constexpr size_t kLeastPassSequences = 8;
// On a device with memory of its own more, as each pass rounds, reads and adds to all weights once more: as many as activations may
// take memory, four times that of the weights or 4 GiB.
constexpr int64_t kPassTokensOnDevice = 8192;
constexpr int64_t kActivationsOnDevice = int64_t{4} << 30;

void check_batch(const ModelConfig& config, const TrainingBatch& batch) {
  int64_t total = 0;
  for (size_t i = 0; i < batch.lengths.size(); ++i) {
    const int64_t length = batch.lengths[i];
    require(length >= 1, ErrorKind::kShape, "train: sequence ", i, " must have at least 1 token, got ", length);
    require(length <= config.context && length <= kMostAttentionTokens, ErrorKind::kContextLength, "train: sequence ",
            i, " has ", length, " tokens, the model's context is ", config.context);
    total = checked_add(total, length, "train: lengths");
  }
  require(total == static_cast<int64_t>(batch.tokens.size()) && batch.labels.size() == batch.tokens.size(),
          ErrorKind::kShape, "train: the lengths sum to ", total, ", but there are ", batch.tokens.size(),
          " tokens and ", batch.labels.size(), " labels");
  check_token_ids(batch.tokens.data(), total, config.vocabulary);
  for (size_t i = 0; i < batch.labels.size(); ++i) {
    const int32_t label = batch.labels[i];
    require(label == kIgnoreLabel || (label >= 0 && label < config.outputs()), ErrorKind::kTokenId, "train: label ",
            label, " at index ", i, " must be in [0, ", config.outputs(), ") or ", kIgnoreLabel, " (ignored)");
  }
}

std::shared_ptr<Model> checked_model(std::shared_ptr<Model> model, const Adapter* adapter) {
  require(model != nullptr, ErrorKind::kInternal, "train: there is no model");
  require(model->weights().block(0).gate.weight != nullptr, ErrorKind::kUnsupported,
          "train: gate and up must be separate matrices. Convert the model");
  if (adapter != nullptr) adapter->require_fits(model->config());
  return model;
}

Trainable what_is_trained(const Trainable& wanted, const Adapter* adapter) {
  if (adapter == nullptr || !wanted.all) return wanted;
  return {.all = false, .slots = {}};
}

const TrainerOptions& checked(const TrainerOptions& options) {
  check(options.optimizer);
  require_dropout(options.dropout.residual, "train");
  require_dropout(options.dropout.attention, "train");
  require_dropout(options.dropout.adapter, "train");
  return options;
}

/// Rows that follow each other and have a label each.
struct Run {
  int64_t row = 0;
  int64_t rows = 0;
};

std::vector<Run> labelled_runs(std::span<const int32_t> labels) {
  std::vector<Run> runs;
  for (int64_t row = 0; row < static_cast<int64_t>(labels.size()); ++row) {
    if (labels[static_cast<size_t>(row)] == kIgnoreLabel) continue;
    if (!runs.empty() && runs.back().row + runs.back().rows == row) {
      ++runs.back().rows;
    } else {
      runs.push_back({row, 1});
    }
  }
  return runs;
}

}  // namespace

Trainer::Trainer(std::shared_ptr<Model> model, std::shared_ptr<Adapter> adapter, const TrainerOptions& options)
    : model_(checked_model(std::move(model), adapter.get())),
      adapter_(std::move(adapter)),
      options_(checked(options)),
      parameters_(*model_, adapter_.get(), what_is_trained(options.trainable, adapter_.get()),
                  [&](bool is_block_matrix) { return moment_names(options.optimizer, is_block_matrix).size(); }),
      muon_(options.optimizer.kind == OptimizerKind::kMuon
                ? std::make_unique<Muon>(model_->backend(), parameters_, options_.compute)
                : nullptr),
      goes_in_parts_(model_->backend().shares_host_memory() && adapter_ == nullptr &&
                     options_.compute == Compute::kExact && !options_.checkpoint_activations &&
                     options_.dropout.residual == 0.0 && options_.dropout.attention == 0.0 &&
                     may_go_in_parts(*model_)) {}

Trainer::~Trainer() = default;

void Trainer::set_steps(int64_t steps) {
  require(steps >= 0, ErrorKind::kOption, "train: steps must be at least 0, got ", steps);
  steps_ = steps;
}

int64_t Trainer::nbytes() const {
  int64_t total = parameters_.nbytes() + (workspace_ ? workspace_->nbytes() : 0) + (muon_ ? muon_->nbytes() : 0);
  for (const auto& [weight, transposed] : transposed_) total += transposed->nbytes();
  return total;
}

int64_t Trainer::pass_tokens() const {
  const ModelConfig& config = model_->config();
  const int64_t kept = 2 * config.width + config.qkv_size() + config.heads + config.q_size() + 2 * config.ffn_width;
  const int64_t layer_floats = options_.checkpoint_activations ? config.width : kept;
  const int64_t token_bytes = std::max<int64_t>(1, config.layers * layer_floats) * static_cast<int64_t>(sizeof(float));
  if (goes_in_parts_) {
    // Whole numbers of the least, so that threads have as many parts each.
    const int64_t least = kLeastPassTokens;
    return std::clamp(kKeptInCache / token_bytes / least * least, least, kPassTokens);
  }
  if (model_->backend().shares_host_memory()) return kPassTokens;
  const int64_t memory = std::max(kActivationsOnDevice, 4 * model_->weights().nbytes());
  return std::clamp(memory / token_bytes, kPassTokens, kPassTokensOnDevice);
}

LossSum Trainer::accumulate(const TrainingBatch& batch, double scale, uint64_t seed) {
  require(std::isfinite(scale), ErrorKind::kOption, "train: scale must be finite, got ", scale);
  return run(batch, /*trains=*/true, scale, seed);
}

LossSum Trainer::evaluate(const TrainingBatch& batch) { return run(batch, /*trains=*/false, 1.0, 0); }

void Trainer::step(double lr, double gradient_scale) {
  require(std::isfinite(lr) && std::isfinite(gradient_scale), ErrorKind::kOption,
          "train: lr and gradient_scale must be finite, got ", lr, " and ", gradient_scale);
  // Whatever happens: what is left of these gradients must not join those of the next batch.
  const auto clear = [&] {
    const InterruptScope to_the_end(nullptr);
    parameters_.zero_gradients();
  };
  try {
    optimizer_step(model_->backend(), options_.optimizer, parameters_, muon_.get(), steps_ + 1, lr, gradient_scale);
  } catch (...) {
    clear();
    throw;
  }
  ++steps_;
  clear();
}

LossSum Trainer::run(const TrainingBatch& batch, bool trains, double scale, uint64_t seed) {
  check_batch(model_->config(), batch);
  is_transposed_ = false;  // the weights may be others than in the last batch
  LossSum sum;
  size_t first = 0;
  int64_t token = 0;
  const int64_t most = pass_tokens();
  const auto limit = [&](size_t sequences) {
    return goes_in_parts_ && sequences < kLeastPassSequences ? kPassTokens : most;
  };
  for (uint64_t pass = 0; first < batch.lengths.size(); ++pass) {
    // Whole sequences, until there are enough tokens.
    size_t last = first;
    int64_t tokens = 0;
    while (last < batch.lengths.size() && (last == first || tokens + batch.lengths[last] <= limit(last - first))) {
      tokens += batch.lengths[last++];
    }
    const TrainingBatch part{.tokens = batch.tokens.subspan(static_cast<size_t>(token), static_cast<size_t>(tokens)),
                             .labels = batch.labels.subspan(static_cast<size_t>(token), static_cast<size_t>(tokens)),
                             .lengths = batch.lengths.subspan(first, last - first)};
    const LossSum one = run_pass(part, trains, scale, dropout_seed(seed, pass));
    sum.loss += one.loss;
    sum.counted += one.counted;
    sum.correct += one.correct;
    first = last;
    token += tokens;
  }
  require(std::isfinite(sum.loss), ErrorKind::kNumeric, "train: the loss is ", sum.loss,
          ". Weights or activations have grown beyond float32: try a lower learning rate, a warmup, or clip_norm");
  return sum;
}

LossSum Trainer::run_pass(const TrainingBatch& batch, bool trains, double scale, uint64_t seed) {
  const ModelConfig& config = model_->config();
  Backend& backend = model_->backend();
  const int64_t rows = static_cast<int64_t>(batch.tokens.size());
  int64_t counted = 0;
  for (const int32_t label : batch.labels) counted += label == kIgnoreLabel ? 0 : 1;
  if (counted == 0) return {};

  std::vector<RowRange> sequences;
  for (int64_t row = 0; const int64_t length : batch.lengths) {
    sequences.push_back({.row = row, .tokens = length});
    row += length;
  }
  const std::vector<PassPart> parts = goes_in_parts_ ? pass_parts(sequences) : std::vector<PassPart>{};
  const TrainingWorkspace::Size size{
      .rows = rows, .head_rows = counted, .parts = static_cast<int64_t>(parts.size()), .trains = trains};
  if (!workspace_ || !workspace_->size().fits(size)) {
    TrainingWorkspace::Size larger = size;
    if (workspace_) {
      larger.rows = std::max(larger.rows, workspace_->size().rows);
      larger.head_rows = std::max(larger.head_rows, workspace_->size().head_rows);
      larger.parts = std::max(larger.parts, workspace_->size().parts);
      larger.trains = larger.trains || workspace_->size().trains;
    }
    workspace_.reset();
    workspace_ = std::make_unique<TrainingWorkspace>(backend, *model_, adapter_.get(), options_, larger);
  }
  const TrainingWorkspace& workspace = *workspace_;

  TrainingPass pass{.model = model_.get(),
                    .adapter = adapter_.get(),
                    .parameters = &parameters_,
                    .sequences = std::move(sequences),
                    .cos = workspace.cos(rows),
                    .sin = workspace.sin(rows),
                    .compute = options_.compute,
                    .dropout = trains ? options_.dropout : DropoutRates{},
                    .seed = seed,
                    .scratch = workspace.scratch(rows)};
  set_angles(pass);

  const TensorView ids(batch.tokens.data(), DType::kI32, {rows});
  const TensorView x_out = workspace.x_out(rows);
  TensorView x = workspace.saved(0, rows).x;
  backend.embedding({.ids = ids, .table = &model_->weights().embedding(), .y = x});
  if (pass.dropout.residual > 0.0) {
    backend.dropout({.x = x, .y = x, .p = pass.dropout.residual, .seed = place_seed(pass, -1, 0)});
  }
  // Scratch of a part: its thread's own, so that it stays in the cache, or, with very many threads, at the part's own rows.
  int64_t most = 0;
  for (const PassPart& part : parts) most = std::max(most, part.rows);
  const bool by_worker = most * backend.threads() <= rows;
  const auto for_each_part = [&](const auto& function) {
    backend.for_each_part(static_cast<int64_t>(parts.size()), [&](int64_t index, int worker) {
      const PassPart& part = parts[static_cast<size_t>(index)];
      function(pass_of(pass, part, by_worker ? worker * most : part.row), part, index);
    });
  };
  const auto forward_rows = [&](const TrainingPass& of, int64_t row, int64_t count) {
    for (int64_t layer = 0; layer < config.layers; ++layer) {
      throw_if_interrupted();
      const Range range(backend, "layer ", layer, " forward");
      const TensorView next = layer + 1 == config.layers ? x_out : workspace.saved(layer + 1, rows).x;
      block_forward(of, layer, saved_of(workspace.saved(layer, rows), row, count), next.slice_rows(row, count));
    }
  };
  if (parts.empty()) {
    forward_rows(pass, 0, rows);
  } else {
    for_each_part(
        [&](const TrainingPass& of, const PassPart& part, int64_t) { forward_rows(of, part.row, part.rows); });
  }
  x = x_out;
  const TensorView d = trains ? workspace.d(rows) : TensorView();
  LossSum sum = head(pass, batch, x, trains, scale, d);
  if (trains && !parts.empty() && !is_transposed_) {
    transpose_blocks(*model_, transposed_);
    is_transposed_ = true;
  }
  for (int64_t layer = config.layers - 1; trains && layer >= 0; --layer) {
    throw_if_interrupted();
    const Range range(backend, "layer ", layer, " backward");
    const Saved saved = workspace.saved(layer, rows);
    if (!parts.empty()) {
      const Deferred deferred = workspace.deferred(rows, static_cast<int64_t>(parts.size()));
      backend.zero(deferred.d_attention_norm);
      backend.zero(deferred.d_ffn_norm);
      for_each_part([&](TrainingPass of, const PassPart& part, int64_t index) {
        const Deferred its = deferred_of(deferred, part, index);
        of.deferred = &its;
        of.transposed = &transposed_;
        block_backward(of, layer, saved_of(saved, part.row, part.rows), d.slice_rows(part.row, part.rows));
      });
      block_weights_backward(pass, layer, saved, deferred);
      continue;
    }
    if (options_.checkpoint_activations) block_forward(pass, layer, saved, x_out, /*recompute=*/true);
    block_backward(pass, layer, saved, d);
  }
  Matrix* d_table = trains ? parameters_.gradient_of(&model_->weights().embedding()) : nullptr;
  if (d_table != nullptr) {
    if (pass.dropout.residual > 0.0) {
      backend.dropout({.x = d, .y = d, .p = pass.dropout.residual, .seed = place_seed(pass, -1, 0)});
    }
    backend.embedding_backward({.ids = ids, .d_y = d, .d_table = d_table});
  }
  if (trains || !backend.shares_host_memory()) read_losses(sum, !trains);
  backend.synchronize();  // the batch is the caller's
  return sum;
}

/// The angles of the pass's rows. Every sequence starts at position 0, and those of a position are computed once.
void Trainer::set_angles(const TrainingPass& pass) {
  Backend& backend = model_->backend();
  const ModelConfig& config = model_->config();
  const int64_t half = config.head_dim / 2;
  int64_t longest = 0;
  for (const RowRange& sequence : pass.sequences) longest = std::max(longest, sequence.tokens);
  if (static_cast<int64_t>(cos_.size()) < longest * half) {
    std::vector<int64_t> positions(static_cast<size_t>(longest));
    std::iota(positions.begin(), positions.end(), int64_t{0});
    cos_.resize(static_cast<size_t>(longest * half));
    sin_.resize(static_cast<size_t>(longest * half));
    rope_angles(config.rope, model_->inverse_frequencies(), positions.data(), longest, cos_.data(), sin_.data());
  }
  pass_cos_.clear();
  pass_sin_.clear();
  for (const RowRange& sequence : pass.sequences) {
    pass_cos_.insert(pass_cos_.end(), cos_.begin(), cos_.begin() + sequence.tokens * half);
    pass_sin_.insert(pass_sin_.end(), sin_.begin(), sin_.begin() + sequence.tokens * half);
  }
  backend.copy_to_device(pass.cos.data(), pass_cos_.data(), pass_cos_.size() * sizeof(float));
  backend.copy_to_device(pass.sin.data(), pass_sin_.data(), pass_sin_.size() * sizeof(float));
}

/// The losses of the rows that have labels; with `trains` the gradient of the residual stream in d, and those of head and norm. Logits are
/// made, used and turned into their gradients a few rows at a time.
LossSum Trainer::head(const TrainingPass& pass, const TrainingBatch& batch, const TensorView& x, bool trains,
                      double scale, const TensorView& d) {
  Backend& backend = model_->backend();
  const Weights& weights = model_->weights();
  const Matrix& head = weights.head();
  const std::vector<Run> runs = labelled_runs(batch.labels);
  std::vector<int32_t>& labels = labels_;
  labels.clear();
  int64_t gathered = 0;
  for (const Run& run : runs) gathered += run.rows;
  const TensorView normed = workspace_->head_x(gathered);
  gathered = 0;
  for (const Run& run : runs) {
    norm_forward(pass, weights.final_norm(), x.slice_rows(run.row, run.rows), normed.slice_rows(gathered, run.rows));
    gathered += run.rows;
    const auto begin = batch.labels.begin() + run.row;
    labels.insert(labels.end(), begin, begin + run.rows);
  }
  LossSum sum{.loss = 0.0, .counted = gathered, .correct = 0};
  std::vector<LogSumExp> sums;
  for (int64_t row = 0; row < gathered; row += workspace_->logits_rows()) {
    throw_if_interrupted();
    const int64_t count = std::min(gathered - row, workspace_->logits_rows());
    const TensorView part = normed.slice_rows(row, count);
    const TensorView logits = workspace_->logits(count);
    linear_forward(pass, part, head, {}, logits, /*accumulate=*/false);
    if (!trains && !backend.shares_host_memory()) {
      backend.cross_entropy({.logits = logits,
                             .labels = {labels.data() + row, DType::kI32, {count}},
                             .losses = workspace_->losses(row, count),
                             .hits = workspace_->hits(row, count)});
      continue;
    }
    if (!trains) {
      // Both the loss and the most likely label, from one reading.
      sums.resize(static_cast<size_t>(count));
      backend.log_sum_exp({.logits = logits, .out = sums.data()});
      for (int64_t i = 0; i < count; ++i) {
        const int32_t label = labels[static_cast<size_t>(row + i)];
        sum.loss += sums[static_cast<size_t>(i)].value - static_cast<double>(logits.row<float>(i)[label]);
        sum.correct += sums[static_cast<size_t>(i)].argmax == label ? 1 : 0;
      }
      continue;
    }
    backend.cross_entropy_backward({.logits = logits,
                                    .labels = {labels.data() + row, DType::kI32, {count}},
                                    .scale = scale,
                                    .losses = workspace_->losses(row, count)});
    // Their gradient takes the place of the normed rows, which nothing needs after this part's product.
    const TensorView d_part = workspace_->d_head_x(count);
    linear_backward(pass, logits, part, head, {}, d_part, /*accumulate=*/false);
    set_scaled(backend, d_part, part);
  }
  if (!trains) return sum;
  if (gathered < x.rows()) backend.zero(d);
  gathered = 0;
  for (const Run& run : runs) {
    norm_backward(pass, weights.final_norm(), x.slice_rows(run.row, run.rows), normed.slice_rows(gathered, run.rows),
                  d.slice_rows(run.row, run.rows), /*accumulate=*/false,
                  parameters_.gradient_of(weights.final_norm().weight));
    gathered += run.rows;
  }
  return sum;
}

/// The sum of the losses that head() left on the device, and how often the most likely label was right.
void Trainer::read_losses(LossSum& sum, bool has_hits) {
  Backend& backend = model_->backend();
  std::vector<float> losses(static_cast<size_t>(sum.counted));
  std::vector<float> hits(has_hits ? losses.size() : 0);
  backend.copy_to_host(losses.data(), workspace_->losses(0, sum.counted).data(), losses.size() * sizeof(float));
  if (has_hits) backend.copy_to_host(hits.data(), workspace_->hits(0, sum.counted).data(), hits.size() * sizeof(float));
  backend.synchronize();
  for (const float loss : losses) sum.loss += static_cast<double>(loss);
  for (const float hit : hits) sum.correct += hit == 1.0f ? 1 : 0;
}

}  // namespace llama_ext
