// The arguments of kernels of attention.
#pragma once

#include "cuda/kernels.h"
#include "cuda/segments.h"

namespace llama_ext::cuda {

struct AttentionView {
  SegmentList segments;
  Rows q;
  Rows y;
  int heads = 0;   // H
  int group = 0;   // H / K
  int shares = 1;  // blocks that share a group of heads
  float scale = 1.0f;
  int parts = 0;             // of the keys of the longest row, each by a block of its own; 0: no split
  float* partial = nullptr;  // (tokens, H, parts): largest, sum, head_dim sums
};

}  // namespace llama_ext::cuda
