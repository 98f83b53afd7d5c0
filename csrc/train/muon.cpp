#include "train/muon.h"

#include <algorithm>
#include <cmath>
#include <set>

#include "backend/range.h"
#include "core/checked.h"
#include "core/interrupt.h"
#include "model/scaled.h"
#include "train/optimizer.h"
#include "train/pass_parts.h"

namespace llama_ext {
namespace {

constexpr double kMuonMomentum = 0.95;
constexpr double kUpdateSize = 0.2;
constexpr double kLeastNorm = 1e-7;  // added to the norm
constexpr int kIterations = 5;
constexpr double kA = 3.4445;
constexpr double kB = -4.7750;
constexpr double kC = 2.0315;
// Every part of the memory begins at a cache line.
constexpr int64_t kRegionFloats = 16;

bool takes(const Parameters& parameters, const ParameterSlot& slot) {
  return parameters.all()[slot.parameter].is_block_matrix;
}

int64_t longer_side(const ParameterSlot& slot) { return std::max(slot.shape[0], slot.shape[1]); }
int64_t shorter_side(const ParameterSlot& slot) { return std::min(slot.shape[0], slot.shape[1]); }

double momentum_of(const OptimizerOptions& options) {
  return options.momentum > 0.0 ? options.momentum : kMuonMomentum;
}

TensorView flat(const TensorView& x) { return {x.data(), DType::kF32, {x.size()}}; }

}  // namespace

Muon::Muon(Backend& backend, const Parameters& parameters, Compute compute) : backend_(backend), compute_(compute) {
  int64_t most = 0;
  std::set<int64_t> widths;
  for (const ParameterSlot& slot : parameters.slots()) {
    if (!takes(parameters, slot)) continue;
    const int64_t width = shorter_side(slot);
    most = std::max(most, checked_mul(longer_side(slot), width, "muon"));
    widths.insert(width);
  }
  if (most == 0) return;
  const int64_t widest = *widths.rbegin();
  next_at_ = round_up(most, kRegionFloats);
  gram_at_ = 2 * next_at_;
  square_at_ = gram_at_ + round_up(widest * widest, kRegionFloats);
  const int64_t memory = checked_mul(square_at_ + widest * widest, sizeof(float), "muon");
  const WeightType type{Encoding::kF32};
  int64_t bytes = memory;
  for (const int64_t width : widths) bytes = checked_add(bytes, backend.matrix_nbytes(width, width, type), "muon");
  const int64_t workers = most <= kMostWeightsOfSmall ? int64_t{backend.threads()} : 1;
  backend.require_memory(checked_mul(workers, bytes, "muon"), "train: the steps of muon");
  for (int64_t worker = 0; worker < workers; ++worker) {
    Scratch& scratch = scratch_.emplace_back();
    scratch.memory = backend.allocate(static_cast<size_t>(memory));
    for (const int64_t width : widths) scratch.products[width] = backend.create_matrix(width, width, type);
  }
}

int64_t Muon::nbytes() const {
  int64_t total = 0;
  for (const Scratch& scratch : scratch_) {
    total += static_cast<int64_t>(scratch.memory->nbytes());
    for (const auto& [width, matrix] : scratch.products) total += matrix->nbytes();
  }
  return total;
}

TensorView Muon::view(const Scratch& scratch, int64_t at, int64_t rows, int64_t cols) const {
  return {static_cast<float*>(scratch.memory->data()) + at, DType::kF32, {rows, cols}};
}

std::vector<bool> Muon::set_directions(const OptimizerOptions& options, Parameters& parameters, double gradient_scale) {
  std::vector<Parameter>& all = parameters.all();
  std::vector<bool> is_directed(all.size(), false);
  std::vector<const ParameterSlot*> slots;
  for (const ParameterSlot& slot : parameters.slots()) {
    if (!takes(parameters, slot)) continue;
    slots.push_back(&slot);
    if (is_directed[slot.parameter]) continue;
    is_directed[slot.parameter] = true;
    // Of all tensors that share the matrix at once: velocity += g - (1 - momentum) velocity.
    const Parameter& parameter = all[slot.parameter];
    backend_.sgd({.parameter = parameter.moments[0],
                  .gradient = parameter.gradient,
                  .gradient_scale = gradient_scale,
                  .lr = -1.0,
                  .decay = momentum_of(options) - 1.0});
  }
  const auto set = [&](int64_t index, int worker) {
    const ParameterSlot& slot = *slots[static_cast<size_t>(index)];
    set_direction(options, all[slot.parameter], slot, gradient_scale, scratch_[static_cast<size_t>(worker)]);
  };
  const auto count = static_cast<int64_t>(slots.size());
  if (scratch_.size() > 1) {
    backend_.for_each_part(count, set);
  } else {
    for (int64_t index = 0; index < count; ++index) set(index, 0);
  }
  return is_directed;
}

void Muon::set_direction(const OptimizerOptions& options, Parameter& parameter, const ParameterSlot& slot,
                         double gradient_scale, const Scratch& scratch) const {
  throw_if_interrupted();
  const Range range(backend_, "muon ", slot.name);
  const bool is_wide = slot.shape[0] < slot.shape[1];
  const int64_t height = longer_side(slot);
  const int64_t width = shorter_side(slot);
  Direction direction{.x = view(scratch, 0, height, width), .next = view(scratch, next_at_, height, width)};
  backend_.load_rows(*parameter.matrix_moments[0], slot.rows, direction.x, is_wide);
  double factor = 1.0;  // of x, to be the direction
  if (options.nesterov) {
    backend_.load_rows(*parameter.matrix_gradient, slot.rows, direction.next, is_wide);
    add_scaled(backend_, direction.next, direction.x, gradient_scale / momentum_of(options));
    factor = momentum_of(options);
  }
  const double norm = factor * std::sqrt(backend_.sum_of_squares(flat(direction.x)));
  require(std::isfinite(norm), ErrorKind::kNumeric, "muon: the direction of '", slot.name, "' has the norm ", norm,
          ". Gradients have grown beyond float32: try a lower learning rate, a warmup, or clip_norm");
  set_scaled(backend_, direction.x, direction.x, factor / (norm + kLeastNorm));
  orthogonalize(direction, kUpdateSize * std::sqrt(static_cast<double>(height)), scratch);
  backend_.store_rows(*parameter.matrix_gradient, slot.rows, direction.x, is_wide);
}

/// x becomes scale times the nearest matrix with orthonormal columns, roughly.
void Muon::orthogonalize(Direction& direction, double scale, const Scratch& scratch) const {
  const int64_t width = direction.x.dim(1);
  const TensorView gram = view(scratch, gram_at_, width, width);
  const TensorView square = view(scratch, square_at_, width, width);
  // First A, then the polynomial in A: both symmetric, so a product with their rows is one with their columns.
  Matrix& products = *scratch.products.at(width);
  for (int i = 0; i < kIterations; ++i) {
    const double factor = i + 1 == kIterations ? scale : 1.0;
    backend_.zero(backend_.values(products));
    backend_.matmul_backward({.d_y = direction.x, .x = direction.x, .d_weight = &products, .compute = compute_});
    backend_.load_rows(products, {}, gram, /*transposes=*/false);
    backend_.matmul({.x = gram, .weight = &products, .bias = {}, .y = square, .compute = compute_});
    set_scaled(backend_, square, square, factor * kC);
    add_scaled(backend_, gram, square, factor * kB);
    backend_.store_rows(products, {}, square, /*transposes=*/false);
    // Not as a I in the polynomial, where a product that rounds would round it: noise in directions that a gradient of low rank
    // does not have grows 3.4445^5 times.
    set_scaled(backend_, direction.x, direction.next, factor * kA);
    backend_.matmul({.x = direction.x,
                     .weight = &products,
                     .bias = {},
                     .y = direction.next,
                     .accumulate = true,
                     .compute = compute_});
    std::swap(direction.x, direction.next);
  }
}

}  // namespace llama_ext
