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
constexpr int kSharesOfPlace = kLeastAlongK;  // of as many warps, side by side
constexpr int kPlacesOfRound = kWarps / kSharesOfPlace;
constexpr int kRoundsAhead = 2;
constexpr int kPlaces = kPlacesOfRound * kRoundsAhead;
constexpr int kShareBytes = kTogether * kStepBytes;  // of a row
constexpr int kPlacePitch = kSharesOfPlace * kShareBytes + kStepBytes;
constexpr int kPlaceBytes = kTileRows * kPlacePitch;

struct ChainView {
  const Link* links;
  int count;
  ChainCounters* counters;
  int own_bytes;  // of a link
};

/// Of all links before one.
struct Progress {
  int rounds;  // of the ring
  int turns;   // over tiles
};

/// A block's shared memory; then own_bytes of the link that runs, and the places of the ring.
struct ChainShared {
  Link links[2];
  Progress progress[2];  // before these links
  uint64_t full[kPlaces];
  uint64_t empty[kPlaces];
  uint64_t stored[kBuffers];
  uint64_t added[kBuffers];
};
static_assert(sizeof(ChainShared) % 16 == 0);
static_assert(sizeof(DecodeShared<128>) <= kMostOwnBytes);
static_assert(sizeof(ChainShared) + kMostOwnBytes + kPlaces * kPlaceBytes <= 227 * 1024);  // what Hopper gives a block

#if defined(LLAMA_EXT_HAS_WGMMA)
/// The ring, and in which round of it a warp is: of a round each four warps have a place, with a share each.
class Ring {
 public:
  __device__ __forceinline__ Ring(const ChainView& c, ChainShared& shared, int round)
      : shared_(shared), memory_(reinterpret_cast<unsigned char*>(&shared + 1) + c.own_bytes), round_(round) {}
  __device__ __forceinline__ int round() const { return round_; }
  __device__ __forceinline__ unsigned char* memory(int of_round) const { return memory_ + at(of_round) * kPlaceBytes; }
  __device__ __forceinline__ uint64_t* full(int of_round) const { return &shared_.full[at(of_round)]; }
  __device__ __forceinline__ void wait_until_full(int of_round) const { wait_barrier(full(of_round), turn()); }
  /// For who fills it: a place that nobody had is empty.
  __device__ __forceinline__ void wait_until_empty(int of_round) const {
    wait_barrier(&shared_.empty[at(of_round)], turn() ^ 1);
  }
  __device__ __forceinline__ void give_back(int of_round, int thread) const {
    __syncwarp();
    if (thread % static_cast<int>(kWarp) == 0) arrive(&shared_.empty[at(of_round)]);
  }
  __device__ __forceinline__ void advance() { ++round_; }

 private:
  __device__ __forceinline__ int at(int of_round) const { return round_ % kRoundsAhead * kPlacesOfRound + of_round; }
  __device__ __forceinline__ uint32_t turn() const { return static_cast<uint32_t>(round_ / kRoundsAhead) & 1; }
  ChainShared& shared_;
  unsigned char* memory_;
  int round_;
};

/// Weights of a product from the ring, for multiply_rows().
class RingWeights {
 public:
  __device__ __forceinline__ RingWeights(int thread, const Ring& ring) : ring_(ring), thread_(thread) {}
  __device__ __forceinline__ int round() const { return ring_.round(); }
  __device__ __forceinline__ void enter(const TileRows&, int) {}
  __device__ __forceinline__ void load(bool, int) {}
  __device__ __forceinline__ void take(int i) {
    if (i % kTaken != 0) return;
    const int lane = thread_ % static_cast<int>(kWarp);
    const int warp = thread_ / static_cast<int>(kWarp);
    const int place = warp / kSharesOfPlace;
    if (i == 0) ring_.wait_until_full(place);
    const unsigned char* at =
        ring_.memory(place) + lane / 4 * kPlacePitch + warp % kSharesOfPlace * kShareBytes + lane % 4 * 16;
#pragma unroll
    for (int j = 0; j < kTaken; ++j) {
      words_[j][0] = *reinterpret_cast<const uint4*>(at + (i + j) * kStepBytes);
      words_[j][1] = *reinterpret_cast<const uint4*>(at + (i + j) * kStepBytes + 8 * kPlacePitch);
    }
    if (i + kTaken < kTogether) return;
    ring_.give_back(place, thread_);
    ring_.advance();
  }
  __device__ __forceinline__ const uint4& words(int i, int half) const { return words_[i % kTaken][half]; }

 private:
  static constexpr int kTaken = 2;  // steps at once: registers
  Ring ring_;
  int thread_;
  uint4 words_[kTaken][2];
};

