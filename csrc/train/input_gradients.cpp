#include "train/input_gradients.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "backend/range.h"
#include "core/checked.h"
#include "core/interrupt.h"
#include "model/scaled.h"
#include "train/block_training.h"
#include "train/workspace.h"

namespace llama_ext {
namespace {

// Rows of a pass, unless one sequence alone has more: fewer where their activations would take more memory than the weights, and
// more than 1 GiB. No sequence's bits depend on it.
constexpr int64_t kPassRows = 2048;
constexpr int64_t kLeastPassRows = 64;
constexpr int64_t kActivations = int64_t{1} << 30;

constexpr const char* kOp = "input_gradients";

size_t index(int64_t i) { return static_cast<size_t>(i); }

void check_batch(const Model& model, const EmbeddedBatch& batch, size_t values, const TensorView& d_embeddings) {
  const ModelConfig& config = model.config();
  int64_t total = 0;
  for (size_t i = 0; i < batch.lengths.size(); ++i) {
    const int64_t length = batch.lengths[i];
    require(length >= 1, ErrorKind::kShape, kOp, ": sequence ", i, " must have at least 1 token, got ", length);
    require(length <= config.context, ErrorKind::kContextLength, kOp, ": sequence ", i, " has ", length,
            " tokens, the model's context is ", config.context);
    require(length <= kMostAttentionTokens, ErrorKind::kContextLength, kOp, ": sequence ", i, " has ", length,
            " tokens, attention with gradients takes at most ", kMostAttentionTokens);
    total = checked_add(total, length, "input_gradients: lengths");
  }
  require_dtype(batch.embeddings, DType::kF32, kOp, "embeddings");
  require_shape(batch.embeddings, {total, config.width}, kOp, "embeddings");
  require(batch.embeddings.is_contiguous(), ErrorKind::kShape, kOp, ": embeddings must be contiguous");
  if (d_embeddings) require_shape(d_embeddings, {total, config.width}, kOp, "d_embeddings");
  require(values == batch.terms.size(), ErrorKind::kShape, kOp, ": there are ", batch.terms.size(),
          " terms, but room for ", values, " values");
  int64_t before = 0;
  for (size_t i = 0; i < batch.terms.size(); ++i) {
    const OutputTerm& term = batch.terms[i];
    require(term.row >= before && term.row < total, ErrorKind::kShape, kOp, ": rows must ascend within [0, ", total,
            "), and row ", term.row, " at index ", i, " does not");
    before = term.row;
    require(term.output >= 0 && term.output < config.outputs(), ErrorKind::kTokenId, kOp, ": output ", term.output,
            " at index ", i, " must be in [0, ", config.outputs(), ")");
    require(std::abs(term.weight) <= static_cast<double>(std::numeric_limits<float>::max()), ErrorKind::kOption, kOp,
            ": weights must be finite, and within float32, got ", term.weight);
  }
}

/// Sequences and terms of one pass: [first, last) of each.
struct PassRange {
  size_t first_sequence = 0;
  size_t last_sequence = 0;
  int64_t row = 0;
  int64_t rows = 0;
  size_t first_term = 0;
  size_t last_term = 0;

