// Which rows run, from their beginning to their end.
#include "generate/batch.h"

#include <algorithm>
#include <utility>

#include "core/checked.h"
#include "generate/prefix.h"

namespace llama_ext {
namespace {

// Asking for the memory that is left takes longer than a row of a small model: caches below this are just made.
constexpr int64_t kWorthAsking = int64_t{64} << 20;

}  // namespace

Batch::Batch(const GenerationRequest& request) : request_(request) {
  const GenerationOptions& options = request.options;
  if (options.speculation.model) draft_model_.emplace(options.speculation.model, options.speculation.kv_dtype);
  rows_.resize(options.max_new_tokens.size());
  int64_t largest = 0;
  for (size_t i = 0; i < rows_.size(); ++i) {
    Row& row = rows_[i];
    row.index = static_cast<int64_t>(i);
    row.prompt = &request.prompts[i / static_cast<size_t>(options.copies)];
    row.max_new_tokens = options.max_new_tokens[i];
    if (!options.adapters.empty()) row.adapter = options.adapters[i / static_cast<size_t>(options.copies)];
    row.pace = DraftPace(options.speculation.tokens);
    if (row.max_new_tokens == 0) {
      without_tokens_.push_back(i);
    } else if (request.continued == nullptr) {
      largest = std::max(largest, nbytes(row));
    }
  }
  unfinished_ = rows_.size();
  request.model->backend().require_memory(largest, "generate: the KV cache of one sequence");
  for (size_t prompt : prefix_order(request.prompts)) {
    for (size_t copy = 0; copy < static_cast<size_t>(options.copies); ++copy) {
      const size_t row = prompt * static_cast<size_t>(options.copies) + copy;
      if (rows_[row].max_new_tokens > 0) order_.push_back(row);
    }
  }
  // Rows of one adapter follow each other, as only they can share a beginning.
  std::vector<const Adapter*> adapters;
  for (const auto& adapter : options.adapters) {
    if (std::find(adapters.begin(), adapters.end(), adapter.get()) == adapters.end()) adapters.push_back(adapter.get());
  }
  const auto place = [&](size_t row) {
    return std::find(adapters.begin(), adapters.end(), rows_[row].adapter.get()) - adapters.begin();
  };
  std::stable_sort(order_.begin(), order_.end(), [&](size_t a, size_t b) { return place(a) < place(b); });
}

KvCacheShape Batch::kv_shape(int64_t capacity) const {
  return request_.model->kv_shape(capacity, request_.options.kv_dtype);
}

void Batch::admit() {
  while (next_ < order_.size() && static_cast<int64_t>(running_.size()) < request_.options.max_batch_size) {
    Row& row = rows_[order_[next_]];
    if (row.is_running() && !begin(row)) return;
    ++next_;
  }
}

/// False when the row has to wait, for memory or for a prompt that it shares.
bool Batch::begin(Row& row) {
  if (full_at_ > 0 && running_.size() >= full_at_) return false;
  const Session* source = latest_ != nullptr ? latest_->session : base_.get();
  // The last token of a prompt always runs, as nothing else gives its logits.
  const int64_t shared = source == nullptr || source->adapter() != row.adapter
                             ? 0
                             : std::min(common_prefix(*row.prompt, source->tokens()), row.prompt_length() - 1);
  const Row* twin = nullptr;
  if (latest_ != nullptr && latest_->is_reading_prompt() && latest_->adapter == row.adapter &&
      *latest_->prompt == *row.prompt) {
    twin = latest_->twin != nullptr ? latest_->twin : latest_;
  } else if (should_wait(row, shared)) {
    return false;
  }
  running_.reserve(running_.size() + 1);
  row.output.reserve(static_cast<size_t>(row.max_new_tokens));  // so that recording a token cannot fail
  if (request_.continued != nullptr) {
    row.session = request_.continued;
    if (draft_model_) row.draft_session = draft_model_->create_session(row, nullptr);
  } else {
    try {
      require_room(row);
      auto session = std::make_unique<Session>(request_.model, row.capacity(), request_.options.kv_dtype, row.adapter);
      const Session* draft_source = latest_ != nullptr ? latest_->draft_session.get() : draft_base_.get();
      if (draft_model_) row.draft_session = draft_model_->create_session(row, draft_source);
      if (twin == nullptr && shared > 0) {
        session->copy_from(*source, shared);
        row.counts.prompt_shared = shared;
      }
      reserved_ = checked_add(reserved_, nbytes(row), "KV cache");
      row.owned = std::move(session);
      row.session = row.owned.get();
    } catch (const Error& error) {
      if (error.kind() != ErrorKind::kOutOfMemory || (running_.empty() && base_ == nullptr)) throw;
      if (running_.empty()) {
        base_.reset();
        draft_base_.reset();
        return begin(row);
      }
      full_at_ = running_.size();
      return false;
    }
  }
  row.twin = twin;
  running_.push_back(&row);
  full_at_ = 0;
  latest_ = &row;
  base_.reset();
  draft_base_.reset();
  return true;
}

/// Whether the row begun last is about to run much that this one shares.
bool Batch::should_wait(const Row& row, int64_t shared) const {
  if (latest_ == nullptr || !latest_->is_reading_prompt() || latest_->adapter != row.adapter) return false;
  const int64_t prospect = std::min(common_prefix(*row.prompt, *latest_->prompt), row.prompt_length() - 1);
  return prospect - shared >= kWorthWaiting;
}

int64_t Batch::nbytes(const Row& row) const {
  const int64_t own = request_.model->backend().kv_cache_nbytes(kv_shape(row.capacity()));
  return draft_model_ ? checked_add(own, draft_model_->nbytes(row), "KV cache") : own;
}

/// Memory for all of `row`, and for what the running rows have not touched of theirs.
void Batch::require_room(const Row& row) const {
  Backend& backend = request_.model->backend();
  int64_t needed = checked_add(reserved_, nbytes(row), "KV cache");
  if (needed < kWorthAsking) return;
  const std::string what = cat("generate: the KV caches of ", running_.size() + 1, " sequences");
  try {
    backend.require_memory(needed, what);
  } catch (const Error&) {
    for (const Row* other : running_) {
      needed -= backend.kv_cache_nbytes(kv_shape(std::max<int64_t>(other->session->length(), 1)));
    }
    backend.require_memory(std::max<int64_t>(needed, 0), what);
  }
}

void Batch::end(Row& row, Finish reason) {
  row.finish = reason;
  --unfinished_;
  if (row.owned != nullptr) reserved_ -= nbytes(row);
  if (&row == latest_) {
    latest_ = nullptr;
    while (next_ < order_.size() && !rows_[order_[next_]].is_running()) ++next_;
    if (next_ < order_.size() && row.owned != nullptr && rows_[order_[next_]].adapter == row.adapter &&
        common_prefix(*rows_[order_[next_]].prompt, row.owned->tokens()) >= kWorthWaiting) {
      base_ = std::move(row.owned);
      draft_base_ = std::move(row.draft_session);
    }
  }
  row.session = nullptr;
  row.owned.reset();  // its KV cache is of no more use, nor is the rest
  row.draft_session.reset();
  row.held.clear();
  std::vector<int32_t>().swap(row.output);
  std::vector<int32_t>().swap(row.draft);
}

void Batch::forget_ended() {
  std::erase_if(running_, [](const Row* row) { return !row->is_running(); });
}

void Batch::stop(size_t index) {
  Row& row = rows_[index];
  if (!row.is_running()) return;
  std::erase(without_tokens_, index);
  end(row, Finish::kStopped);
  forget_ended();
}

}  // namespace llama_ext