/// Turns of a block over its tiles, for multiply_rows(), in which warps do not meet: each adds up one turn's sums in its turn, while the others
/// go on.
class PassingTurns {
 public:
  __device__ __forceinline__ PassingTurns(ChainShared& shared, const RowsMmaView& v, int thread, int turn)
      : shared_(shared), v_(v), thread_(thread), turn_(turn) {}
  /// Computed anew, which keeps a register free.
  __device__ __forceinline__ int stride() const { return static_cast<int>(gridDim.x) * (kWarps >> v_.k_shift); }
  __device__ __forceinline__ int turn() const { return turn_; }
  __device__ __forceinline__ int buffer() const { return turn_ % kBuffers; }
  __device__ __forceinline__ bool is_adding() const { return turn_ % kWarps == thread_ / static_cast<int>(kWarp); }
  __device__ __forceinline__ int first() const { return thread_ % static_cast<int>(kWarp); }
  __device__ __forceinline__ int step() const { return static_cast<int>(kWarp); }
  __device__ __forceinline__ void before_sums() const { wait_barrier(&shared_.added[buffer()], phase() ^ 1); }
  __device__ __forceinline__ void after_sums() const {
    tell(&shared_.stored[buffer()]);
    if (is_adding()) wait_barrier(&shared_.stored[buffer()], phase());
  }
  __device__ __forceinline__ void next() {
    if (is_adding()) tell(&shared_.added[buffer()]);
    ++turn_;
  }

