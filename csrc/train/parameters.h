// What a training changes, its gradients, and what an optimiser remembers of each tensor.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "model/adapter.h"
#include "model/transformer.h"

namespace llama_ext {

/// A tensor as it is stepped: a whole matrix of the backend, which may hold several tensors of a checkpoint, or a vector.
struct Parameter {
  Matrix* matrix = nullptr;  // or
  TensorView vector;
  std::unique_ptr<Matrix> matrix_gradient;
  std::unique_ptr<Buffer> vector_gradient;
  std::vector<std::unique_ptr<Matrix>> matrix_moments;
  std::vector<std::unique_ptr<Buffer>> vector_moments;
  // Flat views of all of them (Backend::values).
  TensorView value;
  TensorView gradient;
  std::vector<TensorView> moments;
  bool is_block_matrix = false;  // a layer's, or an adapter's
  bool is_matrix() const { return matrix != nullptr; }
};

/// A tensor of a checkpoint: where it lies in a parameter.
struct ParameterSlot {
  std::string name;
  std::vector<int64_t> shape;
  size_t parameter = 0;
  RowMap rows;
};

/// Which of a model's weights are trained.
struct Trainable {
  bool all = true;
  std::vector<std::string> slots;  // those that are, when not all
};

/// How many tensors an optimiser keeps of a matrix of the blocks, and of anything else.
using MomentCount = std::function<size_t(bool is_block_matrix)>;

/// The trained tensors of a model and of an adapter, "layers.0.q.lora_A" and so on.
class Parameters {
 public:
  /// Throws DTypeError for a trained matrix that is not float32, OptionError for
  /// a slot that is not there, or that shares its matrix with one that is not trained, OutOfMemoryError.
  Parameters(Model& model, Adapter* adapter, const Trainable& trainable, const MomentCount& moments);

  std::vector<Parameter>& all() { return parameters_; }
  const std::vector<Parameter>& all() const { return parameters_; }
  const std::vector<ParameterSlot>& slots() const { return slots_; }
  /// The gradient of a matrix or vector, or none when it is frozen.
  Matrix* gradient_of(const Matrix* matrix) const;
  TensorView gradient_of(const TensorView& vector) const;

  const ParameterSlot& slot(std::string_view name) const;
  size_t moments(const ParameterSlot& slot) const { return parameters_[slot.parameter].moments.size(); }
  /// (shape of the slot) f32 in host memory. moment: an index, below moments(slot), or -1 for the gradient.
  void read(const ParameterSlot& slot, int moment, const TensorView& target) const;
  void write_moment(const ParameterSlot& slot, int moment, const TensorView& source);

  void zero_gradients();
  /// The square root of the sum of squares of all gradients.
  double gradient_norm() const;
  int64_t nbytes() const;

 private:
  size_t add_matrix(Matrix& matrix, bool is_block_matrix, const MomentCount& moments);
  size_t add_vector(const TensorView& vector, const MomentCount& moments);
  /// What holds a slot's gradient or moment.
  const Matrix* matrix_of(const Parameter& parameter, int moment) const;
  TensorView vector_of(const Parameter& parameter, int moment) const;

  Backend& backend_;
  std::vector<Parameter> parameters_;
  std::vector<ParameterSlot> slots_;
  std::map<const void*, size_t> index_;  // by matrix, or by the vector's data
};

}  // namespace llama_ext
