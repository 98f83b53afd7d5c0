// The weights of a Llama on a backend, filled tensor by tensor. A slot is the place of one tensor of a checkpoint.
#pragma once

#include <cstddef>
#include <functional>
#include <map>
#include <memory>
#include <span>
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

/// Rows [begin, begin + weight rows) of a product that several tensors make together: those neighbours of Q, K and V that are
/// kept as the same type are one matrix.
struct Projection {
  Linear linear;
  int64_t begin = 0;
};

struct BlockWeights {
  Norm attention_norm;
  std::vector<Projection> qkv;  // rows: Q, then K, then V
  Linear o;
  Norm ffn_norm;
  Linear gate_up;  // rows interleaved, ops/feed_forward.h; or, where the two are kept as different types,
  Linear gate;     // each by itself
  Linear up;
  Linear down;
};

/// How each matrix is kept: by slot, or like the others.
struct WeightPlan {
  WeightType others;
  std::map<std::string, WeightType, std::less<>> by_slot;
  // Gate and up as matrices of their own even when they are of one type: for training and adapters, which need both halves. What
  // is packed for a file is the same either way.
  bool separate_gate_up = false;

  WeightType of(std::string_view slot) const {
    const auto found = by_slot.find(slot);
    return found == by_slot.end() ? others : found->second;
  }
};

/// The memory of a matrix as Backend::packed_bytes gave it, and what keeps it alive; null: the model that it is of.
struct PackedBytes {
  std::span<const std::byte> bytes;
  std::shared_ptr<const void> owner;
};
using PackedWeights = std::map<std::string, PackedBytes, std::less<>>;

/// Slots: "embedding", "final_norm", "head" (when not tied), and for each layer i "layers.{i}." + attention_norm | q |
/// k | v | o | feed_forward_norm | gate | up | down, and with biases slot + ".bias". The matrices that slots share are named
/// after them: "layers.{i}.qkv", or "layers.{i}.qk" and "layers.{i}.v", and "layers.{i}.gate_up".
class Weights {
 public:
  /// All zero; or, where `packed` is not empty, with its matrices, which are those of a file, complete, and not copied. Norms and
  /// biases are f32. Throws CheckpointError, with the name, for a matrix that `packed` lacks, or that is not of this model or has
  /// another number of bytes. Gate and up of one type may be one matrix there or two, as files from before `packed` joined them
  /// have them: they stay what they are.
  Weights(Backend& backend, const ModelConfig& config, const WeightPlan& plan, const PackedWeights& packed);

  /// Fills a slot from host memory (f32 | f16 | bf16 | f64); a matrix is rounded to its type, quantised ones with the errors of
  /// each column weighted by `importance`, (K) f32 or none. Throws CheckpointError for a slot that does not exist or is
  /// packed, ShapeError for another shape, NumericError for a number beyond float16 where that is the type.
  void load(std::string_view slot, const TensorView& source, const TensorView& importance);
  /// Fills the slot of a matrix from rows of ggml blocks. Throws as `load`, and DTypeError for blocks of another type.
  void load_blocks(std::string_view slot, const GgmlType& ggml, std::span<const std::byte> blocks);
  /// Fills the slot of a matrix from codes. Throws as `load`, and DTypeError, NumericError (Backend::write_codes).
  void load_codes(std::string_view slot, const CodeRows& codes);
  /// Reads a slot back into host memory: f32, or the matrix's own dtype.
  void read(std::string_view slot, const TensorView& target) const;
  /// Reads the slot of a quantised matrix row by row; see Backend::read_codes.
  void read_codes(std::string_view slot, const std::function<void(int64_t, const QuantizedRow&)>& visit) const;

  struct Slot {
    std::string name;
    std::vector<int64_t> shape;
    bool is_matrix;  // false: a norm or a bias, kept in f32
    WeightType type;
  };
  const std::vector<Slot>& slots() const { return slots_; }
  /// Slots that nothing was loaded into yet.
  std::vector<std::string> missing() const;

  const Matrix& embedding() const { return *embedding_; }
  const Matrix& head() const { return head_ ? *head_ : *embedding_; }
  const Norm& final_norm() const { return final_norm_; }
  const BlockWeights& block(int64_t layer) const { return blocks_[static_cast<size_t>(layer)]; }
  /// The type of the matrices that the plan does not name.
  WeightType type() const { return plan_.others; }
  int64_t nbytes() const;

  /// Where a slot's tensor lies: rows of a matrix, or elements of a vector.
  struct Place {
    Matrix* matrix = nullptr;
    bool is_packed = false;
    RowMap rows;
    TensorView vector;  // a norm, or the bias that `rows` maps into
  };
  /// Throws CheckpointError for a slot that does not exist.
  const Place& place(std::string_view slot) const { return places_[find(slot)]; }
  const WeightPlan& plan() const { return plan_; }
  /// Fills a slot with that of `source`, which has the same shape: as it is kept, or converted where types differ.
  void copy_from(const Weights& source, std::string_view slot);

  /// Whether gate and up are matrices of their own in every layer, as adapters need them.
  bool has_separate_gate_up() const;

  /// The matrices that the constructor asks `packed` for, by name: gate and up of one type are one, in this model or not.
  const std::vector<std::string>& packed_names() const { return packed_names_; }
  /// One of them; what has to be joined first is a copy. Throws CheckpointError for another name, UnsupportedError as
  /// Backend::packed_bytes.
  PackedBytes packed(std::string_view name) const;

 private:
  struct NamedMatrix {
    std::string name;
    const Matrix* matrix;
  };
  class Builder;
  void build(const ModelConfig& config, Builder& builder);
  void build_qkv(const ModelConfig& config, const std::string& prefix, Builder& builder, BlockWeights& block);

  size_t find(std::string_view slot) const;
  const Place& place_to_fill(std::string_view slot) const;

  Backend& backend_;
  WeightPlan plan_;
  std::unique_ptr<Matrix> embedding_;
  std::unique_ptr<Matrix> head_;
  Norm final_norm_;
  std::vector<BlockWeights> blocks_;
  std::vector<NamedMatrix> matrices_;
  std::vector<std::string> packed_names_;
  std::vector<Slot> slots_;
  std::vector<Place> places_;
  std::map<std::string, size_t, std::less<>> index_;  // by name: a checkpoint may have tens of thousands of slots
  std::vector<char> loaded_;                          // not vector<bool>: threads may load different slots at once
};

}  // namespace llama_ext
