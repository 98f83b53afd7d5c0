// One sequence in progress: its tokens and their KV cache.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "model/transformer.h"

namespace llama_ext {

class Session;

/// Tokens to append to one of several sessions, and which of their logits to compute.
struct SessionChunk {
  Session* session = nullptr;
  const int32_t* tokens = nullptr;
  int64_t count = 0;
  LogitsRows logits = LogitsRows::kLast;
};

/// Not for use by two threads at once; any number of sessions may share a model.
class Session {
 public:
  /// capacity: positions, in [1, context]. kv_dtype: f32 | bf16.
  /// adapter: of all of its tokens; none for the model alone. Throws ShapeError for one of another model.
  Session(std::shared_ptr<const Model> model, int64_t capacity, DType kv_dtype,
          std::shared_ptr<const Adapter> adapter = nullptr);

  const Model& model() const { return *model_; }
  const std::shared_ptr<const Adapter>& adapter() const { return adapter_; }
  int64_t length() const { return static_cast<int64_t>(tokens_.size()); }
  int64_t capacity() const { return cache_->shape().capacity; }
  DType kv_dtype() const { return cache_->shape().dtype; }
  /// Everything that has run through the model, in order: what the cache holds.
  const std::vector<int32_t>& tokens() const { return tokens_; }
  KvCache& cache() { return *cache_; }
  const KvCache& cache() const { return *cache_; }

  /// Appends tokens; logits as in forward(). On a throw the session is as it was. No tokens is no work: only kLast with
  /// no tokens throws, as there is nothing to give logits of.
  void append(const int32_t* tokens, int64_t count, LogitsRows rows, float* logits);

  /// Appends to several sessions of one model at once (a batch): counts may differ. All or nothing.
  static void append_batch(const std::vector<SessionChunk>& chunks, float* logits);

  /// Forgets everything from position `length` on; 0 <= length <= length(). Throws OptionError.
  void rewind(int64_t length);

  /// Takes back a part of a rewind: `token` ran at this position before, and since then nothing was stored in the
  /// cache, which `writes()` tells. Costs nothing.
  void readmit(int32_t token);
  /// `token` ran at the next position, by a DecodeLoop that writes to the cache.
  void record_run(int32_t token);
  /// How often something was stored in the cache.
  uint64_t writes() const { return writes_; }

  /// An independent copy, with room for `capacity` positions (>= length()).
  std::unique_ptr<Session> fork(int64_t capacity) const;

  /// Becomes a copy of the first `length` tokens of `source`, a session of the same model, adapter and dtype, within its own
  /// capacity.
  void copy_from(const Session& source, int64_t length);

  /// Puts saved state in place: the tokens whose keys and values the caller has stored in `cache()`, layer by layer.
  /// Throws ContextLengthError, TokenIdError.
  void restore(const std::vector<int32_t>& tokens);

 private:
  std::shared_ptr<const Model> model_;
  std::shared_ptr<const Adapter> adapter_;
  std::unique_ptr<KvCache> cache_;
  std::vector<int32_t> tokens_;
  uint64_t writes_ = 0;
};

}  // namespace llama_ext
