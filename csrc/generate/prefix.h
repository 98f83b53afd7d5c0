// What sequences have in common at their beginnings, so that it is computed once.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace llama_ext {

/// A prefix of so many tokens is worth a step of waiting for the sequence that is computing it: a pass over the weights
/// costs about as much as the arithmetic of that many tokens.
inline constexpr int64_t kWorthWaiting = 16;

/// The length of the longest common beginning.
int64_t common_prefix(const std::vector<int32_t>& a, const std::vector<int32_t>& b);

/// An order of the prompts, as their indices: prompts with a common beginning of at least kWorthWaiting tokens are
/// neighbours, so that of all earlier ones a prompt has most in common with the one right before it. Such groups stand
/// in the order of their first members, so prompts that share nothing keep theirs. Throws Interrupted.
std::vector<size_t> prefix_order(const std::vector<std::vector<int32_t>>& prompts);

}  // namespace llama_ext
