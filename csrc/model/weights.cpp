#include "model/weights.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <set>
#include <type_traits>
#include <utility>

#include "core/half.h"

namespace llama_ext {
namespace {

std::string shape_text_of(const std::vector<int64_t>& shape) {
  return shape.size() == 1 ? shape_text({shape[0]}) : shape_text({shape[0], shape[1]});
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
    case DType::kI8:
      break;
  }
  fail(ErrorKind::kDType, "weights: a tensor must be float32, float16, bfloat16 or float64, got ",
       name_of(source.dtype()));
}

void check_source(const Weights::Slot& slot, const TensorView& tensor) {
  bool same = tensor.rank() == static_cast<int>(slot.shape.size());
  for (int axis = 0; same && axis < tensor.rank(); ++axis)
    same = tensor.dim(axis) == slot.shape[static_cast<size_t>(axis)];
  require(same, ErrorKind::kShape, "weights: '", slot.name, "' must have shape ", shape_text_of(slot.shape), ", got ",
          tensor.shape_text(), ". Do the config and the checkpoint belong together?");
  require(tensor.is_contiguous(), ErrorKind::kShape, "weights: '", slot.name, "' must be contiguous");
}

/// The first of `values`, float32 or the bits of bfloat16, that is rounded to an infinity of float16 without being one; else the end.
template <typename Value>
const Value* find_beyond_f16(const Value* values, int64_t count) {
  using Bits = std::conditional_t<sizeof(Value) == 4, uint32_t, uint16_t>;
  // From 65520, which is half-way from the largest number to what would be the next, to below infinity.
  constexpr uint32_t kLeast = std::bit_cast<uint32_t>(65520.0f);
  constexpr Bits kFirst = sizeof(Bits) == 4 ? static_cast<Bits>(kLeast) : static_cast<Bits>((kLeast >> 16) + 1);
  constexpr Bits kNumbers = static_cast<Bits>((sizeof(Bits) == 4 ? 0x7f800000u : 0x7f80u) - kFirst);
  constexpr Bits kMagnitude = static_cast<Bits>(~Bits{0}) >> 1;
  const auto distance = [](Value value) {
    return static_cast<Bits>((std::bit_cast<Bits>(value) & kMagnitude) - kFirst);
  };
  constexpr int64_t kBlock = 256;  // known, so that the loop is vectorised
  int64_t at = 0;
  for (; at + kBlock <= count; at += kBlock) {
    Bits least = kNumbers;
    for (int64_t i = 0; i < kBlock; ++i) least = std::min(least, distance(values[at + i]));
    if (least < kNumbers) break;
  }
  return std::find_if(values + at, values + count, [&](Value value) { return distance(value) < kNumbers; });
}

/// As a number, 0 where there is none.
float first_beyond_f16(const TensorView& source) {
  const int64_t count = source.size();
  if (source.dtype() == DType::kF32) {
    const auto* values = static_cast<const float*>(source.data());
    const float* found = find_beyond_f16(values, count);
    return found == values + count ? 0.0f : *found;
  }
  if (source.dtype() == DType::kBF16) {
    const auto* values = static_cast<const uint16_t*>(source.data());
    const uint16_t* found = find_beyond_f16(values, count);
    return found == values + count ? 0.0f : bf16_to_f32(*found);
  }
  if (source.dtype() != DType::kF64) return 0.0f;
  const auto* values = static_cast<const double*>(source.data());
  const double* found =
      std::find_if(values, values + count, [](double x) { return std::fabs(x) >= 65520.0 && std::isfinite(x); });
  return found == values + count ? 0.0f : static_cast<float>(*found);
}

}  // namespace

/// Makes everything in order. Run twice: first without memory, to ask for all of it at once.
class Weights::Builder {
 public:
  Builder(Weights& weights, const PackedWeights& packed, bool only_counts)
      : w_(weights), packed_(packed), only_counts_(only_counts) {}

  int64_t nbytes() const { return nbytes_; }
  /// Of the matrices, in order.
  const std::vector<std::string>& names() const { return names_; }
  /// Whether a file has this matrix.
  bool is_given(const std::string& name) const { return packed_.contains(name); }

