// The kernel of a chain (chain.h), for sm_90a: what matmul_one_row.cu and attention_decode.cu do, with the same bits. The copy engine brings units
// and the scales of a block's rows: a thread that tells other blocks of what it wrote waits for what it has on
// its own way, and so that must be no weights. Bound by the GPU's memory.
#include "cuda/chain.h"

#include <algorithm>

#include "cuda/chain_links.h"
#include "cuda/tensor_map.h"
#include "cuda/wgmma.h"

namespace llama_ext::cuda {
namespace {

using namespace rows_mma;

static_assert(kOneRowThreads == kDecodeThreads);
constexpr int kChainThreads = kOneRowThreads;
constexpr int kMostPlaces = 6;  // of a warp; as many as there is room for, and
constexpr int kLeastPlaces = 2;
// Units that a warp has the second cache bring while it waits, beyond those that are coming to its places.
constexpr int kAheadOfAttention = 4;
constexpr int kAheadOfProduct = 2;
constexpr int kLinksHeld = 8;     // in shared memory: of the one that runs, and of those whose weights are coming
constexpr int kScaleBuffers = 2;  // of scales
static_assert(sizeof(Link) / sizeof(uint4) <= kChainThreads);

struct ChainView {
  const Link* links;
  int count;
  ChainCounters* counters;
  int scales_at[kScaleBuffers];  // bytes into shared memory
  int places_at;
  int places;  // of a warp
  CUtensorMap maps[kMostProducts];
};

/// A block's shared memory; then what ChainMemory says.
struct ChainShared {
  Link links[kLinksHeld];
  uint64_t full[kOneRowWarps][kMostPlaces];
  uint64_t has_scales[kScaleBuffers];
  uint64_t padding[(128 - (kOneRowWarps * kMostPlaces + kScaleBuffers) * 8 % 128) / 8];
};
static_assert(sizeof(ChainShared) % 128 == 0);

#if defined(LLAMA_EXT_HAS_WGMMA)
/// At a multiple of 1024 bytes, for the copy engine.
__device__ __forceinline__ unsigned char* chain_memory() {
  unsigned char* memory = shared_memory();
  return memory + (1024 - shared_address(memory) % 1024) % 1024;
}
__device__ __forceinline__ ChainShared& chain_shared() { return *reinterpret_cast<ChainShared*>(chain_memory()); }

/// A warp's units of all links, as they come and as they are taken.
template <bool kHasMin>
class ChainUnits {
 public:
  __device__ __forceinline__ ChainUnits(const ChainView& c, int warp, int lane)
      : maps_(c.maps),
        places_(chain_memory() + c.places_at + warp * c.places * kCodesOfPlace),
        full_(chain_shared().full[warp]),
        count_(c.places),
        warp_(warp),
        lane_(lane),
        empty_(c.places) {}

  /// Links before `end` are in shared memory.
  __device__ __forceinline__ void have_links(int end) {
    end_ = end;
    enter();
    fill();
  }
  /// Of the product whose units are taken now: its block's rows, then their minima.
  __device__ __forceinline__ void have_scales(const unsigned char* scales, int groups, int rows) {
    scales_ = reinterpret_cast<const uint16_t*>(scales);
    groups_ = groups;
    mins_from_ = rows * groups;
  }
  __device__ __forceinline__ const unsigned char* wait() const {
    wait_barrier(&full_[take_], phase_);
    return places_ + take_ * kCodesOfPlace;
  }
  __device__ __forceinline__ UnitFactors factors(const unsigned char*, int row, int group) const {
    UnitFactors factors{};
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const uint16_t* at = scales_ + (row + 8 * r) * groups_ + group;
      factors.scales[r] = from_f16(at[0]);
      if constexpr (kHasMin) factors.mins[r] = from_f16(at[mins_from_]);
    }
    return factors;
  }
  __device__ __forceinline__ void give_back() {
    __syncwarp();  // other lanes have read it
    if (++take_ == count_) {
      take_ = 0;
      phase_ ^= 1;
    }
    ++empty_;
    fill();
  }
  /// The units after those that are coming begin to come to the second cache, `most` of them, as far as they are of one link.
  __device__ __forceinline__ void bring_ahead(int most) const {
    if (lane_ != 0) return;
    int tile = tile_;
    int column = share_ * (kShareBytes / 2);
#pragma unroll 1
    for (int i = min(most, left_); i > 0; --i) {
      const int row = row_ + tile * kTileRows;
      bring_box_ahead(codes_, column, row);
      bring_box_ahead(codes_, column + 64, row);
      if (++tile == tiles_) {
        tile = 0;
        column += kShareBytes / 2;
      }
    }
  }

