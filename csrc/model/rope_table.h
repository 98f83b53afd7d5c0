// Cosines and sines of positions, computed once for all passes of a model: in float64 they take longer than a layer on a GPU.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "ops/rope.h"

namespace llama_ext {

/// May be used from several threads at once. Memory grows with the positions asked for, in blocks.
class RopeTable {
 public:
  /// positions: how many are kept at most; others are computed whenever they are asked for.
  RopeTable(const RopeConfig& config, int64_t positions);

  const std::vector<double>& inverse_frequencies() const { return inverse_frequencies_; }
  /// What rope_angles() gives, bit for bit. positions: (count), each at least 0. cos, sin: (count, D/2).
  void copy(const int64_t* positions, int64_t count, float* cos, float* sin) const;

 private:
  struct Block {
    std::once_flag once;
    std::vector<float> cos;
    std::vector<float> sin;
  };
  const Block& block(int64_t index) const;

  RopeConfig config_;
  std::vector<double> inverse_frequencies_;
  int64_t positions_;
  std::unique_ptr<Block[]> blocks_;
};

}  // namespace llama_ext
