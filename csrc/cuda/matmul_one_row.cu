// y = x W^T for one row of x and codes: decoding one sequence, where reading the weights bounds the time.
//
// A warp takes units, a share (four steps, 256 bytes) of each of 16 rows of W. Asynchronous copies bring them to places in shared memory that
// are the warp's own, so that nobody waits for another warp before all rows of a pass are summed. (In registers the units would share a
// barrier: a thread has six for what it has on its way, the compiler gives all loads of a loop one of them, and who waits for the oldest
// waits for the newest.) They are multiplied on the tensor cores. The four lanes of a row have a step each, and columns 2 t and 2 t + 1 of the
// other operand have x's upper and lower digits (rows_mma.h) where step t meets them and zeros elsewhere: so lane t's sums are those of
// step t, for two rows and both digits, and no product is in vain. From there on sums are made in the order of matmul_rows_mma.cu, whose bits
// they have. Bound by the GPU's memory.
#include "cuda/one_row.h"

#include <algorithm>

#include "cuda/chain.h"

namespace llama_ext::cuda {
namespace rows_mma {
namespace {

constexpr int kPlaces = 3;  // of a warp: a unit at work, and others on their way

/// A place: 16 rows of codes, then for each lane words with the scales of its two rows, and with their minima, of two groups each.
template <bool kHasMin>
constexpr int kPlaceBytes = kCodesOfPlace + (kHasMin ? 4 : 2) * 4 * static_cast<int>(kWarp);

/// What a lane has to know of W to bring its part of units.
struct UnitSource {
  const unsigned char* codes;  // of its first row and chunk
  const float* scales;         // of its first row's two groups
  const float* mins;
  int row_bytes;
  int steps;
  int pairs;  // of groups
  int pair_shift;

  UnitSource() = default;
  __device__ __forceinline__ UnitSource(const OneRowView& v, int lane) {
    const WeightView& w = v.rows.product.weight;
    row_bytes = v.row_bytes;
    steps = v.steps;
    pairs = v.rows.groups / 2;
    pair_shift = v.rows.group_shift + 1;
    codes = w.data + int64_t{lane / 16} * row_bytes + lane % 16 * 16;
    scales = reinterpret_cast<const float*>(w.data + w.scales_at) + lane / 4 * pairs;
    mins = reinterpret_cast<const float*>(w.data + w.mins_at) + lane / 4 * pairs;
  }
};

/// The unit of W's rows from `row` and of a share begins to come to a place; the calling thread's part of it, without a commit.
template <bool kHasMin>
__device__ __forceinline__ void bring_unit(const UnitSource& s, int row, int share, unsigned char* place, int lane) {
  const int chunk = lane % 16;
  const int upper = lane / 16;
  const unsigned char* codes = s.codes + int64_t{row} * s.row_bytes + share * kShareBytes;
  const bool is_step = share * kTogether + chunk / 4 < s.steps;
#pragma unroll
  for (int r = 0; r < kTileRows; r += 2) {
    copy_async(place + code_at(r + upper, chunk), codes, is_step);
    codes += 2 * s.row_bytes;
  }
  // Factors of two groups, as fewer bytes are not copied.
  const int step = min(share * kTogether + lane % 4, s.steps - 1);
  auto* words = reinterpret_cast<float*>(place + kCodesOfPlace) + lane;
  const int at = row * s.pairs + (step >> s.pair_shift);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    copy_async(words + half * kWarp, s.scales + at + 8 * half * s.pairs);
    if constexpr (kHasMin) copy_async(words + (2 + half) * kWarp, s.mins + at + 8 * half * s.pairs);
  }
}

/// Units of a warp on their way, of all passes of a block.
template <bool kHasMin>
class ComingUnits {
 public:
  __device__ __forceinline__ ComingUnits(const OneRowView& v, int begin, int end, int warp, int lane)
      : v_(v), pass_(begin), end_(end), warp_(warp), lane_(lane), walk_(v, min(v.pass_rows, end - begin), warp) {
    skip();
  }
  __device__ __forceinline__ bool is_empty() const { return walk_.left == 0; }

  /// The next one, if there is one, begins to come to a place.
  __device__ __forceinline__ void bring(unsigned char* place) {
    if (!is_empty()) {
      bring_unit<kHasMin>(UnitSource(v_, lane_), pass_ + walk_.tile * kTileRows, walk_.share, place, lane_);
      walk_.next();
      skip();
    }
    commit_copies();
  }

