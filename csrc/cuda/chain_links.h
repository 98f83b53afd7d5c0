// The links of a chain (chain.h), for who collects and who runs them.
#pragma once

#include <cuda.h>

#include <vector>

#include "cuda/attention_decode.h"
#include "cuda/one_row.h"

namespace llama_ext::cuda {

struct alignas(16) Link {
  bool is_attention = false;
  // Of a product: where its rows' scales go, 0 or 1; whether they begin to come when it begins, or earlier; the product whose scales begin
  // to come when this one begins, or none.
  int scales = 0;
  bool brings_own = false;
  int brings = -1;
  int map = 0;  // its codes', of all products
  rows_mma::OneRowView product;
  KvSegmentView segment;
  DecodeArgs attention;
};

/// Products of a chain, the most. Maps in the GPU's memory would need a fence each before they are used; as arguments of the kernel, of which there
/// are 32,764 bytes, they need none.
inline constexpr int kMostProducts = 192;

/// What blocks count in: all zeros, before and after.
struct ChainCounters {
  uint64_t arrived = 0;  // over all links
  unsigned left = 0;
};
/// Of a block's shared memory.
struct ChainMemory {
  size_t own;  // of a link
  size_t scales_at[2];
  size_t places_at;
  int places;  // of a warp
  size_t all;
};
/// Says where scales go, and when they come.
ChainMemory plan_chain(const Gpu& gpu, std::vector<Link>& links);
/// Whether the GPU has room for all of a chain's blocks at the same time.
bool can_run_chain(const Gpu& gpu, const std::vector<Link>& links, const ChainMemory& memory);
/// links: the GPU's memory, a copy of `of`.
void run_chain(const Gpu& gpu, const Link* links, const std::vector<Link>& of, const ChainMemory& memory,
               ChainCounters* counters);

void start_attention_decode(const Gpu& gpu, const DecodeArgs& args, const KvSegmentView& segment);

}  // namespace llama_ext::cuda
