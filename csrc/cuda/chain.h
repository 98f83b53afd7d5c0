// Products of few rows and decoding attention, one after the other in a recording, as links of one kernel.
//
// A kernel after another costs a token more than its weights: memory idles from the last loads of one to the first of the next, while
// results are written, the next one's blocks start, bring x and look at it. A chain's blocks stay on their multiprocessors for all links. Four
// warps of each have the copy engine fill a ring in shared memory with the weights of what comes, whatever link that belongs to, and
// the others take them from there; between links blocks meet at a counter in the GPU's memory, while the ring fills.
#pragma once

#include <vector>

#include "cuda/link_views.h"

namespace llama_ext::cuda {

struct alignas(16) Link {
  bool is_attention = false;
  rows_mma::RowsMmaView product;
  DecodeView attention;
};

/// Of a block's shared memory, what a link may have for itself; the ring has the rest. Attention with heads of 128 needs 75 KB.
inline constexpr size_t kMostOwnBytes = size_t{80} * 1024;

/// Whether the product or attention has become a link: where the calling thread records and the GPU chains, and what a block needs
/// leaves room for the ring. It starts with the last one, before anything else.
bool chain_product(const Gpu& gpu, const rows_mma::RowsMmaView& product);
bool chain_attention(const Gpu& gpu, const DecodeView& attention);

// chain.cu
/// What blocks count in: all zeros, before and after.
struct ChainCounters {
  uint64_t arrived = 0;  // over all links
  unsigned left = 0;
};
/// Whether the GPU has room for all of a chain's blocks at the same time.
bool can_run_chain(const Gpu& gpu, const std::vector<Link>& links);
/// links: the GPU's memory, a copy of `of`.
void run_chain(const Gpu& gpu, const Link* links, const std::vector<Link>& of, ChainCounters* counters);

}  // namespace llama_ext::cuda
