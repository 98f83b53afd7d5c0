#include "model/rope_table.h"

#include <algorithm>
#include <numeric>
#include <utility>

namespace llama_ext {
namespace {

constexpr int64_t kBlockPositions = 64;

}  // namespace

RopeTable::RopeTable(const RopeConfig& config, int64_t positions)
    : config_(config),
      inverse_frequencies_(rope_inverse_frequencies(config)),
      positions_(positions),
      blocks_(std::make_unique<Block[]>(static_cast<size_t>((positions + kBlockPositions - 1) / kBlockPositions))) {}

const RopeTable::Block& RopeTable::block(int64_t index) const {
  Block& block = blocks_[static_cast<size_t>(index)];
  std::call_once(block.once, [&] {
    std::vector<int64_t> positions(static_cast<size_t>(kBlockPositions));
    std::iota(positions.begin(), positions.end(), index * kBlockPositions);
    const size_t size = static_cast<size_t>(kBlockPositions) * inverse_frequencies_.size();
    std::vector<float> cos(size);
    std::vector<float> sin(size);
    rope_angles(config_, inverse_frequencies_, positions.data(), kBlockPositions, cos.data(), sin.data());
    block.cos = std::move(cos);
    block.sin = std::move(sin);
  });
  return block;
}

void RopeTable::copy(const int64_t* positions, int64_t count, float* cos, float* sin) const {
  const int64_t pairs = static_cast<int64_t>(inverse_frequencies_.size());
  for (int64_t i = 0; i < count; ++i) {
    if (positions[i] >= positions_) {
      rope_angles(config_, inverse_frequencies_, positions + i, 1, cos + i * pairs, sin + i * pairs);
      continue;
    }
    const Block& from = block(positions[i] / kBlockPositions);
    const int64_t at = positions[i] % kBlockPositions * pairs;
    std::copy_n(from.cos.data() + at, pairs, cos + i * pairs);
    std::copy_n(from.sin.data() + at, pairs, sin + i * pairs);
  }
}

}  // namespace llama_ext
