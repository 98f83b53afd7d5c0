#include "model/weights.h"

#include <algorithm>
#include <utility>

#include "core/half.h"

namespace llama_ext {
namespace {

std::string shape_text_of(const std::vector<int64_t>& shape) {
  return shape.size() == 1 ? shape_text({shape[0]}) : shape_text({shape[0], shape[1]});
}

/// Bytes of all matrices; norms and biases do not count.
int64_t matrix_nbytes(const ModelConfig& config, DType dtype) {
  const int64_t attention = checked_add(config.qkv_size(), config.q_size(), "weights");
  const int64_t ffn = checked_add(gate_up_size(config.ffn_width), config.ffn_width, "weights");
  const int64_t rows_of_block = checked_mul(checked_add(attention, ffn, "weights"), config.layers, "weights");
  const int64_t tables = config.tied_head ? config.vocabulary : 2 * config.vocabulary;
  const int64_t elements = checked_mul(checked_add(rows_of_block, tables, "weights"), config.width, "weights");
  return checked_mul(elements, static_cast<int64_t>(size_of(dtype)), "weights");
}

std::unique_ptr<Buffer> allocate_floats(Backend& backend, int64_t count) {
  return backend.allocate(static_cast<size_t>(checked_mul(count, sizeof(float), "weights")));
}

Norm make_norm(Backend& backend, int64_t width) {
  Norm norm;
  norm.data = allocate_floats(backend, width);
  norm.weight = TensorView(norm.data->data(), DType::kF32, {width});
  return norm;
}

Linear make_linear(Backend& backend, int64_t rows, int64_t cols, DType dtype, bool has_bias) {
  Linear linear;
  linear.weight = backend.create_matrix(rows, cols, dtype);
  if (has_bias) {
    linear.bias_data = allocate_floats(backend, rows);
    linear.bias = TensorView(linear.bias_data->data(), DType::kF32, {rows});
  }
  return linear;
}

float element_as_f32(const TensorView& source, int64_t i) {
  switch (source.dtype()) {
    case DType::kF32:
      return static_cast<const float*>(source.data())[i];
    case DType::kF64:
      return static_cast<float>(static_cast<const double*>(source.data())[i]);
    case DType::kF16:
      return f16_to_f32(static_cast<const uint16_t*>(source.data())[i]);
    case DType::kBF16:
      return bf16_to_f32(static_cast<const uint16_t*>(source.data())[i]);
    case DType::kI32:
      break;
  }
  fail(ErrorKind::kDType, "weights: a tensor must be float32, float16, bfloat16 or float64, got ",
       name_of(source.dtype()));
}

/// Calls move(first element of the tensor, its place in the vector, how many) for each run that stays together.
template <typename Move>
void for_each_run(const RowMap& rows, int64_t count, Move&& move) {
  for (int64_t i = 0; i < count;) {
    const int64_t run = std::min(count - i, rows.group - i % rows.group);
    move(i, rows(i), run);
    i += run;
  }
}

void check_source(const Weights::Slot& slot, const TensorView& tensor) {
  bool same = tensor.rank() == static_cast<int>(slot.shape.size());
  for (int axis = 0; same && axis < tensor.rank(); ++axis)
    same = tensor.dim(axis) == slot.shape[static_cast<size_t>(axis)];
  require(same, ErrorKind::kShape, "weights: '", slot.name, "' must have shape ", shape_text_of(slot.shape), ", got ",
          tensor.shape_text(), ". Do the config and the checkpoint belong together?");
  require(tensor.is_contiguous(), ErrorKind::kShape, "weights: '", slot.name, "' must be contiguous");
}

}  // namespace

Weights::Weights(Backend& backend, const ModelConfig& config, DType dtype) : backend_(backend), dtype_(dtype) {
  backend.require_memory(matrix_nbytes(config, dtype), "the weights");
  const int64_t width = config.width;
  embedding_ = backend.create_matrix(config.vocabulary, width, dtype);
  add_matrix("embedding", embedding_.get(), {}, config.vocabulary, width);

  blocks_.resize(static_cast<size_t>(config.layers));
  for (int64_t layer = 0; layer < config.layers; ++layer) {
    BlockWeights& block = blocks_[static_cast<size_t>(layer)];
    const std::string prefix = "layers." + std::to_string(layer) + ".";

    block.attention_norm = make_norm(backend, width);
    add_vector(prefix + "attention_norm", block.attention_norm.weight, {}, width);

    block.qkv = make_linear(backend, config.qkv_size(), width, dtype, config.attention_bias);
    block.o = make_linear(backend, width, config.q_size(), dtype, config.attention_bias);
    block.ffn_norm = make_norm(backend, width);
    block.gate_up = make_linear(backend, gate_up_size(config.ffn_width), width, dtype, config.ffn_bias);
    block.down = make_linear(backend, width, config.ffn_width, dtype, config.ffn_bias);

    const auto add_linear = [&](const char* name, const Linear& linear, const RowMap& rows, int64_t count,
                                int64_t cols) {
      add_matrix(prefix + name, linear.weight.get(), rows, count, cols);
      if (linear.bias) add_vector(prefix + name + ".bias", linear.bias, rows, count);
    };
    const RowMap k_rows{.begin = config.q_size()};
    const RowMap v_rows{.begin = config.q_size() + config.kv_size()};
    add_linear("q", block.qkv, {}, config.q_size(), width);
    add_linear("k", block.qkv, k_rows, config.kv_size(), width);
    add_linear("v", block.qkv, v_rows, config.kv_size(), width);
    add_linear("o", block.o, {}, width, config.q_size());
    add_vector(prefix + "feed_forward_norm", block.ffn_norm.weight, {}, width);
    add_linear("gate", block.gate_up, gate_rows(), config.ffn_width, width);
    add_linear("up", block.gate_up, up_rows(), config.ffn_width, width);
    add_linear("down", block.down, {}, width, config.ffn_width);
  }

  final_norm_ = make_norm(backend, width);
  add_vector("final_norm", final_norm_.weight, {}, width);
  if (!config.tied_head) {
    head_ = backend.create_matrix(config.vocabulary, width, dtype);
    add_matrix("head", head_.get(), {}, config.vocabulary, width);
  }
}

void Weights::add_matrix(const std::string& name, Matrix* matrix, const RowMap& rows, int64_t count, int64_t cols) {
  add_slot({.name = name, .shape = {count, cols}, .is_matrix = true}, {.matrix = matrix, .rows = rows, .vector = {}});
}

void Weights::add_vector(const std::string& name, const TensorView& vector, const RowMap& rows, int64_t count) {
  add_slot({.name = name, .shape = {count}, .is_matrix = false}, {.matrix = nullptr, .rows = rows, .vector = vector});
}

void Weights::add_slot(Slot slot, const Place& place) {
  index_.emplace(slot.name, slots_.size());
  slots_.push_back(std::move(slot));
  places_.push_back(place);
  loaded_.push_back(0);
}

size_t Weights::find(std::string_view slot) const {
  const auto found = index_.find(slot);
  require(
      found != index_.end(), ErrorKind::kCheckpoint, "weights: there is no slot '", slot,
      "' in this model. Does the config say how many layers there are, and whether there are biases or a tied head?");
  return found->second;
}

void Weights::load(std::string_view slot, const TensorView& source) {
  const size_t index = find(slot);
  check_source(slots_[index], source);
  const Place& place = places_[index];
  if (place.matrix != nullptr) {
    backend_.write_rows(*place.matrix, place.rows, source);
  } else {
    std::vector<float> values(static_cast<size_t>(source.size()));
    for (int64_t i = 0; i < source.size(); ++i) values[static_cast<size_t>(i)] = element_as_f32(source, i);
    for_each_run(place.rows, source.size(), [&](int64_t from, int64_t to, int64_t count) {
      backend_.copy_to_device(place.vector.f32() + to, values.data() + from,
                              static_cast<size_t>(count) * sizeof(float));
    });
  }
  backend_.synchronize();  // `source` is the caller's, and may be gone when we return
  loaded_[index] = 1;
}

void Weights::read(std::string_view slot, const TensorView& target) const {
  const size_t index = find(slot);
  check_source(slots_[index], target);
  const Place& place = places_[index];
  if (place.matrix != nullptr) {
    backend_.read_rows(*place.matrix, place.rows, target);
  } else {
    require_dtype(target, DType::kF32, "weights", slots_[index].name);
    for_each_run(place.rows, target.size(), [&](int64_t to, int64_t from, int64_t count) {
      backend_.copy_to_host(target.f32() + to, place.vector.f32() + from, static_cast<size_t>(count) * sizeof(float));
    });
  }
  backend_.synchronize();
}

std::vector<std::string> Weights::missing() const {
  std::vector<std::string> names;
  for (size_t i = 0; i < slots_.size(); ++i) {
    if (loaded_[i] == 0) names.push_back(slots_[i].name);
  }
  return names;
}

int64_t Weights::nbytes() const {
  const auto of_linear = [](const Linear& linear) {
    return linear.weight->nbytes() + (linear.bias_data ? static_cast<int64_t>(linear.bias_data->nbytes()) : 0);
  };
  const auto of_norm = [](const Norm& norm) { return static_cast<int64_t>(norm.data->nbytes()); };
  int64_t total = embedding_->nbytes() + (head_ ? head_->nbytes() : 0) + of_norm(final_norm_);
  for (const BlockWeights& block : blocks_) {
    total += of_norm(block.attention_norm) + of_linear(block.qkv) + of_linear(block.o) + of_norm(block.ffn_norm) +
             of_linear(block.gate_up) + of_linear(block.down);
  }
  return total;
}

}  // namespace llama_ext
