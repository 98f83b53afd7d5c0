// kv_store and attention of one new token a sequence in one kernel, for caches of bfloat16: decoding. A block has 128 keys, at an
// absolute position, of one key/value head of a token, for all of the query heads that share it, which are the rows of products on
// the tensor cores: both are read once. Its warps share out tiles of 8 keys, then tiles of 8 dimensions. The block that has the new
// token's position rotates, rounds and stores its key and value. Blocks leave their parts in memory, and the last one to do so merges
// them in order: neither which one that is nor how many warps there are changes any bits. Bound by the cache's memory.
#include "cuda/attention_decode.h"
#include "cuda/chain.h"
#include "cuda/chain_links.h"

namespace llama_ext::cuda {
namespace {

struct DecodeView {
  SegmentList segments;
  DecodeArgs args;
};

template <int kDim>
__global__ void __launch_bounds__(kDecodeThreads) attention_decode_kernel(const __grid_constant__ DecodeView view) {
  const auto token = static_cast<int>(blockIdx.x);
  attend_to_part<kDim>(view.args, view.segments.of[token], *reinterpret_cast<DecodeShared<kDim>*>(shared_memory()),
                       token, static_cast<int>(blockIdx.y), static_cast<int>(blockIdx.z),
                       [] { wait_for_predecessors(); });
}

template <int kDim>
void start(const Gpu& gpu, const DecodeView& view) {
  const KvLayerView& layer = view.segments.of[0].layer;
  divide_alike(gpu, attention_decode_kernel<kDim>);
  launch<Start::kEarly>(gpu, attention_decode_kernel<kDim>,
                        dim3(static_cast<unsigned>(view.segments.tokens), static_cast<unsigned>(layer.kv_heads),
                             static_cast<unsigned>(view.args.parts)),
                        kDecodeThreads, sizeof(DecodeShared<kDim>), view);
}
void start(const Gpu& gpu, const DecodeView& view) {
  view.segments.of[0].layer.head_dim <= 64 ? start<64>(gpu, view) : start<128>(gpu, view);
}

}  // namespace

bool has_attention_decode(const KvSegmentView* segments, int64_t count, int heads) {
  for (int64_t i = 0; i < count; ++i) {
    if (segments[i].tokens != 1 || (segments[i].position + 1) > int64_t{65535} * kDecodeKeys) return false;
  }
  const KvLayerView& layer = segments[0].layer;
  return layer.kind == KvKind::kBF16 && layer.head_dim % 8 == 0 && layer.head_dim <= 128 &&
         heads / layer.kv_heads <= kQueryRows && layer.kv_heads <= kMostDecodeHeads;
}

void attention_decode(const Gpu& gpu, const KvSegmentView* segments, int64_t count, const KvRowsView& rows, Rows q,
                      int heads, float scale, Rows y, int* arrived) {
  for_each_list(segments, count, [&](const SegmentList& list) {
    const KvLayerView& layer = list.of[0].layer;
    DecodeView view;
    view.segments = list;
    DecodeArgs& a = view.args;
    a.q = q;
    a.y = y;
    a.heads = heads;
    a.group = heads / layer.kv_heads;
    a.scale = scale;
    a.parts = static_cast<int>(blocks_for(longest_row(list), kDecodeKeys));
    a.rows = rows;
    a.arrived = arrived;
    const int64_t numbers = a.parts > 1 ? list.tokens * heads * a.parts * (layer.head_dim + 2) : 0;
    const Scratch partial(gpu, static_cast<size_t>(numbers) * sizeof(float));
    a.partial = partial.as<float>();
    if (count == 1 && chain_attention(gpu, a, list.of[0])) return;
    start(gpu, view);
  });
}

void start_attention_decode(const Gpu& gpu, const DecodeArgs& args, const KvSegmentView& segment) {
  DecodeView view;
  view.segments.of[0] = segment;
  view.segments.count = 1;
  view.segments.tokens = 1;
  view.args = args;
  start(gpu, view);
}

}  // namespace llama_ext::cuda