 private:
  __device__ __forceinline__ void fill() {
#pragma unroll 1
    while (empty_ > 0 && left_ > 0) {
      if (lane_ == 0) {
        unsigned char* to = places_ + fill_ * kCodesOfPlace;
        const int row = row_ + tile_ * kTileRows;
        arrive_expecting(&full_[fill_], kCodesOfPlace);
        bring_box<false>(codes_, share_ * (kShareBytes / 2), row, to, &full_[fill_], 0);
        bring_box<false>(codes_, share_ * (kShareBytes / 2) + 64, row, to + kCodesOfPlace / 2, &full_[fill_], 0);
      }
      fill_ = fill_ + 1 < count_ ? fill_ + 1 : 0;
      --empty_;
      --left_;
      if (++tile_ == tiles_) {
        tile_ = 0;
        ++share_;
      }
      enter();
    }
  }
  /// To the next link in which the warp has units, if it is known.
  __device__ __forceinline__ void enter() {
    while (left_ == 0 && link_ + 1 < end_) {
      const Link& link = chain_shared().links[++link_ % kLinksHeld];
      if (link.is_attention) continue;
      const OneRowView& v = link.product;
      row_ = first_row_of(v, blockIdx.x);
      const int rows = first_row_of(v, blockIdx.x + 1) - row_;
      if (rows == 0) continue;
      codes_ = maps_ + link.map;
      const UnitWalk walk(v, rows, warp_);
      tiles_ = walk.tiles;
      share_ = walk.share;
      tile_ = walk.tile;
      left_ = walk.left;
    }
  }

