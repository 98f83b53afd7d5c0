#include "model/transformer.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <utility>

#include "backend/range.h"
#include "core/checked.h"
#include "core/interrupt.h"
#include "model/block.h"
#include "model/workspace.h"

namespace llama_ext {
namespace {

// Angles are kept of positions up to this one: a context is a number in a file, and may be any.
constexpr int64_t kAnglesKept = int64_t{1} << 18;

/// Tokens [begin, begin + count) of a chunk, as rows of one pass.
struct Part {
  size_t chunk = 0;
  int64_t begin = 0;
  int64_t count = 0;
};

int64_t rows_asked(LogitsRows logits, int64_t count) {
  switch (logits) {
    case LogitsRows::kNone:
      return 0;
    case LogitsRows::kLast:
      return std::min<int64_t>(count, 1);
    case LogitsRows::kAll:
      return count;
  }
  return 0;
}

/// Rows of logits of a part: always its last ones.
int64_t rows_asked(const Chunk& chunk, const Part& part) {
  const bool ends_chunk = part.begin + part.count == chunk.count;
  if (chunk.logits == LogitsRows::kLast && !ends_chunk) return 0;
  return rows_asked(chunk.logits, part.count);
}

void check_chunks(const Model& model, const std::vector<Chunk>& chunks, const float* logits) {
  const ModelConfig& config = model.config();
  std::vector<const KvCache*> caches;
  caches.reserve(chunks.size());
  for (const Chunk& chunk : chunks) {
    require(chunk.cache != nullptr && chunk.count >= 0 && chunk.position >= 0 &&
                (chunk.tokens != nullptr || chunk.count == 0),
            ErrorKind::kInternal, "forward: a chunk needs a cache, tokens, and a position of at least 0");
    const KvCacheShape& shape = chunk.cache->shape();
    require(shape.layers == config.layers && shape.kv_heads == config.kv_heads && shape.head_dim == config.head_dim,
            ErrorKind::kShape, "forward: the KV cache was made for another model");
    require(chunk.count <= shape.capacity && chunk.position <= shape.capacity - chunk.count, ErrorKind::kContextLength,
            "forward: ", chunk.count, " tokens after ", chunk.position, " do not fit into the KV cache's ",
            shape.capacity, " positions");
    check_token_ids(chunk.tokens, chunk.count, config.vocabulary);
    if (chunk.adapter != nullptr) {
      chunk.adapter->require_fits(config);
      require(model.weights().has_separate_gate_up(), ErrorKind::kUnsupported,
              "forward: an adapter needs a model whose gate and up are separate matrices");
    }
    caches.push_back(chunk.cache);
  }
  std::sort(caches.begin(), caches.end());
  require(std::adjacent_find(caches.begin(), caches.end()) == caches.end(), ErrorKind::kInternal,
          "forward: two chunks of one batch share a KV cache");
  require(logits != nullptr || logits_rows(chunks) == 0, ErrorKind::kInternal,
          "forward: there is no room for the logits");
}

/// Cuts and packs the chunks into passes of at most `pass_rows` rows. The parts of a chunk come in order, so the keys and
/// values of a part are stored in every layer before the next part asks for them.
std::vector<std::vector<Part>> cut_into_passes(const std::vector<Chunk>& chunks, int64_t pass_rows) {
  std::vector<std::vector<Part>> passes;
  int64_t room = 0;
  for (size_t i = 0; i < chunks.size(); ++i) {
    for (int64_t begin = 0; begin < chunks[i].count;) {
      if (room == 0) {
        passes.emplace_back();
        room = pass_rows;
      }
      const int64_t count = std::min(room, chunks[i].count - begin);
      passes.back().push_back({.chunk = i, .begin = begin, .count = count});
      begin += count;
      room -= count;
    }
  }
  return passes;
}

/// Neighbours of one adapter are multiplied together.
void add_rows(std::vector<AdapterRows>& all, const Adapter* adapter, int64_t row, int64_t rows) {
  if (!all.empty() && all.back().adapter == adapter && all.back().row + all.back().rows == row) {
    all.back().rows += rows;
  } else {
    all.push_back({.adapter = adapter, .row = row, .rows = rows});
  }
}

bool is_finite(float value) { return (std::bit_cast<uint32_t>(value) & 0x7f800000u) != 0x7f800000u; }

/// The first entry that is not finite, or -1. The common case is one branch-free sweep.
int64_t find_not_finite(const float* row, int64_t count) {
  bool all_finite = true;
  for (int64_t i = 0; i < count; ++i) all_finite &= is_finite(row[i]);
  if (all_finite) return -1;
  return std::find_if_not(row, row + count, is_finite) - row;
}

/// One call of forward(): the workspace, and the passes through it.
class ForwardCall {
 public:
  ForwardCall(const Model& model, const std::vector<Chunk>& chunks, float* logits, const ObservedPass& observed = {})
      : model_(model),
        backend_(model.backend()),
        chunks_(chunks),
        logits_(logits),
        observed_(observed),
        observation_(observed.observation) {}

