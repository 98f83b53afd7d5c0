// The kernel of a chain (chain.h), for sm_90a: kThreadCount threads of a block do what matmul_rows_mma.cu and attention_decode.cu do,
// with the same bits, and four warps more fill the ring. A place of the ring has up to 1 KB of each of the 16 rows of a tile, which
// as many copies bring, rows as far apart as keeps the loads of lanes from meeting in a bank. Bound by the GPU's memory.
#include <algorithm>

#include "cuda/attention_decode.h"
#include "cuda/chain.h"
#include "cuda/rows_mma_block.h"
#include "cuda/wgmma.h"

namespace llama_ext::cuda {
namespace {

using namespace rows_mma;

constexpr int kFillingWarps = 4;
constexpr int kChainThreads = kThreadCount + kFillingWarps * static_cast<int>(kWarp);
// Registers of a thread: what some get over those of the launch others have given back, or they wait for ever. Of the 65,536 of a
// multiprocessor the launch has as many as all threads may have alike, in eights; what is left over nobody gets.
constexpr int kFillingRegisters = 32;
constexpr int kLinkRegisters = 112;
constexpr int kLaunchRegisters = 65536 / kChainThreads / 8 * 8;
static_assert(kThreadCount * kLinkRegisters + (kChainThreads - kThreadCount) * kFillingRegisters <=
              kChainThreads * kLaunchRegisters);
constexpr int kMostPlaces = 16;
constexpr int kStepBytes = 64;  // of a row
constexpr int kPlaceSteps = kWarps;
constexpr int kPlacePitch = kPlaceSteps * kStepBytes + kStepBytes;
constexpr int kPlaceBytes = kTileRows * kPlacePitch;

struct ChainView {
  const Link* links;
  int count;
  ChainCounters* counters;
  int places;
  int own_bytes;  // of a link
};

/// A block's shared memory; then own_bytes of the link that runs, and the places of the ring.
struct ChainShared {
  Link links[2];
  int taken[2];  // of the ring, before these links
  uint64_t full[kMostPlaces];
  uint64_t empty[kMostPlaces];
};
static_assert(sizeof(ChainShared) % 16 == 0);

#if defined(LLAMA_EXT_HAS_WGMMA)
/// The ring, and where a warp is in it. Tiles side by side have a place each in turn.
class Ring {
 public:
  __device__ __forceinline__ Ring(const ChainView& c, ChainShared& shared, int at)
      : shared_(shared),
        memory_(reinterpret_cast<unsigned char*>(&shared + 1) + c.own_bytes),
        places_(c.places),
        at_(at) {}
  __device__ __forceinline__ int at() const { return at_; }
  __device__ __forceinline__ int place() const { return at_ < places_ ? at_ : at_ - places_; }
  __device__ __forceinline__ uint32_t turn() const { return at_ < places_ ? 0 : 1; }
  __device__ __forceinline__ unsigned char* memory() const { return memory_ + place() * kPlaceBytes; }
  __device__ __forceinline__ uint64_t* full() const { return &shared_.full[place()]; }
  __device__ __forceinline__ void wait_until_full() const { wait_barrier(full(), turn()); }
  /// For who fills it: a place that nobody had is empty.
  __device__ __forceinline__ void wait_until_empty() const { wait_barrier(&shared_.empty[place()], turn() ^ 1); }
  /// By one of so many warps that have the place.
  __device__ __forceinline__ void give_back(int warps) const {
    __syncwarp();
    if (threadIdx.x % kWarp == 0) arrive(&shared_.empty[place()], kWarps / warps);
  }
  /// count: no more than there are places.
  __device__ __forceinline__ void advance(int count) {
    at_ += count;
    if (at_ >= 2 * places_) at_ -= 2 * places_;
  }

 private:
  ChainShared& shared_;
  unsigned char* memory_;
  int places_;
  int at_;  // of two turns' places
};

/// Weights of a product from the ring, for multiply_rows(). The warps of a tile meet its places alone.
class RingWeights {
 public:
  __device__ __forceinline__ RingWeights(const RowsMmaView& v, int thread, const Ring& ring)
      : ring_(ring), along_k_(v.along_k), per_place_(kPlaceSteps / along_k_) {
    const int lane = thread % static_cast<int>(kWarp);
    const int warp = thread / static_cast<int>(kWarp);
    first_ = lane / 4 * kPlacePitch + (warp & (along_k_ - 1)) * kStepBytes + lane % 4 * 16;
    ring_.advance(warp / along_k_);  // to the warp's side
  }
  /// What is taken once the product is done, by a warp of the first side.
  __device__ __forceinline__ int taken() const { return ring_.at(); }
  __device__ __forceinline__ void enter(int) {}
  __device__ __forceinline__ void load(bool, int) {}
  __device__ __forceinline__ void take(int stage, int stages, bool is_there) {
    if (stage >= stages) return;
    const int in_place = stage & (per_place_ - 1);
    if (in_place == 0) ring_.wait_until_full();
    if (is_there) {
      const unsigned char* at = ring_.memory() + first_ + in_place * along_k_ * kStepBytes;
      words_[0] = *reinterpret_cast<const uint4*>(at);
      words_[1] = *reinterpret_cast<const uint4*>(at + 8 * kPlacePitch);
    }
    if (in_place + 1 < per_place_ && stage + 1 < stages) return;
    ring_.give_back(along_k_);
    ring_.advance(kWarps / along_k_);
  }
  __device__ __forceinline__ const uint4& words(int, int half) const { return words_[half]; }

