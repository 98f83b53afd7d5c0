#include "train/parameters.h"

#include <algorithm>
#include <cmath>
#include <set>

#include "core/checked.h"

namespace llama_ext {
namespace {

const WeightType kFloat32{Encoding::kF32};

}  // namespace

Parameters::Parameters(Model& model, Adapter* adapter, const Trainable& trainable, const MomentCount& moments)
    : backend_(model.backend()) {
  const std::set<std::string, std::less<>> wanted(trainable.slots.begin(), trainable.slots.end());
  std::set<std::string, std::less<>> found;
  std::set<const void*> frozen;
  Weights& weights = model.weights();
  for (const Weights::Slot& slot : weights.slots()) {
    const Weights::Place& place = weights.place(slot.name);
    const void* memory = slot.is_matrix ? static_cast<const void*>(place.matrix) : place.vector.data();
    if (!trainable.all && !wanted.contains(slot.name)) {
      frozen.insert(memory);
      continue;
    }
    found.insert(slot.name);
    require(!slot.is_matrix || slot.type == kFloat32, ErrorKind::kDType, "train: '", slot.name, "' is kept as ",
            slot.type.text(),
            ", and only float32 weights can be trained. Convert the model to float32, or "
            "train an adapter");
    require(!place.is_packed, ErrorKind::kCheckpoint, "train: '", slot.name,
            "' lies in a mapped file, and cannot be changed. Convert the model first");
    const size_t parameter = slot.is_matrix ? add_matrix(*place.matrix, slot.name.starts_with("layers."), moments)
                                            : add_vector(place.vector, moments);
    slots_.push_back({slot.name, slot.shape, parameter, place.rows});
  }
  for (const std::string& name : wanted) {
    require(found.contains(name), ErrorKind::kOption, "train: there is no slot '", name, "' in this model");
  }
  for (const ParameterSlot& slot : slots_) {
    const Parameter& parameter = parameters_[slot.parameter];
    const void* memory = parameter.is_matrix() ? static_cast<const void*>(parameter.matrix) : parameter.vector.data();
    require(!frozen.contains(memory), ErrorKind::kOption, "train: '", slot.name,
            "' shares its memory with tensors that are not to be trained. Name q, k and v together");
  }
  if (adapter == nullptr) return;
  for (const Adapter::Entry& entry : adapter->entries()) {
    LowRank& part = *entry.part;
    for (const auto& [name, matrix] : {std::pair(".lora_A", part.a.get()), std::pair(".lora_B", part.b.get())}) {
      slots_.push_back({entry.slot + name, {matrix->rows(), matrix->cols()}, add_matrix(*matrix, true, moments), {}});
    }
  }
}

size_t Parameters::add_matrix(Matrix& matrix, bool is_block_matrix, const MomentCount& moments) {
  const auto [place, is_new] = index_.try_emplace(&matrix, parameters_.size());
  if (!is_new) return place->second;
  Parameter& made = parameters_.emplace_back();
  made.matrix = &matrix;
  made.is_block_matrix = is_block_matrix;
  made.value = backend_.values(matrix);
  made.matrix_gradient = backend_.create_matrix(matrix.rows(), matrix.cols(), kFloat32);
  made.gradient = backend_.values(*made.matrix_gradient);
  for (size_t count = moments(is_block_matrix); count > 0; --count) {
    made.matrix_moments.push_back(backend_.create_matrix(matrix.rows(), matrix.cols(), kFloat32));
    made.moments.push_back(backend_.values(*made.matrix_moments.back()));
  }
  return place->second;
}

size_t Parameters::add_vector(const TensorView& vector, const MomentCount& moments) {
  const auto [place, is_new] = index_.try_emplace(vector.data(), parameters_.size());
  if (!is_new) return place->second;
  Parameter& made = parameters_.emplace_back();
  made.vector = vector;
  made.value = vector;
  const auto fresh = [&] {
    return backend_.allocate(static_cast<size_t>(checked_mul(vector.size(), sizeof(float), "train")));
  };
  const auto view = [&](const Buffer& buffer) { return TensorView(buffer.data(), DType::kF32, {vector.size()}); };
  made.vector_gradient = fresh();
  made.gradient = view(*made.vector_gradient);
  for (size_t count = moments(/*is_block_matrix=*/false); count > 0; --count) {
    made.vector_moments.push_back(fresh());
    made.moments.push_back(view(*made.vector_moments.back()));
  }
  return place->second;
}

Matrix* Parameters::gradient_of(const Matrix* matrix) const {
  const auto found = index_.find(matrix);
  return found == index_.end() ? nullptr : parameters_[found->second].matrix_gradient.get();
}

TensorView Parameters::gradient_of(const TensorView& vector) const {
  const auto found = vector ? index_.find(vector.data()) : index_.end();
  return found == index_.end() ? TensorView() : parameters_[found->second].gradient;
}

const ParameterSlot& Parameters::slot(std::string_view name) const {
  const auto found =
      std::find_if(slots_.begin(), slots_.end(), [&](const ParameterSlot& each) { return each.name == name; });
  require(found != slots_.end(), ErrorKind::kCheckpoint, "train: '", name, "' is not trained");
  return *found;
}

const Matrix* Parameters::matrix_of(const Parameter& parameter, int moment) const {
  return moment < 0 ? parameter.matrix_gradient.get() : parameter.matrix_moments[static_cast<size_t>(moment)].get();
}

TensorView Parameters::vector_of(const Parameter& parameter, int moment) const {
  return moment < 0 ? parameter.gradient : parameter.moments[static_cast<size_t>(moment)];
}

void Parameters::read(const ParameterSlot& slot, int moment, const TensorView& target) const {
  const Parameter& parameter = parameters_[slot.parameter];
  if (parameter.is_matrix()) {
    backend_.read_rows(*matrix_of(parameter, moment), slot.rows, target);
  } else {
    const TensorView vector = vector_of(parameter, moment);
    for_each_run(slot.rows, slot.shape[0], [&](int64_t to, int64_t from, int64_t count) {
      backend_.copy_to_host(target.f32() + to, vector.f32() + from, static_cast<size_t>(count) * sizeof(float));
    });
  }
  backend_.synchronize();
}

void Parameters::write_moment(const ParameterSlot& slot, int moment, const TensorView& source) {
  Parameter& parameter = parameters_[slot.parameter];
  if (parameter.is_matrix()) {
    backend_.write_rows(*parameter.matrix_moments[static_cast<size_t>(moment)], slot.rows, source, {});
  } else {
    const TensorView vector = vector_of(parameter, moment);
    for_each_run(slot.rows, slot.shape[0], [&](int64_t from, int64_t to, int64_t count) {
      backend_.copy_to_device(vector.f32() + to, source.f32() + from, static_cast<size_t>(count) * sizeof(float));
    });
  }
  backend_.synchronize();
}

void Parameters::zero_gradients() {
  for (const Parameter& parameter : parameters_) backend_.zero(parameter.gradient);
}

double Parameters::gradient_norm() const {
  std::vector<TensorView> gradients;
  for (const Parameter& parameter : parameters_) gradients.push_back(parameter.gradient);
  return std::sqrt(backend_.sum_of_all_squares(gradients));
}

int64_t Parameters::nbytes() const {
  int64_t floats = 0;
  for (const Parameter& parameter : parameters_) {
    floats += parameter.gradient.size() * static_cast<int64_t>(1 + parameter.moments.size());
  }
  return floats * static_cast<int64_t>(sizeof(float));
}

}  // namespace llama_ext