  // Operations may still be reading the host vectors and the workspace when an exception passes through here.
  ~ForwardCall() {
    try {
      backend_.synchronize();
    } catch (...) {  // NOLINT(bugprone-empty-catch): the error that matters is already on its way
    }
  }
  ForwardCall(const ForwardCall&) = delete;
  ForwardCall& operator=(const ForwardCall&) = delete;

  void run() {
    // Who looks at a pass sees all tokens at once.
    const int64_t pass_rows = observation_ == nullptr ? backend_.pass_rows() : std::numeric_limits<int64_t>::max();
    const std::vector<std::vector<Part>> passes = cut_into_passes(chunks_, pass_rows);
    if (passes.empty()) return;
    int64_t most_rows = 0;
    int64_t most_logits = 0;
    for (const std::vector<Part>& parts : passes) {
      int64_t rows = 0;
      int64_t asked = 0;
      for (const Part& part : parts) {
        rows += part.count;
        asked += rows_asked(chunks_[part.chunk], part);
      }
      most_rows = std::max(most_rows, rows);
      most_logits = std::max(most_logits, asked);
    }
    allocate(most_rows, std::min(most_logits, kHeadRows));
    for (const std::vector<Part>& parts : passes) run_pass(parts);
  }

 private:
  void allocate(int64_t rows, int64_t head_rows) {
    int64_t rank = 0;
    for (const Chunk& chunk : chunks_) rank = std::max(rank, chunk.adapter == nullptr ? 0 : chunk.adapter->rank());
    workspace_ = make_workspace(
        model_,
        {.rows = rows, .head_rows = head_rows, .angles = rows, .rank = rank, .is_observed = observation_ != nullptr});
  }

  void run_pass(const std::vector<Part>& parts) {
    int64_t rows = 0;
    for (const Part& part : parts) rows += part.count;
    const bool decodes = rows == static_cast<int64_t>(parts.size());
    const Range range(backend_, decodes ? "decode " : "prefill ", rows, rows == 1 ? " row" : " rows");
    const Pass pass = begin_pass(parts);
    enter(pass);
    for (int64_t layer = observed_.first_layer; layer < model_.config().layers; ++layer) {
      throw_if_interrupted();
      if (!observed_.inputs.empty()) keep(observed_.inputs[static_cast<size_t>(layer)], pass.x);
      block(model_, layer, pass);
    }
    throw_if_interrupted();
    write_logits(parts, pass);
    backend_.synchronize();  // the next pass overwrites the host vectors
  }

  /// What the first layer of the pass reads.
  void enter(const Pass& pass) {
    if (observed_.first_layer > 0) {
      for (const KvSegment& segment : pass.segments) {
        backend_.copy(pass.x.slice_rows(segment.row, segment.tokens),
                      observed_.input.slice_rows(segment.position, segment.tokens));
      }
      return;
    }
    backend_.embedding({.ids = TensorView(ids_.data(), DType::kI32, {pass.x.rows()}),
                        .table = &model_.weights().embedding(),
                        .y = pass.x});
    if (observation_ != nullptr) observation_->show(Site::kEmbedding, 0, pass.x);
  }

