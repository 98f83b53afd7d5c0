// The weights of a Llama on a backend, filled tensor by tensor. A slot is the place of one tensor of a checkpoint.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "backend/backend.h"
#include "model/config.h"

namespace llama_ext {

/// A matrix and, when the model has one, its bias.
struct Linear {
  std::unique_ptr<Matrix> weight;
  std::unique_ptr<Buffer> bias_data;
  TensorView bias;
};

struct Norm {
  std::unique_ptr<Buffer> data;
  TensorView weight;
};

struct BlockWeights {
  Norm attention_norm;
  Linear qkv;  // rows: Q, then K, then V
  Linear o;
  Norm ffn_norm;
  Linear gate_up;  // rows interleaved, ops/feed_forward.h
  Linear down;
};

/// Slots: "embedding", "final_norm", "head" (when not tied), and for each layer i "layers.{i}." + attention_norm | q |
/// k | v | o | feed_forward_norm | gate | up | down, and with biases slot + ".bias".
class Weights {
 public:
  /// All zero. dtype of the matrices: f32 | bf16; norms and biases are f32.
  Weights(Backend& backend, const ModelConfig& config, DType dtype);

  /// Fills a slot from host memory (f32 | f16 | bf16 | f64). Throws CheckpointError for a slot that does not exist,
  /// ShapeError for another shape.
  void load(std::string_view slot, const TensorView& source);
  /// Reads a slot back into host memory: f32, or the matrices' dtype.
  void read(std::string_view slot, const TensorView& target) const;

  struct Slot {
    std::string name;
    std::vector<int64_t> shape;
    bool is_matrix;  // false: a norm or a bias, kept in f32
  };
  const std::vector<Slot>& slots() const { return slots_; }
  /// Slots that nothing was loaded into yet.
  std::vector<std::string> missing() const;

  const Matrix& embedding() const { return *embedding_; }
  const Matrix& head() const { return head_ ? *head_ : *embedding_; }
  const Norm& final_norm() const { return final_norm_; }
  const BlockWeights& block(int64_t layer) const { return blocks_[static_cast<size_t>(layer)]; }
  DType dtype() const { return dtype_; }
  int64_t nbytes() const;

 private:
  struct Place {
    Matrix* matrix = nullptr;
    RowMap rows;
    TensorView vector;  // a norm, or the bias that `rows` maps into
  };
  void add_matrix(const std::string& name, Matrix* matrix, const RowMap& rows, int64_t count, int64_t cols);
  void add_vector(const std::string& name, const TensorView& vector, const RowMap& rows, int64_t count);
  void add_slot(Slot slot, const Place& place);
  size_t find(std::string_view slot) const;

  Backend& backend_;
  DType dtype_;
  std::unique_ptr<Matrix> embedding_;
  std::unique_ptr<Matrix> head_;
  Norm final_norm_;
  std::vector<BlockWeights> blocks_;
  std::vector<Slot> slots_;
  std::vector<Place> places_;
  std::map<std::string, size_t, std::less<>> index_;  // by name: a checkpoint may have tens of thousands of slots
  std::vector<char> loaded_;                          // not vector<bool>: threads may load different slots at once
};

}  // namespace llama_ext