  int64_t terms() const { return static_cast<int64_t>(last_term - first_term); }
};

int64_t pass_rows(const Model& model) {
  const ModelConfig& config = model.config();
  const int64_t kept = 2 * config.width + config.qkv_size() + config.heads + config.q_size() + 2 * config.ffn_width;
  const int64_t row_bytes = config.layers * kept * static_cast<int64_t>(sizeof(float));
  return std::clamp(std::max(kActivations, model.weights().nbytes()) / row_bytes, kLeastPassRows, kPassRows);
}

/// Whole sequences, until there are enough rows or terms. What no term asks for is left out.
std::vector<PassRange> cut_into_passes(const EmbeddedBatch& batch, int64_t most) {
  std::vector<PassRange> passes;
  PassRange pass;
  const auto end_pass = [&] {
    if (pass.terms() > 0) passes.push_back(pass);
    pass = {.first_sequence = pass.last_sequence,
            .last_sequence = pass.last_sequence,
            .row = pass.row + pass.rows,
            .rows = 0,
            .first_term = pass.last_term,
            .last_term = pass.last_term};
  };
  for (const int64_t length : batch.lengths) {
    if (pass.rows > 0 && (pass.rows + length > most || pass.terms() >= most)) end_pass();
    ++pass.last_sequence;
    pass.rows += length;
    while (pass.last_term < batch.terms.size() && batch.terms[pass.last_term].row < pass.row + pass.rows) {
      ++pass.last_term;
    }
  }
  end_pass();
  return passes;
}

/// One call: the workspace, and the passes through it.
class InputGradientsCall {
 public:
  InputGradientsCall(const Model& model, const Adapter* adapter, const EmbeddedBatch& batch, std::span<double> values,
                     const TensorView& d_embeddings)
      : model_(model),
        backend_(model.backend()),
        adapter_(adapter),
        batch_(batch),
        values_(values),
        d_embeddings_(d_embeddings) {}

  // Operations may still be reading host memory when an exception passes through here.
  ~InputGradientsCall() {
    try {
      backend_.synchronize();
    } catch (...) {  // NOLINT(bugprone-empty-catch): the error that matters is already on its way
    }
  }
  InputGradientsCall(const InputGradientsCall&) = delete;
  InputGradientsCall& operator=(const InputGradientsCall&) = delete;

  void run() {
    for (int64_t most = pass_rows(model_);; most /= 2) {
      const std::vector<PassRange> passes = cut_into_passes(batch_, most);
      if (passes.empty()) return;
      if (!allocate(passes, /*is_last_try=*/most <= kLeastPassRows)) continue;
      for (const PassRange& range : passes) run_pass(range);
      return;
    }
  }

 private:
  /// Memory for the largest pass; false where there is too little of it and smaller passes may be tried.
  bool allocate(const std::vector<PassRange>& passes, bool is_last_try) {
    TrainingWorkspace::Size size{.trains = differentiates()};
    for (const PassRange& range : passes) {
      size.rows = std::max(size.rows, range.rows);
      size.head_rows = std::max(size.head_rows, range.terms());
    }
    try {
      workspace_ = std::make_unique<TrainingWorkspace>(backend_, model_, adapter_, TrainerOptions{}, size);
      return true;
    } catch (const Error& error) {
      if (is_last_try || error.kind() != ErrorKind::kOutOfMemory) throw;
      return false;
    }
  }

  bool differentiates() const { return static_cast<bool>(d_embeddings_); }

  void run_pass(const PassRange& range) {
    const int64_t layers = model_.config().layers;
    const int64_t rows = range.rows;
    const TrainingPass pass = begin_pass(range);
    const TensorView x_out = workspace_->x_out(rows);
    const TensorView source = batch_.embeddings.slice_rows(range.row, rows);
    backend_.copy_to_device(workspace_->saved(0, rows).x.data(), source.data(), index(source.size()) * sizeof(float));
    for (int64_t layer = 0; layer < layers; ++layer) {
      throw_if_interrupted();
      const Range name(backend_, "layer ", layer, " forward");
      block_forward(pass, layer, workspace_->saved(layer, rows),
                    layer + 1 == layers ? x_out : workspace_->saved(layer + 1, rows).x);
    }
    head(pass, range, x_out);
    if (differentiates()) {
      const TensorView d = workspace_->d(rows);
      for (int64_t layer = layers - 1; layer >= 0; --layer) {
        throw_if_interrupted();
        const Range name(backend_, "layer ", layer, " backward");
        block_backward(pass, layer, workspace_->saved(layer, rows), d);
      }
      const TensorView target = d_embeddings_.slice_rows(range.row, rows);
      backend_.copy_to_host(target.data(), d.data(), index(d.size()) * sizeof(float));
    }
    backend_.synchronize();
    store_values(range);
  }