  void keep(const TensorView& to, const TensorView& x) {
    if (to.data() != nullptr) backend_.copy(to, x);
  }

  /// Lays the parts out as rows: their ids, their places in the caches, and the angles of their positions.
  Pass begin_pass(const std::vector<Part>& parts) {
    ids_.clear();
    positions_.clear();
    const Pass& whole = workspace_.whole;
    Pass pass;
    for (const Part& part : parts) {
      const Chunk& chunk = chunks_[part.chunk];
      pass.segments.push_back({.cache = chunk.cache,
                               .row = static_cast<int64_t>(ids_.size()),
                               .tokens = part.count,
                               .position = chunk.position + part.begin});
      if (chunk.adapter != nullptr) add_rows(pass.adapters, chunk.adapter, pass.segments.back().row, part.count);
      for (int64_t i = part.begin; i < part.begin + part.count; ++i) {
        ids_.push_back(chunk.tokens[i]);
        positions_.push_back(chunk.position + i);
      }
    }
    const int64_t rows = static_cast<int64_t>(ids_.size());
    pass.x = whole.x.slice_rows(0, rows);
    pass.normed = whole.normed.slice_rows(0, rows);
    pass.qkv = whole.qkv.slice_rows(0, rows);
    pass.attended = whole.attended.slice_rows(0, rows);
    if (!pass.adapters.empty() || observation_ != nullptr) {
      pass.gate = whole.gate.slice_rows(0, rows);
      pass.up = whole.up.slice_rows(0, rows);
    }
    if (!pass.adapters.empty()) pass.low_rank = whole.low_rank.slice_rows(0, rows);
    if (observation_ != nullptr) {
      pass.observation = observation_;
      pass.gate_up = whole.gate_up;  // made for this one pass
      pass.added = whole.added;
    }
    pass.cos = whole.cos.slice_rows(0, rows);
    pass.sin = whole.sin.slice_rows(0, rows);

    const size_t angles = static_cast<size_t>(pass.cos.size());
    cos_.resize(angles);
    sin_.resize(angles);
    model_.angles().copy(positions_.data(), rows, cos_.data(), sin_.data());
    backend_.copy_to_device(pass.cos.data(), cos_.data(), angles * sizeof(float));
    backend_.copy_to_device(pass.sin.data(), sin_.data(), angles * sizeof(float));
    return pass;
  }

  /// Final norm and head of the rows that were asked for. The norm gathers them into a compact block of rows.
  void write_logits(const std::vector<Part>& parts, const Pass& pass) {
    int64_t gathered = 0;
    int64_t run_begin = 0;
    int64_t run_end = 0;
    const auto flush = [&] {
      const int64_t count = run_end - run_begin;
      if (count == 0) return;
      normalize(model_, pass.x.slice_rows(run_begin, count), model_.weights().final_norm(),
                pass.normed.slice_rows(gathered, count));
      gathered += count;
    };
    for (size_t i = 0; i < parts.size(); ++i) {
      const int64_t asked = rows_asked(chunks_[parts[i].chunk], parts[i]);
      if (asked == 0) continue;
      const int64_t end = pass.segments[i].row + parts[i].count;
      if (end - asked != run_end) {
        flush();
        run_begin = end - asked;
      }
      run_end = end;
    }
    flush();
    if (observation_ != nullptr) observation_->show(Site::kFinalNorm, 0, pass.normed.slice_rows(0, gathered));

    const int64_t outputs = model_.config().outputs();
    for (int64_t row = 0; row < gathered; row += kHeadRows) {
      const int64_t count = std::min(gathered - row, kHeadRows);
      const TensorView head = workspace_.head.slice_rows(0, count);
      MatmulArgs args;
      args.x = pass.normed.slice_rows(row, count);
      args.weight = &model_.weights().head();
      args.y = head;
      args.compute = model_.compute();
      backend_.matmul(args);
      backend_.copy_to_host(logits_, head.data(), static_cast<size_t>(head.size()) * sizeof(float));
      backend_.synchronize();
      for (int64_t i = 0; i < count; ++i) {
        const int64_t bad = find_not_finite(logits_ + i * outputs, outputs);
        if (bad >= 0) [[unlikely]] {
          fail_not_finite(parts, row + i, bad, logits_[i * outputs + bad]);
        }
      }
      logits_ += head.size();
      throw_if_interrupted();
    }
  }