 private:
  /// To a pass in which the warp has units, if there is one.
  __device__ __forceinline__ void skip() {
    while (walk_.left == 0 && pass_ + v_.pass_rows < end_) {
      pass_ += v_.pass_rows;
      walk_ = UnitWalk(v_, min(v_.pass_rows, end_ - pass_), warp_);
    }
  }

  const OneRowView& v_;
  int pass_;
  int end_;
  int warp_;
  int lane_;
  UnitWalk walk_;
};

/// A warp's places.
template <bool kHasMin>
class Units {
 public:
  __device__ __forceinline__ Units(const OneRowView& v, unsigned char* places, int warp, int lane)
      : coming_(v, first_row_of(v, blockIdx.x), first_row_of(v, blockIdx.x + 1), warp, lane),
        places_(places + warp * kPlaces * kPlaceBytes<kHasMin>) {
#pragma unroll 1
    for (int i = 0; i < kPlaces; ++i) coming_.bring(places_ + i * kPlaceBytes<kHasMin>);
  }
  __device__ __forceinline__ const unsigned char* wait() const {
    wait_for_copies<kPlaces - 1>();
    __syncwarp();  // other lanes have brought it
    return places_ + place_ * kPlaceBytes<kHasMin>;
  }
  __device__ __forceinline__ UnitFactors factors(const unsigned char* place, int, int group) const {
    const auto* words = reinterpret_cast<const uint32_t*>(place + kCodesOfPlace) + threadIdx.x % kWarp;
    const auto factor_of = [&](uint32_t word) {
      return from_f16(static_cast<uint16_t>((group & 1) != 0 ? word >> 16 : word));
    };
    UnitFactors factors{};
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      factors.scales[r] = factor_of(words[r * kWarp]);
      if constexpr (kHasMin) factors.mins[r] = factor_of(words[(2 + r) * kWarp]);
    }
    return factors;
  }
  __device__ __forceinline__ void give_back() {
    __syncwarp();  // other lanes have read it
    coming_.bring(places_ + place_ * kPlaceBytes<kHasMin>);
    if (coming_.is_empty() && !has_let_start_) {
      let_next_start();
      has_let_start_ = true;
    }
    place_ = place_ + 1 < kPlaces ? place_ + 1 : 0;
  }
  __device__ __forceinline__ void end() const {
    if (!has_let_start_) let_next_start();
    wait_for_copies<0>();  // of which the last groups have none
  }

