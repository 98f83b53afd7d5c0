// Products of one row and decoding attention, one after the other in a recording, as links of one kernel.
//
// A kernel after another costs a token more than its weights: memory idles from the last loads of one to the first of the next, while
// results are written, the next one's blocks start, bring x and look at it. A chain's blocks stay on their multiprocessors for all links. Each
// warp of them has places in shared memory, into which it brings the weights of what comes, whatever link that belongs to, and takes them
// in that order; between links blocks meet at a counter in the GPU's memory, while the places fill.
#pragma once

#include <vector>

#include "cuda/kernels.h"

namespace llama_ext::cuda {

struct DecodeArgs;

/// Whether operations that the calling thread asks for may become links: it records, and the GPU chains.
bool can_chain(const Gpu& gpu);
/// Whether the product, which takes_one_row() takes, or attention of one token, has become a link: where can_chain(), and what a block needs
/// leaves room for the places. It starts with the last one, before anything else.
bool chain_product(const Gpu& gpu, const ProductView& product);
bool chain_attention(const Gpu& gpu, const DecodeArgs& args, const KvSegmentView& segment);

}  // namespace llama_ext::cuda
