// Links of a recording, collected until something else comes; then their kernel, or kernels of their own (chain.h).
#include "cuda/chain.h"

#include <algorithm>
#include <memory>

#include "cuda/chain_links.h"

namespace llama_ext::cuda {
namespace {

/// Of attention, the most parts for each block: a block has one at a time, a kernel of its own has three on a multiprocessor.
constexpr int64_t kMostPartsEach = 2;

class Chain final : public PutOff {
 public:
  explicit Chain(const Gpu& gpu) : gpu_(gpu) {}
  /// Of one kind of weights, and not too many.
  bool takes(const Link& link) const {
    if (link.is_attention) return true;
    const WeightView& w = link.product.rows.product.weight;
    if (products_ == kMostProducts) return false;
    return std::all_of(links_.begin(), links_.end(), [&](const Link& other) {
      const WeightView& of = other.product.rows.product.weight;
      return other.is_attention || (of.kind == w.kind && of.has_min == w.has_min);
    });
  }
  void add(const Link& link) {
    links_.push_back(link);
    if (!link.is_attention) links_.back().map = products_++;
  }

  void start() override {
    const auto is_product = [](const Link& link) { return !link.is_attention; };
    const bool has_product = std::any_of(links_.begin(), links_.end(), is_product);
    const ChainMemory memory = plan_chain(gpu_, links_);
    if (links_.size() == 1 || !has_product || !can_run_chain(gpu_, links_, memory)) {
      for (const Link& link : links_) {
        link.is_attention ? start_attention_decode(gpu_, link.attention, link.segment)
                          : rows_mma::start_one_row(gpu_, link.product.rows.product);
      }
      return;
    }
    // Not from what operations gave back: that of the links is still in use.
    Arena& arena = Capture::of(gpu_)->arena();
    const size_t nbytes = links_.size() * sizeof(Link);
    auto* links = static_cast<Link*>(arena.keep(nbytes));
    auto* counters = static_cast<ChainCounters*>(arena.keep(sizeof(ChainCounters)));
    gpu_.copy_to_device_now(links, links_.data(), nbytes);
    run_chain(gpu_, links, links_, memory, counters);
  }

 private:
  const Gpu& gpu_;
  std::vector<Link> links_;
  int products_ = 0;
};

void add(const Gpu& gpu, const Link& link) {
  Capture& capture = *Capture::of(gpu);
  auto* chain = dynamic_cast<Chain*>(capture.put_off());
  if (chain == nullptr || !chain->takes(link)) {
    capture.stream();  // whatever else is put off comes first
    auto made = std::make_unique<Chain>(gpu);
    chain = made.get();
    capture.put_off(std::move(made));
  }
  chain->add(link);
}

}  // namespace

bool can_chain(const Gpu& gpu) { return gpu.chains() && Capture::of(gpu) != nullptr; }

bool chain_product(const Gpu& gpu, const ProductView& product) {
  if (!can_chain(gpu)) return false;
  Link link{};
  link.product = rows_mma::view_of_row(gpu, product, 0);  // places are the chain's
  const rows_mma::OneRowView& v = link.product;
  if (!v.rows.is_whole || v.pass_rows < rows_mma::rows_of_block(v, gpu.multiprocessors())) return false;
  add(gpu, link);
  return true;
}

bool chain_attention(const Gpu& gpu, const DecodeArgs& args, const KvSegmentView& segment) {
  if (!can_chain(gpu) || int64_t{segment.layer.kv_heads} * args.parts > kMostPartsEach * gpu.multiprocessors())
    return false;
  Link link{};
  link.is_attention = true;
  link.segment = segment;
  link.attention = args;
  add(gpu, link);
  return true;
}

}  // namespace llama_ext::cuda