 private:
  Ring ring_;
  int along_k_;
  int per_place_;  // steps of a warp, a power of two
  int first_;      // byte of a place that the lane has
  uint4 words_[2] = {};
};

/// The warps that fill the ring, some rows each: all products, in the order in which they are taken.
__device__ __forceinline__ void fill_ring(const ChainView& c, Ring ring) {
  constexpr int kRowsEach = kTileRows / kFillingWarps;
  const int lane = static_cast<int>(threadIdx.x % kWarp);
  const int row =
      (static_cast<int>(threadIdx.x) - kThreadCount) / static_cast<int>(kWarp) * kRowsEach + lane % kRowsEach;
  for (int i = 0; i < c.count; ++i) {
    const Link& link = c.links[i];
    if (link.is_attention) continue;
    const RowsMmaView& v = link.product;
    const TileRows tile_rows(v.product);
    const unsigned char* data = v.product.weight.data;
    const int row_bytes = static_cast<int>(v.product.weight.row_bytes());
    const int tiles = v.tiles;
    const int side_by_side = kWarps / v.along_k;
    for (int tile = static_cast<int>(blockIdx.x) * side_by_side; tile < tiles;
         tile += static_cast<int>(gridDim.x) * side_by_side) {
      for (int at = 0; at < row_bytes; at += kPlaceSteps * kStepBytes) {
        const int bytes = min(row_bytes - at, kPlaceSteps * kStepBytes);
        for (int side = 0; side < side_by_side; ++side) {
          const int64_t from = int64_t{tile_rows.row(tile + side, row / 8, row % 8)} * row_bytes + at;
          ring.wait_until_empty();
          if (lane == 0) arrive_expecting(ring.full(), kRowsEach * bytes);
          __syncwarp();
          if (lane < kRowsEach) bring_bytes(data + from, ring.memory() + row * kPlacePitch, bytes, ring.full());
          ring.advance(1);
        }
      }
    }
  }
}

/// wait: as often as needed, but once at least.
template <int kDim, typename Wait, typename Sync>
__device__ __forceinline__ void attend(const DecodeView& view, int thread, unsigned char* memory, Wait wait,
                                       Sync sync) {
  const AttentionView& a = view.attention;
  int i = static_cast<int>(blockIdx.x);
  for (;; i += static_cast<int>(gridDim.x)) {
    const int heads = a.segments.of[0].layer.kv_heads;
    const int token = i / heads % static_cast<int>(a.segments.tokens);
    const int part = i / heads / static_cast<int>(a.segments.tokens);
    if (part >= a.parts) break;
    attend_to_part<kDim, kWarps>(view, *reinterpret_cast<DecodeShared<kDim>*>(memory), unknown(thread), token,
                                 i % heads, part, wait, sync);
    sync();  // the next one has the same memory
  }
  if (i == static_cast<int>(blockIdx.x)) wait();
}

/// Returns to the first thread what is taken of the ring then.
template <Kind kKind, bool kHasMin, typename Wait, typename Sync>
__device__ __forceinline__ int multiply(const ChainView& c, ChainShared& shared, int taken, const RowsMmaView& v,
                                        int thread, Wait wait, Sync sync) {
  RingWeights weights(v, thread, Ring(c, shared, taken));
  multiply_rows<kKind, kHasMin>(v, thread, reinterpret_cast<unsigned char*>(&shared + 1), weights, wait, sync);
  return weights.taken();
}

/// The threads that multiply and attend.
__device__ __forceinline__ void run_links(const ChainView& c, ChainShared& shared) {
  const auto sync = [] { sync_warps(1, kThreadCount); };
  auto* memory = reinterpret_cast<unsigned char*>(&shared + 1);
  const auto bring_link = [&](int thread, int i) {
    const auto* from = reinterpret_cast<const uint4*>(c.links + i);
    auto* to = reinterpret_cast<uint4*>(&shared.links[i % 2]);
    for (int at = thread; at < static_cast<int>(sizeof(Link) / sizeof(uint4)); at += kThreadCount) to[at] = from[at];
  };
  bring_link(static_cast<int>(threadIdx.x), 0);
  sync();
  for (int i = 0; i < c.count; ++i) {
    const int thread = unknown(static_cast<int>(threadIdx.x));  // again and again, as attention leaves no register
    // The links before this one are done, in all blocks. `sync_waiting`: of the threads that wait.
    const auto wait = [&](auto sync_waiting) {
      if (unknown(thread) == 0) wait_for_count(&c.counters->arrived, uint64_t{gridDim.x} * unknown(i));
      sync_waiting();
    };
    if (i + 1 < c.count) bring_link(thread, i + 1);
    const Link& link = shared.links[i % 2];
    if (link.is_attention) {
      if (thread == 0) shared.taken[(i + 1) % 2] = shared.taken[i % 2];
      const DecodeView& view = link.attention;
      const auto wait_all = [&] { wait(sync); };
      view.attention.segments.of[0].layer.head_dim <= 64 ? attend<64>(view, thread, memory, wait_all, sync)
                                                         : attend<128>(view, thread, memory, wait_all, sync);
    } else {
      int taken = shared.taken[i % 2];
      const auto wait_all = [&] { wait(sync); };
      const RowsMmaView& v = link.product;
      const bool has_min = v.product.weight.has_min;
      if (v.product.weight.kind == Kind::kBF16) {
        taken = multiply<Kind::kBF16, false>(c, shared, taken, v, thread, wait_all, sync);
      } else if (v.product.weight.kind == Kind::kQ8) {
        taken = has_min ? multiply<Kind::kQ8, true>(c, shared, taken, v, thread, wait_all, sync)
                        : multiply<Kind::kQ8, false>(c, shared, taken, v, thread, wait_all, sync);
      } else {
        taken = has_min ? multiply<Kind::kQ4, true>(c, shared, taken, v, thread, wait_all, sync)
                        : multiply<Kind::kQ4, false>(c, shared, taken, v, thread, wait_all, sync);
      }
      if (thread == 0) shared.taken[(i + 1) % 2] = taken;
    }
    sync();
    if (unknown(thread) == 0 && i + 1 < c.count) count_up(&c.counters->arrived);
  }
  // Who leaves last puts back what is counted: all others have seen what they waited for.
  if (threadIdx.x == 0 && atomicInc(&c.counters->left, gridDim.x - 1) == gridDim.x - 1) c.counters->arrived = 0;
}
#endif

__global__ void __launch_bounds__(kChainThreads, 1) chain_kernel(const __grid_constant__ ChainView c) {
#if defined(LLAMA_EXT_HAS_WGMMA)
  auto& shared = *reinterpret_cast<ChainShared*>(shared_memory());
  if (threadIdx.x == 0) {
    shared.taken[0] = 0;
    for (int i = 0; i < c.places; ++i) {
      init_barrier(&shared.full[i], kFillingWarps);
      init_barrier(&shared.empty[i], kWarps);
    }
    publish_barriers();
  }
  __syncthreads();
  if (threadIdx.x < kThreadCount) {
    take_registers<kLinkRegisters>();
    run_links(c, shared);
  } else {
    give_registers<kFillingRegisters>();
    fill_ring(c, Ring(c, shared, 0));
  }
#endif
}

}  // namespace

void run_chain(const Gpu& gpu, const Link* links, const std::vector<Link>& of, ChainCounters* counters) {
  ChainView c{links, static_cast<int>(of.size()), counters, 0, 0};
  size_t own = 0;
  for (const Link& link : of) {
    const int head_dim = link.attention.attention.segments.of[0].layer.head_dim;
    own = std::max(own, !link.is_attention ? rows_mma_shared_bytes(link.product.product)
                        : head_dim <= 64   ? sizeof(DecodeShared<64>)
                                           : sizeof(DecodeShared<128>));
  }
  c.own_bytes = static_cast<int>((own + 127) / 128 * 128);
  const int room = static_cast<int>(gpu.shared_bytes_per_block() - sizeof(ChainShared)) - c.own_bytes;
  c.places = std::min(kMostPlaces, room / kPlaceBytes);
  launch_together(gpu, chain_kernel, static_cast<unsigned>(gpu.multiprocessors()), {.is_all = true}, kChainThreads,
                  sizeof(ChainShared) + static_cast<size_t>(c.own_bytes + c.places * kPlaceBytes), c);
}

}  // namespace llama_ext::cuda
