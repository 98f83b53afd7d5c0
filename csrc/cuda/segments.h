// Segments of a pass as an argument of a kernel: some at a time, so that nothing is copied and nobody waits.
#pragma once

#include <algorithm>

#include "cuda/kv_layout.h"

namespace llama_ext::cuda {

inline constexpr int kMostSegments = 24;

struct SegmentList {
  KvSegmentView of[kMostSegments];
  int count = 0;
  int64_t tokens = 0;  // of all

  /// The segment that token `index` of all belongs to; `index` becomes its place there.
  __device__ const KvSegmentView& find(int64_t& index) const {
    int i = 0;
    while (index >= of[i].tokens) index -= of[i++].tokens;
    return of[i];
  }
};

/// Tokens [first, first + count) of a list, as far as there are any. Of segments with a live position all or none.
inline SegmentList tokens_of(const SegmentList& list, int64_t first, int64_t count) {
  SegmentList some;
  for (int i = 0; i < list.count; ++i) {
    KvSegmentView segment = list.of[i];
    const int64_t begin = std::clamp<int64_t>(first, 0, segment.tokens);
    const int64_t end = std::clamp<int64_t>(first + count, begin, segment.tokens);
    first -= segment.tokens;
    if (begin == end) continue;
    segment.row += begin;
    segment.position += begin;
    segment.tokens = end - begin;
    some.of[some.count++] = segment;
    some.tokens += segment.tokens;
  }
  return some;
}

/// Calls start(list) for some segments after the others.
template <typename Start>
void for_each_list(const KvSegmentView* segments, int64_t count, Start&& start) {
  for (int64_t begin = 0; begin < count; begin += kMostSegments) {
    SegmentList list;
    list.count = static_cast<int>(std::min<int64_t>(kMostSegments, count - begin));
    for (int i = 0; i < list.count; ++i) {
      list.of[i] = segments[begin + i];
      list.tokens += segments[begin + i].tokens;
    }
    if (list.tokens > 0) start(list);
  }
}

}  // namespace llama_ext::cuda
