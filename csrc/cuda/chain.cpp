#include "cuda/chain.h"

#include <algorithm>
#include <memory>

namespace llama_ext::cuda {
namespace {

/// Of attention, the most parts for each block: a block has one at a time, a kernel of its own has three on a multiprocessor.
constexpr int64_t kMostPartsEach = 2;

class Chain final : public PutOff {
 public:
  explicit Chain(const Gpu& gpu) : gpu_(gpu) {}
  void add(const Link& link) { links_.push_back(link); }

  void start() override {
    if (links_.size() == 1 || !can_run_chain(gpu_, links_)) {
      for (const Link& link : links_) {
        link.is_attention ? start_attention_decode(gpu_, link.attention) : rows_mma::start_rows_mma(gpu_, link.product);
      }
      return;
    }
    // Not from what operations gave back: that of the links is still in use.
    Arena& arena = Capture::of(gpu_)->arena();
    const size_t nbytes = links_.size() * sizeof(Link);
    auto* links = static_cast<Link*>(arena.keep(nbytes));
    auto* counters = static_cast<ChainCounters*>(arena.keep(sizeof(ChainCounters)));
    gpu_.copy_to_device_now(links, links_.data(), nbytes);
    run_chain(gpu_, links, links_, counters);
  }

 private:
  const Gpu& gpu_;
  std::vector<Link> links_;
};

void add(const Gpu& gpu, const Link& link) {
  Capture& capture = *Capture::of(gpu);
  auto* chain = dynamic_cast<Chain*>(capture.put_off());
  if (chain == nullptr) {
    capture.stream();  // whatever else is put off comes first
    auto made = std::make_unique<Chain>(gpu);
    chain = made.get();
    capture.put_off(std::move(made));
  }
  chain->add(link);
}

bool can_chain(const Gpu& gpu) { return gpu.chains() && Capture::of(gpu) != nullptr; }

}  // namespace

bool chain_product(const Gpu& gpu, const rows_mma::RowsMmaView& product) {
  if (!can_chain(gpu) || rows_mma::rows_mma_shared_bytes(product.product) > kMostOwnBytes) return false;
  Link link;
  link.product = product;
  add(gpu, link);
  return true;
}

bool chain_attention(const Gpu& gpu, const DecodeView& attention) {
  const AttentionView& a = attention.attention;
  const int64_t parts = a.segments.tokens * a.segments.of[0].layer.kv_heads * a.parts;
  if (!can_chain(gpu) || parts > kMostPartsEach * gpu.multiprocessors()) return false;
  Link link;
  link.is_attention = true;
  link.attention = attention;
  add(gpu, link);
  return true;
}

}  // namespace llama_ext::cuda