 private:
  __device__ __forceinline__ uint32_t phase() const { return static_cast<uint32_t>(turn_ / kBuffers) & 1; }
  __device__ __forceinline__ void tell(uint64_t* barrier) const {
    __syncwarp();
    if (thread_ % static_cast<int>(kWarp) == 0) arrive(barrier);
  }
  ChainShared& shared_;
  const RowsMmaView& v_;
  int thread_;
  int turn_;
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
    const int along_k = v.along_k;
    const int k_shift = v.k_shift;
    const int side_by_side = kWarps >> k_shift;
    for (int tile = static_cast<int>(blockIdx.x) * side_by_side; tile < tiles;
         tile += static_cast<int>(gridDim.x) * side_by_side) {
      for (int first = 0; first < row_bytes; first += along_k * kShareBytes) {
#pragma unroll 1  // registers
        for (int place = 0; place < kPlacesOfRound; ++place) {
          const int warp = place * kSharesOfPlace;  // the first that has it
          const int at = first + (warp & (along_k - 1)) * kShareBytes;
          const int bytes = max(0, min(row_bytes - at, kSharesOfPlace * kShareBytes));
          const int64_t from = int64_t{tile_rows.row(tile + (warp >> k_shift), row / 8, row % 8)} * row_bytes + at;
          ring.wait_until_empty(place);
          __syncwarp();  // a place of no bytes may be full, taken and given back before another lane has looked
          if (lane == 0) arrive_expecting(ring.full(place), kRowsEach * bytes);
          __syncwarp();
          if (lane < kRowsEach && bytes > 0) {
            bring_bytes(data + from, ring.memory(place) + row * kPlacePitch, bytes, ring.full(place));
          }
        }
        ring.advance();
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
    attend_to_part<kDim, kWarps>(view, *reinterpret_cast<DecodeShared<kDim>*>(memory), thread, token, i % heads, part,
                                 wait, sync);
    sync();  // the next one has the same memory
  }
  if (i == static_cast<int>(blockIdx.x)) wait();
}

template <Kind kKind, bool kHasMin, typename Wait, typename Sync>
__device__ __forceinline__ void multiply(const ChainView& c, ChainShared& shared, int i, int thread, Wait wait,
                                         Sync sync) {
  RingWeights weights(thread, Ring(c, shared, shared.progress[i % 2].rounds));
  const RowsMmaView& v = shared.links[i % 2].product;
  PassingTurns turns(shared, v, thread, shared.progress[i % 2].turns);
  multiply_rows<kKind, kHasMin>(v, thread, reinterpret_cast<unsigned char*>(&shared + 1), weights, turns, wait, sync);
  if (thread == 0) shared.progress[(i + 1) % 2] = {weights.round(), turns.turn()};
}

/// The threads that multiply and attend.
__device__ __forceinline__ void run_links(const ChainView& c, ChainShared& shared) {
  const auto sync = [] { sync_warps(1, kThreadCount); };
  auto* memory = reinterpret_cast<unsigned char*>(&shared + 1);
  const auto bring_link = [&](int thread, int i) {
    const auto* from = reinterpret_cast<const uint4*>(c.links + i);
    auto* to = reinterpret_cast<uint4*>(&shared.links[i % 2]);
    for (int at = thread; at < static_cast<int>(sizeof(Link) / sizeof(uint4)); at += kThreadCount) {
      copy_async(to + at, from + at, true);
    }
    commit_copies();
  };
  bring_link(static_cast<int>(threadIdx.x), 0);
  wait_for_copies<0>();
  sync();
  for (int i = 0; i < c.count; ++i) {
    // So that what is computed of it is not kept for the whole chain: that would spill.
    const int thread = unknown(static_cast<int>(threadIdx.x));
    // The links before this one are done, in all blocks.
    const auto wait = [&] {
      if (thread == 0) wait_for_count(&c.counters->arrived, uint64_t{gridDim.x} * i);
      sync();
    };
    if (i + 1 < c.count) bring_link(thread, i + 1);
    const Link& link = shared.links[i % 2];
    if (link.is_attention) {
      if (thread == 0) shared.progress[(i + 1) % 2] = shared.progress[i % 2];
      const DecodeView& view = link.attention;
      view.attention.segments.of[0].layer.head_dim <= 64 ? attend<64>(view, thread, memory, wait, sync)
                                                         : attend<128>(view, thread, memory, wait, sync);
    } else {
      const WeightView& w = link.product.product.weight;
      if (w.kind == Kind::kBF16) {
        multiply<Kind::kBF16, false>(c, shared, i, thread, wait, sync);
      } else if (w.kind == Kind::kQ8) {
        w.has_min ? multiply<Kind::kQ8, true>(c, shared, i, thread, wait, sync)
                  : multiply<Kind::kQ8, false>(c, shared, i, thread, wait, sync);
      } else {
        w.has_min ? multiply<Kind::kQ4, true>(c, shared, i, thread, wait, sync)
                  : multiply<Kind::kQ4, false>(c, shared, i, thread, wait, sync);
      }
    }
    wait_for_copies<0>();  // of the next link
    sync();
    if (thread == 0 && i + 1 < c.count) count_up(&c.counters->arrived);
  }
  // Who leaves last puts back what is counted: all others have seen what they waited for.
  if (threadIdx.x == 0 && atomicInc(&c.counters->left, gridDim.x - 1) == gridDim.x - 1) c.counters->arrived = 0;
}
#endif

__global__ void __launch_bounds__(kChainThreads, 1) chain_kernel(const __grid_constant__ ChainView c) {
#if defined(LLAMA_EXT_HAS_WGMMA)
  auto& shared = *reinterpret_cast<ChainShared*>(shared_memory());
  if (threadIdx.x == 0) {
    shared.progress[0] = {};
    for (int i = 0; i < kPlaces; ++i) {
      init_barrier(&shared.full[i], kFillingWarps);
      init_barrier(&shared.empty[i], kSharesOfPlace);
    }
    for (int i = 0; i < kBuffers; ++i) {
      init_barrier(&shared.stored[i], kWarps);
      init_barrier(&shared.added[i], 1);
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
#else
  __trap();  // nobody starts it: Gpu::has_hopper_code()
#endif
}

/// Of a block's shared memory, what links have for themselves.
size_t own_bytes(const std::vector<Link>& links) {
  size_t own = 0;
  for (const Link& link : links) {
    const int head_dim = link.attention.attention.segments.of[0].layer.head_dim;
    own = std::max(own, !link.is_attention ? rows_mma_shared_bytes(link.product.product)
                        : head_dim <= 64   ? sizeof(DecodeShared<64>)
                                           : sizeof(DecodeShared<128>));
  }
  return (own + 127) / 128 * 128;
}

size_t shared_bytes(size_t own) { return sizeof(ChainShared) + own + size_t{kPlaces * kPlaceBytes}; }

}  // namespace

bool can_run_chain(const Gpu& gpu, const std::vector<Link>& links) {
  return fit_together(gpu, chain_kernel, static_cast<unsigned>(gpu.multiprocessors()), kChainThreads,
                      shared_bytes(own_bytes(links)));
}

void run_chain(const Gpu& gpu, const Link* links, const std::vector<Link>& of, ChainCounters* counters) {
  const size_t own = own_bytes(of);
  const ChainView c{links, static_cast<int>(of.size()), counters, static_cast<int>(own)};
  launch_together(gpu, chain_kernel, static_cast<unsigned>(gpu.multiprocessors()), {.is_all = true}, kChainThreads,
                  shared_bytes(own), c);
}

}  // namespace llama_ext::cuda
