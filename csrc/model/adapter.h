// LoRA: low-rank additions to the matrices of a model, whose own weights stay as they are.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "model/weights.h"

namespace llama_ext {

/// The matrices of a block that may have an addition, by the names of their slots: q, k, v, o, gate, up, down.
enum class Target : uint8_t { kQ, kK, kV, kO, kGate, kUp, kDown };
inline constexpr int kTargetCount = 7;

/// y += scale (x A^T) B^T beside y = x W^T. Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021.
struct LowRank {
  std::unique_ptr<Matrix> a;  // (rank, in) f32
  std::unique_ptr<Matrix> b;  // (out, rank) f32
  double scale = 1.0;

  explicit operator bool() const { return a != nullptr; }
};

/// What one adapter adds. Its matrices start as zeros, so that a new one changes nothing. Sessions share it as they share weights.
class Adapter {
 public:
  struct Shape {
    int64_t rank = 0;
    double scale = 1.0;
  };
  /// targets: by slot, "layers.0.q". Throws OptionError for a slot without matrix, a rank out of range, a scale that is not finite.
  Adapter(std::shared_ptr<Backend> backend, const ModelConfig& config, const std::map<std::string, Shape>& targets);

  struct Entry {
    std::string slot;
    LowRank* part = nullptr;
  };
  /// In the order of the layers.
  const std::vector<Entry>& entries() const { return entries_; }
  const LowRank& part(int64_t layer, Target target) const {
    return layers_[static_cast<size_t>(layer)][static_cast<size_t>(target)];
  }
  /// Throws CheckpointError when there is none for this slot.
  LowRank& find(std::string_view slot) const;
  /// The largest rank.
  int64_t rank() const { return rank_; }
  int64_t nbytes() const;
  Backend& backend() const { return *backend_; }
  /// Throws ShapeError unless it was made for a model of these shapes.
  void require_fits(const ModelConfig& config) const;

 private:
  std::shared_ptr<Backend> backend_;
  ModelConfig config_;
  std::vector<std::array<LowRank, kTargetCount>> layers_;
  std::vector<Entry> entries_;
  int64_t rank_ = 0;
};

/// y += scale (x A^T) B^T. x: (M, in), y: (M, out) f32, rows may be strided. scratch: (M, rank at least) f32, contiguous.
void add_low_rank(Backend& backend, const LowRank& part, const TensorView& x, const TensorView& y,
                  const TensorView& scratch);

}  // namespace llama_ext