  const CUtensorMap* maps_;
  unsigned char* places_;
  uint64_t* full_;
  int count_;  // of places
  int warp_;
  int lane_;
  int empty_;     // places that nothing is coming to
  int take_ = 0;  // the place that is taken next, and the parity of its phase
  uint32_t phase_ = 0;
  int fill_ = 0;   // the place that is filled next
  int end_ = 0;    // of the links that are there
  int link_ = -1;  // whose units come next
  const CUtensorMap* codes_ = nullptr;
  int row_ = 0;  // the block's first
  int tiles_ = 0;
  int share_ = 0;
  int tile_ = 0;
  int left_ = 0;
  const uint16_t* scales_ = nullptr;
  int groups_ = 0;
  int mins_from_ = 0;
};

template <int kDim, typename Wait>
__device__ __forceinline__ void attend(const Link& link, const Wait& wait) {
  const DecodeArgs& a = link.attention;
  const int heads = link.segment.layer.kv_heads;
  auto& own = *reinterpret_cast<DecodeShared<kDim>*>(chain_memory() + sizeof(ChainShared));
  bool has_waited = false;
  const auto wait_once = [&] {
    if (!has_waited) wait();
    has_waited = true;
  };
  for (int i = static_cast<int>(blockIdx.x); i < heads * a.parts; i += static_cast<int>(gridDim.x)) {
    attend_to_part<kDim>(a, link.segment, own, 0, i % heads, i / heads, wait_once);
    __syncthreads();  // the next one has the same memory
  }
  wait_once();
  publish_stores();  // scales may come where it was
}

/// The scales of a block's rows of a product begin to come. Called by one thread.
__device__ __forceinline__ void bring_scales(const ChainView& c, const Link& link) {
  const OneRowView& v = link.product;
  const WeightView& w = v.rows.product.weight;
  const int begin = first_row_of(v, blockIdx.x);
  const int row_bytes = v.rows.groups * 2;
  const int bytes = (first_row_of(v, blockIdx.x + 1) - begin) * row_bytes;
  uint64_t* barrier = &chain_shared().has_scales[link.scales];
  unsigned char* to = chain_memory() + c.scales_at[link.scales];
  arrive_expecting(barrier, w.has_min ? 2 * bytes : bytes);
  if (bytes == 0) return;
  bring_bytes(w.data + w.scales_at + int64_t{begin} * row_bytes, to, bytes, barrier);
  if (w.has_min) bring_bytes(w.data + w.mins_at + int64_t{begin} * row_bytes, to + bytes, bytes, barrier);
}

template <Kind kKind, bool kHasMin, int kDim>
__device__ __forceinline__ void run_links(const ChainView& c) {
  const auto thread = static_cast<int>(threadIdx.x);
  ChainShared& shared = chain_shared();
  constexpr int kVectors = static_cast<int>(sizeof(Link) / sizeof(uint4));
  const auto load_link = [&](int i) {
    return thread < kVectors && i < c.count ? reinterpret_cast<const uint4*>(c.links + i)[thread] : uint4{0, 0, 0, 0};
  };
  const auto store_link = [&](int i, const uint4& vector) {
    if (thread < kVectors && i < c.count) reinterpret_cast<uint4*>(&shared.links[i % kLinksHeld])[thread] = vector;
  };
  // Without a way to memory for each.
  for (int i = thread; i < min(kLinksHeld, c.count) * kVectors; i += kChainThreads) {
    reinterpret_cast<uint4*>(shared.links)[i] = reinterpret_cast<const uint4*>(c.links)[i];
  }
  if (thread == 0) {
    for (int i = 0; i < kOneRowWarps * kMostPlaces; ++i) init_barrier(&shared.full[0][0] + i, 1);
    for (int i = 0; i < kScaleBuffers; ++i) init_barrier(&shared.has_scales[i], 1);
    publish_barriers();
  }
  __syncthreads();
  ChainUnits<kHasMin> units(c, thread / static_cast<int>(kWarp), thread % static_cast<int>(kWarp));
  uint32_t phases = 0;  // a bit for each buffer of scales
#pragma unroll 1
  for (int i = 0; i < c.count; ++i) {
    const Link& link = shared.links[i % kLinksHeld];
    if (thread == 0) {
      if (link.brings_own) bring_scales(c, link);
      if (link.brings >= 0) bring_scales(c, shared.links[link.brings % kLinksHeld]);
    }
    const int end = min(i + kLinksHeld - (i > 0 ? 1 : 0), c.count);
    units.have_links(end);
    units.bring_ahead(link.is_attention ? kAheadOfAttention : kAheadOfProduct);
    if (thread == 0) {
      for (int j = i == 0 ? 0 : end - 1; j < end; ++j) {
        const Link& later = shared.links[j % kLinksHeld];
        if (!later.is_attention) prefetch_map(c.maps + later.map);
      }
    }
    // The link before this one is done, and nobody's weights of it are still to be asked for: its place is free.
    const uint4 later = i > 0 ? load_link(i - 1 + kLinksHeld) : uint4{0, 0, 0, 0};
    // The links before this one are done, in all blocks.
    const auto wait = [&] {
      if (thread == 0) wait_for_count(&c.counters->arrived, uint64_t{gridDim.x} * i);
      __syncthreads();
    };
    if (link.is_attention) {
      attend<kDim>(link, wait);
    } else {
      const OneRowView& v = link.product;
      unsigned char* own = chain_memory() + sizeof(ChainShared);
      float4 gains[kFew];
      load_gains<true>(v, gains);
      wait();
      bring_row<kKind, true>(v, own, gains);
      const int buffer = link.scales;
      units.have_scales(chain_memory() + c.scales_at[buffer], v.rows.groups,
                        first_row_of(v, blockIdx.x + 1) - first_row_of(v, blockIdx.x));
      wait_barrier(&shared.has_scales[buffer], phases >> buffer & 1);
      phases ^= 1u << buffer;
      multiply_row<kKind, kHasMin>(v, own, units);
    }
    if (i > 0) store_link(i - 1 + kLinksHeld, later);
    __syncthreads();
    if (thread == 0 && i + 1 < c.count) count_up(&c.counters->arrived);
  }
  // Who leaves last puts back what is counted: all others have seen what they waited for.
  if (thread == 0 && atomicInc(&c.counters->left, gridDim.x - 1) == gridDim.x - 1) c.counters->arrived = 0;
}
#endif

template <Kind kKind, bool kHasMin, int kDim>
__global__ void __launch_bounds__(kChainThreads, 1) chain_kernel(const __grid_constant__ ChainView c) {
#if defined(LLAMA_EXT_HAS_WGMMA)
  run_links<kKind, kHasMin, kDim>(c);
#else
  __trap();  // nobody starts it: Gpu::has_hopper_code()
#endif
}

/// Calls start(kernel).
template <typename Start>
auto with_kernel(const std::vector<Link>& links, const Start& start) {
  const WeightView* weight = nullptr;
  bool is_wide = false;
  for (const Link& link : links) {
    if (!link.is_attention) weight = &link.product.rows.product.weight;
    if (link.is_attention && link.segment.layer.head_dim > 64) is_wide = true;
  }
  const bool has_min = weight->has_min;
  const auto of_kind = [&]<Kind kKind>() {
    if (has_min) return is_wide ? start(chain_kernel<kKind, true, 128>) : start(chain_kernel<kKind, true, 64>);
    return is_wide ? start(chain_kernel<kKind, false, 128>) : start(chain_kernel<kKind, false, 64>);
  };
  return weight->kind == Kind::kQ4 ? of_kind.template operator()<Kind::kQ4>()
                                   : of_kind.template operator()<Kind::kQ8>();
}

size_t aligned(size_t bytes) { return (bytes + 127) / 128 * 128; }

}  // namespace