 private:
  ComingUnits<kHasMin> coming_;
  unsigned char* places_;
  int place_ = 0;
  bool has_let_start_ = false;
};

template <Kind kKind, bool kHasMin>
__global__ void __launch_bounds__(kOneRowThreads, 2) matmul_one_row_kernel(const __grid_constant__ OneRowView v) {
  unsigned char* memory = shared_memory();
  const int thread = static_cast<int>(threadIdx.x);
  Units<kHasMin> units(v, memory + v.places_at, thread / static_cast<int>(kWarp), thread % static_cast<int>(kWarp));
  float4 gains[kFew];
  load_gains<false>(v, gains);
  wait_for_predecessors<NextStart::kLater>();
  bring_row<kKind, false>(v, memory, gains);
  multiply_row<kKind, kHasMin>(v, memory, units);
  units.end();
}

template <Kind kKind, bool kHasMin>
void start(const Gpu& gpu, const OneRowView& v, size_t shared_bytes) {
  divide_alike(gpu, matmul_one_row_kernel<kKind, kHasMin>, true);
  launch<Start::kEarly>(gpu, matmul_one_row_kernel<kKind, kHasMin>,
                        dim3(static_cast<unsigned>(std::min(v.parts, gpu.multiprocessors()))), kOneRowThreads,
                        shared_bytes, v);
}

template <Kind kKind>
OneRowView view_with(const Gpu& gpu, const ProductView& p, size_t places_bytes) {
  const WeightView& w = p.weight;
  OneRowView v;
  v.rows = view_of(p);
  v.part_rows = p.is_gate_up ? 2 * kGateGroup : kTileRows;
  v.parts = w.rows / v.part_rows;
  v.row_bytes = static_cast<int>(w.row_bytes());
  v.steps = w.stride / kStep<kKind>;
  v.shares = static_cast<int>(blocks_for(v.steps, kTogether));
  v.pitch = v.shares + (v.shares % 2 == 0 ? 1 : 0);  // rows of lanes that add them up do not meet in a bank
  // All rows of a block in one pass, if they fit.
  const int rows = static_cast<int>(blocks_for(v.parts, std::min(v.parts, gpu.multiprocessors()))) * v.part_rows;
  const int fitting = kMostPartialBytes / (v.pitch * static_cast<int>(sizeof(float)));
  v.pass_rows = rows <= fitting ? rows : std::max(fitting / v.part_rows, 1) * v.part_rows;
  const int steps = v.shares * kTogether;
  const auto aligned = [](int bytes) { return static_cast<int>(blocks_for(bytes, 128)) * 128; };
  v.totals_at = steps * static_cast<int>(sizeof(StepFactor));
  v.x_at = aligned(v.totals_at + (w.has_min ? steps * static_cast<int>(sizeof(float)) : 0));
  v.places_at = aligned(v.x_at + kDigits * steps * kDigitPitch<kKind>);
  v.partial_at = v.places_at + static_cast<int>(places_bytes);
  return v;
}

size_t places_bytes(const WeightView& w) {
  return static_cast<size_t>(kOneRowWarps * kPlaces * (w.has_min ? kPlaceBytes<true> : kPlaceBytes<false>));
}

/// A head, whose kernel runs so long that its neighbours may divide the multiprocessors in another way: a product by itself of more rows for
/// its columns than q, k and v of a layer have.
bool is_long(const ProductView& p) {
  constexpr int64_t kLeastBytes = 32 << 20;
  constexpr int64_t kMostOfLayer = 3;
  const WeightView& w = p.weight;
  const bool is_alone = !p.accumulate && !p.is_gate_up && w.rows > kMostOfLayer * w.cols;
  return is_alone && w.rows * w.row_bytes() >= kLeastBytes;
}

}  // namespace

OneRowView view_of_row(const Gpu& gpu, const ProductView& p, size_t places) {
  return p.weight.kind == Kind::kQ4 ? view_with<Kind::kQ4>(gpu, p, places) : view_with<Kind::kQ8>(gpu, p, places);
}

/// bring_row() has its squares where the sums come later.
size_t one_row_shared_bytes(const OneRowView& v) {
  const int numbers = std::max(v.pass_rows * v.pitch, squares_of(v.rows.product.weight.cols));
  return static_cast<size_t>(v.partial_at) + static_cast<size_t>(numbers) * sizeof(float);
}

void start_one_row(const Gpu& gpu, const ProductView& p) {
  const OneRowView v = view_of_row(gpu, p, places_bytes(p.weight));
  const size_t bytes = one_row_shared_bytes(v);
  if (p.weight.kind == Kind::kQ4) {
    p.weight.has_min ? start<Kind::kQ4, true>(gpu, v, bytes) : start<Kind::kQ4, false>(gpu, v, bytes);
  } else {
    p.weight.has_min ? start<Kind::kQ8, true>(gpu, v, bytes) : start<Kind::kQ8, false>(gpu, v, bytes);
  }
}

}  // namespace rows_mma

using namespace rows_mma;

bool takes_one_row(const Gpu& gpu, const ProductView& p) {
  const WeightView& w = p.weight;
  if (p.rows != 1 || !is_quantized(w.kind) || rows_of_mma(gpu, w) == 0) return false;
  if (!can_chain(gpu)) {
    if (gpu.streams_one_row() == StreamsOneRow::kNone) return false;
    if (gpu.streams_one_row() == StreamsOneRow::kLong && !is_long(p)) return false;
  }
  // Whole tiles, and scales by twos.
  if (w.rows % kTileRows != 0 || w.groups() % 2 != 0) return false;
  return one_row_shared_bytes(view_of_row(gpu, p, places_bytes(w))) <= gpu.shared_bytes_per_block();
}

void matmul_one_row(const Gpu& gpu, const ProductView& p) {
  if (is_long(p) || !chain_product(gpu, p)) start_one_row(gpu, p);
}

}  // namespace llama_ext::cuda
