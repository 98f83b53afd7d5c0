// Sequences of a pass as an argument of a kernel, some at a time.
#pragma once

#include <algorithm>

#include "cuda/kernels.h"
#include "cuda/launch.h"

namespace llama_ext::cuda {

inline constexpr int kMostRanges = 128;
inline constexpr int64_t kDropoutPlaces = int64_t{1} << 20;  // ops/causal_attention.h

struct Ranges {
  TokenRange of[kMostRanges];
  int count = 0;
  int64_t tokens = 0;

  /// The range of token `index` of all; `index` becomes its place there.
  __device__ const TokenRange& find(int64_t& index) const {
    int i = 0;
    while (index >= of[i].tokens) index -= of[i++].tokens;
    return of[i];
  }
  /// How many blocks of `size` tokens they take, none with tokens of two ranges.
  int64_t blocks(int size) const {
    int64_t sum = 0;
    for (int i = 0; i < count; ++i) sum += blocks_for(of[i].tokens, size);
    return sum;
  }
  /// The range of block `index` of those; `index` becomes the block's first token there.
  __device__ const TokenRange& find_block(int64_t& index, int size) const {
    int i = 0;
    for (int64_t here; index >= (here = blocks_for(of[i].tokens, size)); ++i) index -= here;
    index *= size;
    return of[i];
  }
};

/// Calls start(list) for some ranges after the others.
template <typename Start>
void for_each_list(const TokenRange* ranges, int64_t count, const Start& start) {
  for (int64_t begin = 0; begin < count; begin += kMostRanges) {
    Ranges list;
    list.count = static_cast<int>(std::min<int64_t>(kMostRanges, count - begin));
    for (int i = 0; i < list.count; ++i) {
      list.of[i] = ranges[begin + i];
      list.tokens += ranges[begin + i].tokens;
    }
    if (list.tokens > 0) start(list);
  }
}

}  // namespace llama_ext::cuda