  std::unique_ptr<Matrix> matrix(const std::string& name, int64_t rows, int64_t cols, WeightType type) {
    const auto found = packed_.find(name);
    if (only_counts_) {
      names_.push_back(name);
      const int64_t nbytes = w_.backend_.matrix_nbytes(rows, cols, type);
      if (packed_.empty()) {
        nbytes_ = checked_add(nbytes_, nbytes, "weights");
        return nullptr;
      }
      require(found != packed_.end(), ErrorKind::kCheckpoint, "weights: the packed matrix '", name,
              "' is missing among ", packed_.size(), ". Do the config and the checkpoint belong together?");
      require(static_cast<int64_t>(found->second.bytes.size()) == nbytes, ErrorKind::kCheckpoint,
              "weights: the packed matrix '", name, "' of shape ", shape_text({rows, cols}), " as ", type.text(),
              " takes ", nbytes, " bytes, got ", found->second.bytes.size(),
              ". Do the config and the checkpoint belong together?");
      used_.insert(name);
      return nullptr;
    }
    std::unique_ptr<Matrix> made =
        found == packed_.end() ? w_.backend_.create_matrix(rows, cols, type)
                               : w_.backend_.adopt_matrix(rows, cols, type, found->second.bytes, found->second.owner);
    w_.matrices_.push_back({name, made.get()});
    return made;
  }

  /// A tensor of a checkpoint: `count` rows of a matrix.
  struct Part {
    const char* name;
    RowMap rows;
    int64_t count;
  };

  /// A matrix that `parts` share, with their biases.
  Linear linear(const std::string& prefix, const char* name, const std::vector<Part>& parts, int64_t rows, int64_t cols,
                bool has_bias) {
    const WeightType type = w_.plan_.of(prefix + parts.front().name);
    Linear made;
    made.weight = matrix(prefix + name, rows, cols, type);
    if (only_counts_) return made;
    if (has_bias) {
      made.bias_data = allocate_floats(w_.backend_, rows);
      made.bias = TensorView(made.bias_data->data(), DType::kF32, {rows});
    }
    for (const Part& part : parts) {
      slot(
          {.name = prefix + part.name, .shape = {part.count, cols}, .is_matrix = true, .type = type},
          {.matrix = made.weight.get(), .is_packed = packed_.contains(prefix + name), .rows = part.rows, .vector = {}});
      if (has_bias) vector(prefix + part.name + ".bias", made.bias, part.rows, part.count);
    }
    return made;
  }

  Norm norm(const std::string& name, int64_t width) {
    if (only_counts_) return {};
    Norm made = make_norm(w_.backend_, width);
    vector(name, made.weight, {}, width);
    return made;
  }

  /// Throws when a packed matrix found no place.
  void check_packed() const {
    for (const auto& [name, bytes] : packed_) {
      require(used_.contains(name), ErrorKind::kCheckpoint, "weights: the packed matrix '", name,
              "' has no place in this model. Do the config and the checkpoint belong together?");
    }
  }

 private:
  void vector(const std::string& name, const TensorView& vector, const RowMap& rows, int64_t count) {
    slot({.name = name, .shape = {count}, .is_matrix = false, .type = {}},
         {.matrix = nullptr, .is_packed = false, .rows = rows, .vector = vector});
  }

  void slot(Slot slot, const Place& place) {
    w_.index_.emplace(slot.name, w_.slots_.size());
    w_.slots_.push_back(std::move(slot));
    w_.places_.push_back(place);
    w_.loaded_.push_back(place.is_packed ? 1 : 0);
  }

  Weights& w_;
  const PackedWeights& packed_;
  bool only_counts_;
  int64_t nbytes_ = 0;
  std::vector<std::string> names_;
  std::set<std::string, std::less<>> used_;  // names of packed matrices that found their place
};

Weights::Weights(Backend& backend, const ModelConfig& config, const WeightPlan& plan, const PackedWeights& packed)
    : backend_(backend), plan_(plan) {
  // What is packed is what a model that is loaded asks for, however this one keeps it.
  const PackedWeights none;
  Builder loaded(*this, none, /*only_counts=*/true);
  plan_.separate_gate_up = false;
  build(config, loaded);
  packed_names_ = loaded.names();
  plan_ = plan;
  Builder count(*this, packed, /*only_counts=*/true);
  build(config, count);
  count.check_packed();
  backend.require_memory(count.nbytes(), "the weights");
  Builder make(*this, packed, /*only_counts=*/false);
  build(config, make);
}

