#include "generate/prefix.h"

#include <algorithm>
#include <numeric>

#include "core/interrupt.h"

namespace llama_ext {

int64_t common_prefix(const std::vector<int32_t>& a, const std::vector<int32_t>& b) {
  const auto end = a.begin() + static_cast<int64_t>(std::min(a.size(), b.size()));
  return std::mismatch(a.begin(), end, b.begin()).first - a.begin();
}

std::vector<size_t> prefix_order(const std::vector<std::vector<int32_t>>& prompts) {
  std::vector<size_t> order(prompts.size());
  std::iota(order.begin(), order.end(), size_t{0});
  // In the order of a dictionary a prompt shares most with a neighbour, and so do all that share anything.
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) {
    throw_if_interrupted();
    return prompts[a] < prompts[b];
  });
  // Each group is known by its first member.
  std::vector<size_t> group(prompts.size());
  for (size_t begin = 0, end = 0; begin < order.size(); begin = end) {
    size_t first = order[begin];
    for (end = begin + 1; end < order.size(); ++end) {
      const std::vector<int32_t>& before = prompts[order[end - 1]];
      const std::vector<int32_t>& here = prompts[order[end]];
      if (common_prefix(before, here) < kWorthWaiting && before != here) break;
      first = std::min(first, order[end]);
    }
    for (size_t i = begin; i < end; ++i) group[order[i]] = first;
  }
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return group[a] < group[b]; });
  return order;
}

}  // namespace llama_ext