  TrainingPass begin_pass(const PassRange& range) {
    std::vector<RowRange> sequences;
    std::vector<int64_t> positions(index(range.rows));
    int64_t row = 0;
    for (size_t i = range.first_sequence; i < range.last_sequence; ++i) {
      const int64_t length = batch_.lengths[i];
      sequences.push_back({.row = row, .tokens = length});
      std::iota(positions.begin() + row, positions.begin() + row + length, int64_t{0});
      row += length;
    }
    const TensorView cos = workspace_->cos(range.rows);
    const TensorView sin = workspace_->sin(range.rows);
    cos_.resize(index(cos.size()));
    sin_.resize(index(sin.size()));
    model_.angles().copy(positions.data(), range.rows, cos_.data(), sin_.data());
    backend_.copy_to_device(cos.data(), cos_.data(), cos_.size() * sizeof(float));
    backend_.copy_to_device(sin.data(), sin_.data(), sin_.size() * sizeof(float));
    return {.model = &model_,
            .adapter = adapter_,
            .parameters = nullptr,
            .sequences = std::move(sequences),
            .cos = cos,
            .sin = sin,
            .compute = Compute::kExact,
            .dropout = {},
            .scratch = workspace_->scratch(range.rows)};
  }

  /// The values of the terms, a few at a time, and with gradients that of the residual stream.
  void head(const TrainingPass& pass, const PassRange& range, const TensorView& x) {
    const Norm& norm = model_.weights().final_norm();
    const int64_t terms = range.terms();
    const TensorView normed = workspace_->head_x(terms);
    // A row for each term, also where several are of one: each has a gradient of its own, which are added up below.
    for_each_run(range, [&](int64_t term, int64_t row, int64_t count) {
      norm_forward(pass, norm, x.slice_rows(row, count), normed.slice_rows(term, count));
    });
    outputs_.clear();
    for (size_t i = range.first_term; i < range.last_term; ++i) outputs_.push_back(batch_.terms[i].output);
    found_.resize(index(terms));
    const TensorView d_normed = pass.scratch.d_normed;  // only blocks need it
    if (differentiates()) backend_.zero(d_normed);
    for (int64_t first = 0; first < terms; first += workspace_->logits_rows()) {
      throw_if_interrupted();
      const int64_t count = std::min(terms - first, workspace_->logits_rows());
      const TensorView d_part = part_of_head(pass, normed.slice_rows(first, count), first);
      for (int64_t i = 0; differentiates() && i < count; ++i) {
        const OutputTerm& term = batch_.terms[range.first_term + index(first + i)];
        add_scaled(backend_, d_part.slice_rows(i, 1), d_normed.slice_rows(term.row - range.row, 1), term.weight);
      }
    }
    if (!differentiates()) return;
    const TensorView d = workspace_->d(range.rows);
    backend_.zero(d);
    for_each_run(range, [&](int64_t, int64_t row, int64_t count) {
      norm_backward(pass, norm, x.slice_rows(row, count), d_normed.slice_rows(row, count), d.slice_rows(row, count),
                    /*accumulate=*/false, {});
    });
  }

  /// The outputs of the terms from `first` on: their values, and the gradients, without weights, of what the head reads.
  TensorView part_of_head(const TrainingPass& pass, const TensorView& normed, int64_t first) {
    const Matrix& weight = model_.weights().head();
    const int64_t count = normed.rows();
    const TensorView logits = workspace_->logits(count);
    const TensorView outputs(outputs_.data() + first, DType::kI32, {count});
    const TensorView losses = workspace_->losses(first, count);
    const TensorView d_part = differentiates() ? workspace_->d_head_x(count) : TensorView();
    linear_forward(pass, normed, weight, {}, logits, /*accumulate=*/false);
    if (!batch_.logprobs) {
      for (int64_t i = 0; i < count; ++i) {
        const float* logit = logits.f32() + i * logits.row_stride() + outputs_[index(first + i)];
        backend_.copy_to_host(&found_[index(first + i)], logit, sizeof(float));
      }
      // The gradient of a logit is a row of the head.
      if (differentiates()) backend_.embedding({.ids = outputs, .table = &weight, .y = d_part});
      return d_part;
    }
    if (differentiates()) {
      backend_.cross_entropy_backward({.logits = logits, .labels = outputs, .scale = -1.0, .losses = losses});
      input_backward(pass, logits, weight, d_part, /*accumulate=*/false);
    } else {
      backend_.cross_entropy({.logits = logits, .labels = outputs, .losses = losses});
    }
    backend_.copy_to_host(found_.data() + first, losses.data(), index(count) * sizeof(float));
    return d_part;
  }