ChainMemory plan_chain(const Gpu& gpu, std::vector<Link>& links) {
  size_t of_products = 0;
  size_t of_attention = 0;
  size_t of_scales[kScaleBuffers] = {};
  int before = -1;  // the last product
  bool is_behind_attention = false;
  for (int i = 0; i < static_cast<int>(links.size()); ++i) {
    Link& link = links[static_cast<size_t>(i)];
    if (link.is_attention) {
      of_attention = std::max(of_attention,
                              link.segment.layer.head_dim <= 64 ? sizeof(DecodeShared<64>) : sizeof(DecodeShared<128>));
      is_behind_attention = true;
      continue;
    }
    // Where attention has its memory, scales are not kept over it. Two of them alternate, so that the next one's come early.
    Link* last = before < 0 ? nullptr : &links[static_cast<size_t>(before)];
    link.scales = is_behind_attention ? 1 : last == nullptr ? 0 : 1 - last->scales;
    const OneRowView& v = link.product;
    const WeightView& w = v.rows.product.weight;
    of_products = std::max(of_products, one_row_shared_bytes(v));
    const int rows = rows_of_block(v, gpu.multiprocessors());
    of_scales[link.scales] =
        std::max(of_scales[link.scales], static_cast<size_t>(rows * v.rows.groups * (w.has_min ? 4 : 2)));
    // Not while another's are used; and what attention leaves is free once it is done.
    if (last != nullptr && last->scales != link.scales) {
      last->brings = i;
    } else {
      link.brings_own = true;
    }
    before = i;
    is_behind_attention = false;
  }
  ChainMemory memory{};
  const size_t first = sizeof(ChainShared);
  memory.scales_at[0] = first + aligned(of_products);
  memory.own = std::max(aligned(of_attention), aligned(of_products) + aligned(of_scales[0]));
  memory.scales_at[1] = first + memory.own;
  memory.places_at = (memory.scales_at[1] + aligned(of_scales[1]) + 1023) / 1024 * 1024;
  constexpr size_t kEach = size_t{kOneRowWarps} * kCodesOfPlace;
  const size_t fixed = memory.places_at + 1024;  // with what aligns it
  const size_t room = gpu.shared_bytes_per_block() > fixed ? gpu.shared_bytes_per_block() - fixed : 0;
  memory.places = static_cast<int>(std::clamp<size_t>(room / kEach, kLeastPlaces, kMostPlaces));
  memory.all = fixed + static_cast<size_t>(memory.places) * kEach;
  return memory;
}

bool can_run_chain(const Gpu& gpu, const std::vector<Link>& links, const ChainMemory& memory) {
  if (memory.all > gpu.shared_bytes_per_block()) return false;
  return with_kernel(links, [&](auto kernel) {
    return fit_together(gpu, kernel, static_cast<unsigned>(gpu.multiprocessors()), kChainThreads, memory.all);
  });
}

void run_chain(const Gpu& gpu, const Link* links, const std::vector<Link>& of, const ChainMemory& memory,
               ChainCounters* counters) {
  ChainView c{links, static_cast<int>(of.size()), counters, {}, static_cast<int>(memory.places_at), memory.places, {}};
  for (int i = 0; i < kScaleBuffers; ++i) c.scales_at[i] = static_cast<int>(memory.scales_at[i]);
  for (const Link& link : of) {
    if (link.is_attention) continue;
    const WeightView& w = link.product.rows.product.weight;
    const int64_t size[2] = {w.row_bytes() / 2, w.rows};
    const int64_t pitch[1] = {w.row_bytes()};
    const int box[2] = {64, kTileRows};
    c.maps[link.map] = tensor_map(gpu, w.data, 2, size, pitch, box);
  }
  with_kernel(of, [&](auto kernel) {
    launch_together(gpu, kernel, static_cast<unsigned>(gpu.multiprocessors()), {.is_all = true}, kChainThreads,
                    memory.all, c);
  });
}

}  // namespace llama_ext::cuda