void Weights::build(const ModelConfig& config, Builder& builder) {
  const int64_t width = config.width;
  const auto table = [&](const char* name, int64_t rows) {
    return builder.linear("", name, {{name, {}, rows}}, rows, width, false).weight;
  };
  embedding_ = table("embedding", config.vocabulary);
  blocks_.clear();
  blocks_.resize(static_cast<size_t>(config.layers));
  for (int64_t layer = 0; layer < config.layers; ++layer) {
    BlockWeights& block = blocks_[static_cast<size_t>(layer)];
    const std::string prefix = "layers." + std::to_string(layer) + ".";
    const auto whole = [&](const char* name, int64_t rows, int64_t cols, bool has_bias) {
      return builder.linear(prefix, name, {{name, {}, rows}}, rows, cols, has_bias);
    };
    block.attention_norm = builder.norm(prefix + "attention_norm", width);
    build_qkv(config, prefix, builder, block);
    block.o = whole("o", width, config.q_size(), config.attention_bias);
    block.ffn_norm = builder.norm(prefix + "feed_forward_norm", width);
    const bool is_one_type = plan_.of(prefix + "gate") == plan_.of(prefix + "up");
    if (is_one_type && !plan_.separate_gate_up && !builder.is_given(prefix + "gate")) {
      block.gate_up = builder.linear(prefix, "gate_up",
                                     {{"gate", gate_rows(), config.ffn_width}, {"up", up_rows(), config.ffn_width}},
                                     gate_up_size(config.ffn_width), width, config.ffn_bias);
    } else {
      block.gate = whole("gate", config.ffn_width, width, config.ffn_bias);
      block.up = whole("up", config.ffn_width, width, config.ffn_bias);
    }
    block.down = whole("down", width, config.ffn_width, config.ffn_bias);
  }
  final_norm_ = builder.norm("final_norm", width);
  if (!config.tied_head) head_ = table("head", config.outputs());
}

/// Neighbours of the same type become one matrix.
void Weights::build_qkv(const ModelConfig& config, const std::string& prefix, Builder& builder, BlockWeights& block) {
  struct Tensor {
    const char* name;
    int64_t rows;
  };
  const std::array<Tensor, 3> tensors = {{{"q", config.q_size()}, {"k", config.kv_size()}, {"v", config.kv_size()}}};
  int64_t begin = 0;
  for (size_t first = 0; first < tensors.size();) {
    const WeightType type = plan_.of(prefix + tensors[first].name);
    std::vector<Builder::Part> parts;
    std::string name;
    int64_t rows = 0;
    size_t next = first;
    for (; next < tensors.size() && plan_.of(prefix + tensors[next].name) == type; ++next) {
      parts.push_back({tensors[next].name, {.begin = rows}, tensors[next].rows});
      name += tensors[next].name;
      rows += tensors[next].rows;
    }
    block.qkv.push_back(
        {builder.linear(prefix, name.c_str(), parts, rows, config.width, config.attention_bias), begin});
    begin += rows;
    first = next;
  }
}

size_t Weights::find(std::string_view slot) const {
  const auto found = index_.find(slot);
  require(
      found != index_.end(), ErrorKind::kCheckpoint, "weights: there is no slot '", slot,
      "' in this model. Does the config say how many layers there are, and whether there are biases or a tied head?");
  return found->second;
}

const Weights::Place& Weights::place_to_fill(std::string_view slot) const {
  const Place& place = places_[find(slot)];
  require(!place.is_packed, ErrorKind::kCheckpoint, "weights: '", slot,
          "' is packed already, and cannot be filled again");
  return place;
}

void Weights::load(std::string_view slot, const TensorView& source, const TensorView& importance) {
  const size_t index = find(slot);
  check_source(slots_[index], source);
  const Place& place = place_to_fill(slot);
  std::vector<float> values;
  if (place.matrix != nullptr) {
    if (slots_[index].type.encoding == Encoding::kF16) {
      const float beyond = first_beyond_f16(source);
      require(beyond == 0.0f, ErrorKind::kNumeric, "weights: '", slot, "' has a weight of ", beyond,
              ", and the largest number of float16 is 65504. Load it as bfloat16 or float32");
    }
    backend_.write_rows(*place.matrix, place.rows, source, importance);
  } else {
    values.resize(static_cast<size_t>(source.size()));
    for (int64_t i = 0; i < source.size(); ++i) values[static_cast<size_t>(i)] = element_as_f32(source, i);
    for_each_run(place.rows, source.size(), [&](int64_t from, int64_t to, int64_t count) {
      backend_.copy_to_device(place.vector.f32() + to, values.data() + from,
                              static_cast<size_t>(count) * sizeof(float));
    });
  }
  backend_.synchronize();  // `source` is the caller's, and may be gone when we return; `values` are read until now, too
  loaded_[index] = 1;
}