  /// Calls visit(term of the pass, row of the pass, count) for rows that follow each other and have a term each.
  template <typename Visit>
  void for_each_run(const PassRange& range, const Visit& visit) const {
    for (size_t i = range.first_term; i < range.last_term;) {
      size_t end = i + 1;
      while (end < range.last_term && batch_.terms[end].row == batch_.terms[end - 1].row + 1) ++end;
      visit(static_cast<int64_t>(i - range.first_term), batch_.terms[i].row - range.row, static_cast<int64_t>(end - i));
      i = end;
    }
  }

  void store_values(const PassRange& range) const {
    for (size_t i = range.first_term; i < range.last_term; ++i) {
      const double found = static_cast<double>(found_[i - range.first_term]);
      values_[i] = batch_.logprobs ? -found : found;
      require(std::isfinite(values_[i]), ErrorKind::kNumeric, kOp, ": the output ", batch_.terms[i].output, " of row ",
              batch_.terms[i].row, " is ", values_[i],
              ". Either the weights or the embeddings hold a number that is not finite, or an activation is beyond "
              "float32");
    }
    if (!differentiates()) return;
    const TensorView d = d_embeddings_.slice_rows(range.row, range.rows);
    require(std::all_of(d.f32(), d.f32() + d.size(), [](float x) { return std::isfinite(x); }), ErrorKind::kNumeric,
            kOp, ": a gradient of rows [", range.row, ", ", range.row + range.rows,
            ") is not finite: it is beyond float32");
  }

  const Model& model_;
  Backend& backend_;
  const Adapter* adapter_;
  const EmbeddedBatch& batch_;
  std::span<double> values_;
  TensorView d_embeddings_;
  std::unique_ptr<TrainingWorkspace> workspace_;  // for as many rows as the largest pass
  // Host memory of the pass that is running.
  std::vector<float> cos_;
  std::vector<float> sin_;
  std::vector<int32_t> outputs_;
  std::vector<float> found_;
};

}  // namespace

void input_gradients(const Model& model, const Adapter* adapter, const EmbeddedBatch& batch, std::span<double> values,
                     const TensorView& d_embeddings) {
  require(model.weights().has_separate_gate_up(), ErrorKind::kUnsupported, kOp,
          ": gate and up must be separate matrices. Convert the model");
  if (adapter != nullptr) adapter->require_fits(model.config());
  check_batch(model, batch, values.size(), d_embeddings);
  // Rows that no term asks for.
  if (d_embeddings) std::fill_n(d_embeddings.f32(), d_embeddings.size(), 0.0f);
  InputGradientsCall(model, adapter, batch, values, d_embeddings).run();
}

void embed_tokens(const Model& model, std::span<const int32_t> ids, const TensorView& embeddings) {
  const int64_t count = static_cast<int64_t>(ids.size());
  require_shape(embeddings, {count, model.config().width}, "embed_tokens", "embeddings");
  check_token_ids(ids.data(), count, model.config().vocabulary);
  if (count == 0) return;
  Backend& backend = model.backend();
  const size_t nbytes = static_cast<size_t>(checked_mul(embeddings.size(), sizeof(float), "embed_tokens"));
  const std::unique_ptr<Buffer> memory = backend.allocate(nbytes);
  const TensorView y(memory->data(), DType::kF32, {count, model.config().width});
  backend.embedding({.ids = {ids.data(), DType::kI32, {count}}, .table = &model.weights().embedding(), .y = y});
  backend.copy_to_host(embeddings.data(), y.data(), nbytes);
  backend.synchronize();
}

}  // namespace llama_ext