  [[noreturn]] void fail_not_finite(const std::vector<Part>& parts, int64_t logits_row, int64_t entry,
                                    float value) const {
    for (const Part& part : parts) {
      const Chunk& chunk = chunks_[part.chunk];
      const int64_t asked = rows_asked(chunk, part);
      if (logits_row < asked) {
        const int64_t token = part.begin + part.count - asked + logits_row;
        fail(ErrorKind::kNumeric, "forward: sequence ", part.chunk, ", position ", chunk.position + token,
             " (token id ", chunk.tokens[token], "): logit ", entry, " is ", value,
             ". Either the weights hold a NaN or an infinity (a damaged or badly converted checkpoint), or an "
             "activation "
             "is beyond float32");
      }
      logits_row -= asked;
    }
    fail(ErrorKind::kInternal, "forward: a row of logits belongs to no token");
  }

  const Model& model_;
  Backend& backend_;
  const std::vector<Chunk>& chunks_;
  float* logits_;  // where the next row goes
  const ObservedPass observed_;
  Observation* observation_;
  Workspace workspace_;  // for as many rows as the largest pass
  // Host memory of the pass that is running.
  std::vector<int32_t> ids_;
  std::vector<int64_t> positions_;
  std::vector<float> cos_;
  std::vector<float> sin_;
};

std::shared_ptr<Backend> checked_backend(std::shared_ptr<Backend> backend, const ModelConfig& config) {
  require(backend != nullptr, ErrorKind::kInternal, "model: there is no backend");
  check(config);
  return backend;
}

}  // namespace

Model::Model(std::shared_ptr<Backend> backend, const ModelConfig& config, const WeightPlan& plan,
             const PackedWeights& packed, Compute compute)
    : backend_(checked_backend(std::move(backend), config)),
      config_(config),
      compute_(compute),
      angles_(config.rope, std::min(config.context, kAnglesKept)),
      weights_(*backend_, config, plan, packed) {}

std::shared_ptr<Model> convert(const Model& model, const WeightPlan& plan) {
  auto converted =
      std::make_shared<Model>(model.shared_backend(), model.config(), plan, PackedWeights{}, model.compute());
  for (const Weights::Slot& slot : model.weights().slots()) converted->weights().copy_from(model.weights(), slot.name);
  return converted;
}

KvCacheShape Model::kv_shape(int64_t capacity, DType dtype) const {
  require(capacity >= 1 && capacity <= config_.context, ErrorKind::kContextLength, "KV cache: room for ", capacity,
          " positions was asked for; this model's context allows 1 to ", config_.context);
  return {.layers = config_.layers,
          .kv_heads = config_.kv_heads,
          .head_dim = config_.head_dim,
          .capacity = capacity,
          .dtype = dtype};
}

int64_t logits_rows(const std::vector<Chunk>& chunks) {
  int64_t rows = 0;
  for (const Chunk& chunk : chunks) rows += rows_asked(chunk.logits, chunk.count);
  return rows;
}

void forward(const Model& model, const std::vector<Chunk>& chunks, float* logits) {
  check_chunks(model, chunks, logits);
  ForwardCall(model, chunks, logits).run();
}

void forward(const Model& model, const std::vector<Chunk>& chunks, const ObservedPass& observed, float* logits) {
  check_chunks(model, chunks, logits);
  ForwardCall(model, chunks, logits, observed).run();
}

}  // namespace llama_ext