void Weights::load_blocks(std::string_view slot, const GgmlType& ggml, std::span<const std::byte> blocks) {
  const size_t index = find(slot);
  require(slots_[index].is_matrix, ErrorKind::kDType, "weights: '", slot, "' is a vector, and cannot be ", ggml.name,
          " blocks");
  const Place& place = place_to_fill(slot);
  backend_.write_blocks(*place.matrix, place.rows, ggml, slots_[index].shape[0], blocks);
  backend_.synchronize();
  loaded_[index] = 1;
}

void Weights::load_codes(std::string_view slot, const CodeRows& codes) {
  const size_t index = find(slot);
  require(slots_[index].is_matrix, ErrorKind::kDType, "weights: '", slot, "' is a vector, and has no codes");
  const Place& place = place_to_fill(slot);
  require(codes.rows == slots_[index].shape[0], ErrorKind::kShape, "weights: '", slot, "' has ", slots_[index].shape[0],
          " rows, got codes of ", codes.rows);
  backend_.write_codes(*place.matrix, place.rows, codes);
  backend_.synchronize();
  loaded_[index] = 1;
}

void Weights::copy_from(const Weights& source, std::string_view name) {
  const size_t index = find(name);
  const Slot& slot = slots_[index];
  const Slot& other = source.slots_[source.find(name)];
  require(slot.shape == other.shape, ErrorKind::kShape, "weights: '", name, "' has shape ", shape_text_of(slot.shape),
          ", and what is to be copied ", shape_text_of(other.shape));
  const Place& from = source.place(name);
  const Place& to = place_to_fill(name);
  if (to.matrix != nullptr && from.matrix->type() == to.matrix->type()) {
    backend_.copy_rows(*to.matrix, to.rows, *from.matrix, from.rows, slot.shape[0]);
    backend_.synchronize();
    loaded_[index] = 1;
    return;
  }
  const int64_t size = slot.is_matrix ? slot.shape[0] * slot.shape[1] : slot.shape[0];
  std::vector<float> values(static_cast<size_t>(size));
  const TensorView view = slot.is_matrix ? TensorView(values.data(), DType::kF32, {slot.shape[0], slot.shape[1]})
                                         : TensorView(values.data(), DType::kF32, {size});
  source.read(name, view);
  load(name, view, {});
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

void Weights::read_codes(std::string_view slot, const std::function<void(int64_t, const QuantizedRow&)>& visit) const {
  const size_t index = find(slot);
  const Place& place = places_[index];
  require(place.matrix != nullptr, ErrorKind::kDType, "weights: '", slot, "' is a vector, and has no codes");
  backend_.read_codes(*place.matrix, place.rows, slots_[index].shape[0], visit);
}

bool Weights::has_separate_gate_up() const {
  return std::all_of(blocks_.begin(), blocks_.end(),
                     [](const BlockWeights& block) { return block.gate.weight != nullptr; });
}

PackedBytes Weights::packed(std::string_view name) const {
  require(std::find(packed_names_.begin(), packed_names_.end(), name) != packed_names_.end(), ErrorKind::kCheckpoint,
          "packed: there is no matrix '", name, "' in this model");
  for (const NamedMatrix& each : matrices_) {
    if (each.name == name) return {.bytes = backend_.packed_bytes(*each.matrix), .owner = nullptr};
  }
  // Only gate and up may be apart here and one matrix in a file.
  const std::string_view prefix = name.substr(0, name.size() - std::string_view("gate_up").size());
  const Matrix& gate = *place(cat(prefix, "gate")).matrix;
  const Matrix& up = *place(cat(prefix, "up")).matrix;
  const std::shared_ptr<Matrix> both = backend_.create_matrix(gate_up_size(gate.rows()), gate.cols(), gate.type());
  backend_.copy_rows(*both, gate_rows(), gate, {}, gate.rows());
  backend_.copy_rows(*both, up_rows(), up, {}, up.rows());
  backend_.synchronize();
  return {.bytes = backend_.packed_bytes(*both), .owner = both};
}

std::vector<std::string> Weights::missing() const {
  std::vector<std::string> names;
  for (size_t i = 0; i < slots_.size(); ++i) {
    if (loaded_[i] == 0) names.push_back(slots_[i].name);
  }
  return names;
}

int64_t Weights::nbytes() const {
  int64_t total = 0;
  for (const NamedMatrix& each : matrices_) total += each.matrix->nbytes();
  for (const Slot& slot : slots_) {
    if (!slot.is_matrix) total += slot.shape[0] * static_cast<int64_t>(sizeof(float));
  }
  return total;
}

}  // namespace llama_ext
