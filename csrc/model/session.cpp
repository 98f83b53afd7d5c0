#include "model/session.h"

#include <algorithm>
#include <utility>

namespace llama_ext {

Session::Session(std::shared_ptr<const Model> model, int64_t capacity, DType kv_dtype,
                 std::shared_ptr<const Adapter> adapter)
    : model_(std::move(model)),
      adapter_(std::move(adapter)),
      cache_(model_->backend().create_kv_cache(model_->kv_shape(capacity, kv_dtype))) {
  if (adapter_) adapter_->require_fits(model_->config());
  tokens_.reserve(static_cast<size_t>(capacity));  // so that recording tokens that have run cannot fail
}

void Session::append(const int32_t* tokens, int64_t count, LogitsRows rows, float* logits) {
  require(count >= 0, ErrorKind::kOption, "session: the number of tokens must be at least 0, got ", count);
  require(count > 0 || rows != LogitsRows::kLast, ErrorKind::kOption,
          "session: there are no logits of the last token when no tokens are appended");
  ++writes_;
  forward(*model_,
          {{.cache = cache_.get(),
            .position = length(),
            .tokens = tokens,
            .count = count,
            .logits = rows,
            .adapter = adapter_.get()}},
          logits);
  tokens_.insert(tokens_.end(), tokens, tokens + count);
}

void Session::append_batch(const std::vector<SessionChunk>& appended, float* logits) {
  if (appended.empty()) return;
  const Model& model = appended.front().session->model();
  std::vector<Chunk> chunks;
  chunks.reserve(appended.size());
  for (const SessionChunk& chunk : appended) {
    require(&chunk.session->model() == &model, ErrorKind::kOption, "session: a batch must be of one model");
    require(chunk.count > 0 || chunk.logits != LogitsRows::kLast, ErrorKind::kOption,
            "session: there are no logits of the last token when no tokens are appended");
    chunks.push_back({.cache = chunk.session->cache_.get(),
                      .position = chunk.session->length(),
                      .tokens = chunk.tokens,
                      .count = chunk.count,
                      .logits = chunk.logits,
                      .adapter = chunk.session->adapter_.get()});
  }
  for (const SessionChunk& chunk : appended) ++chunk.session->writes_;  // a pass that fails has written, too
  forward(model, chunks, logits);
  for (const SessionChunk& chunk : appended) {
    std::vector<int32_t>& kept = chunk.session->tokens_;
    kept.insert(kept.end(), chunk.tokens, chunk.tokens + chunk.count);
  }
}

void Session::rewind(int64_t length) {
  require(length >= 0 && length <= this->length(), ErrorKind::kOption, "session: cannot rewind to ", length,
          ", the session holds ", this->length(), " tokens");
  tokens_.resize(static_cast<size_t>(length));
}

void Session::readmit(int32_t token) {
  require(length() < capacity(), ErrorKind::kInternal, "session: there is no position to take back");
  tokens_.push_back(token);
}

void Session::record_run(int32_t token) {
  require(length() < capacity(), ErrorKind::kInternal, "session: there is no position for another token");
  ++writes_;
  tokens_.push_back(token);
}

std::unique_ptr<Session> Session::fork(int64_t capacity) const {
  require(capacity >= length(), ErrorKind::kContextLength, "session: a fork needs room for its ", length(),
          " tokens, got a capacity of ", capacity);
  auto copy = std::make_unique<Session>(model_, capacity, kv_dtype(), adapter_);
  copy->copy_from(*this, length());
  return copy;
}

void Session::copy_from(const Session& source, int64_t length) {
  require(model_ == source.model_ && adapter_ == source.adapter_ && kv_dtype() == source.kv_dtype() &&
              length <= source.length() && length <= capacity(),
          ErrorKind::kInternal, "session: a copy needs the same model, adapter, dtype, and room for every token");
  tokens_.clear();
  ++writes_;
  model_->backend().copy_kv_cache(*cache_, *source.cache_, length);
  model_->backend().synchronize();
  tokens_.assign(source.tokens_.begin(), source.tokens_.begin() + length);
}

void Session::restore(const std::vector<int32_t>& tokens) {
  require(static_cast<int64_t>(tokens.size()) <= capacity(), ErrorKind::kContextLength, "session: ", tokens.size(),
          " saved tokens do not fit into ", capacity(), " positions");
  check_token_ids(tokens.data(), static_cast<int64_t>(tokens.size()), model_->config().vocabulary);
  ++writes_;
  tokens_.assign(tokens.begin(), tokens.end());
}

}  // namespace llama_ext
