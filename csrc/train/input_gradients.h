// How much a model's outputs change with the embeddings that go in: what attribution asks for. Nothing is trained.
#pragma once

#include <cstdint>
#include <span>

#include "model/adapter.h"
#include "model/transformer.h"

namespace llama_ext {

/// One output at one position.
struct OutputTerm {
  int64_t row = 0;     // of the batch: which token's output
  int32_t output = 0;  // a token of the vocabulary, or a label
  double weight = 1.0;
};

/// Sequences one after another, as embeddings: they need not be those of tokens.
struct EmbeddedBatch {
  TensorView embeddings;  // (M, C) f32 in host memory, contiguous
  std::span<const int64_t>
      lengths;  // of the sequences, with M as their sum; each starts at position 0 and sees only itself
  std::span<const OutputTerm> terms;  // by ascending row; several may be of one
  bool logprobs = false;              // of the outputs: log probabilities, instead of logits
};

/// values[i] = the logit, or log probability, of terms[i], without its weight
/// d_embeddings = the gradient of sum_i terms[i].weight * values[i], or none is made
/// A gradient is of a sequence's own terms, as sequences do not see each other. values: (terms) f64; d_embeddings: (M, C) f32,
/// contiguous; both in host memory. Products are float32, whatever the weights are kept as: those of training, and of its passes. The
/// model needs separate gate and up matrices; neither it nor the adapter changes, and other threads may use them. Long batches run in
/// passes of whole sequences, shorter ones where memory is short: it grows with the longest sequence and its terms, not with the batch. On a CPU a sequence's bits depend on nothing else in the batch, and
/// not on threads.
/// Throws ShapeError, DTypeError, TokenIdError, ContextLengthError, UnsupportedError, OutOfMemoryError, OptionError, NumericError (a value or a
/// gradient that is not finite), Interrupted.
void input_gradients(const Model& model, const Adapter* adapter, const EmbeddedBatch& batch, std::span<double> values,
                     const TensorView& d_embeddings);

/// embeddings[t] = the embedding of ids[t]. ids: (M) in [0, V); embeddings: (M, C) f32; both in host memory, contiguous.
/// Throws ShapeError, TokenIdError, OutOfMemoryError.
void embed_tokens(const Model& model, std::span<const int32_t> ids, const TensorView& embeddings);

}  // namespace llama_ext
