// y = x W^T for one row of x and codes: decoding one sequence, where reading the weights bounds the time.
//
// A warp takes units, 512 bytes of each of four rows of W. Asynchronous copies bring them to places in shared memory that are the warp's own,
// each lane the bytes that it reads itself, so that nobody waits for another warp before all rows of a pass are summed. (In registers the
// units would share a barrier: a thread has six for what it has on its way, the compiler gives all loads of a loop one of them, and who waits
// for the oldest waits for the newest.) A lane has 32 codes of each row, or 16, and multiplies them two at a time with x, whole numbers of
// 16 bits (rows_mma.h); the four lanes of a step add up four rows without an error. From there on sums are made in the order of
// matmul_rows_mma.cu, whose bits they have. Next to nothing stays in registers, so that a second block fits beside the first: the next
// kernel's, whose first units come while this one ends. Bound by the GPU's memory.
// On an H200 a head of 525 MB takes 118 us, and 151 by matmul_rows_mma.cu. In a layer of 8B what q, k and v, o, gate and up gain is lost by
// down and, as a multiprocessor is divided in another way, by attention.
#include <algorithm>
#include <numeric>

#include "cuda/rows_mma.h"

namespace llama_ext::cuda {
namespace {

using namespace rows_mma;

constexpr int kOneRowThreads = 384;
constexpr int kOneRowWarps = kOneRowThreads / static_cast<int>(kWarp);
constexpr int kUnitRows = 4;
constexpr int kUnitBytes = 16 * static_cast<int>(kWarp);  // of a row
constexpr int kUnitSteps = static_cast<int>(kWarp) / 4;
constexpr int kSharesOfUnit = kUnitSteps / kTogether;
constexpr int kPlaces = 3;  // of a warp: a unit at work, and others on their way
constexpr int kXTurn = 4 * kOneRowThreads;
constexpr int kXAhead = 3;  // vectors of x that a thread has at a time
// Rows of a pass where there are several: whole turns of all warps, whatever the units of a row, and gates with their ups.
constexpr int kLeastPass = std::lcm(kUnitRows * kOneRowWarps, 2 * kGateGroup);
constexpr int kMostPartialBytes = 40 * 1024;  // where a pass is not the least

/// A place: rows of codes, then a word with the scale, and one with the minimum, for each lane.
template <bool kHasMin>
constexpr int kPlaceBytes = kUnitRows * kUnitBytes + (kHasMin ? 2 : 1) * 4 * static_cast<int>(kWarp);

/// Planes of x, in which a lane's codes have 16 bytes each: eight numbers.
template <Kind kKind>
constexpr int kPlanesOfX = kChunkElements<kKind> / 8;

struct OneRowView {
  RowsMmaView rows;
  int parts;  // of W's rows, `part_rows` each, that blocks share out
  int part_rows;
  int pass_rows;
  int row_bytes;
  int steps;   // of a row
  int shares;  // of a row
  int units;   // of a row
  // From a unit of a warp to its next, but for a row's end.
  int next_batches;  // of kUnitRows rows
  int next_units;
  int pitch;      // sums of a row of W
  int totals_at;  // bytes into shared memory, which StepFactor begin
  int x_at;
  int places_at;
  int partial_at;
};

/// A lane's codes of a row times its numbers of x, kUnit times.
template <Kind kKind>
__device__ __forceinline__ int multiply_pairs(const uint4& codes, const uint4 (&x)[kPlanesOfX<kKind>]) {
  const uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w};
  // Two sums: of lower nibbles and upper ones, or of what comes in turns.
  int sums[2] = {};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const auto pairs = [&](int plane) {
      return i % 2 == 0 ? uint2{x[plane].x, x[plane].y} : uint2{x[plane].z, x[plane].w};
    };
    if constexpr (kKind == Kind::kQ4) {
      const uint2 low = pairs(i / 2);
      const uint2 high = pairs(2 + i / 2);
      sums[0] = dot_pair<0>(low.x, words[i] & 0x0f0f0f0fu, sums[0]);
      sums[1] = dot_pair<0>(high.x, words[i] & 0xf0f0f0f0u, sums[1]);
      sums[0] = dot_pair<1>(low.y, words[i] & 0x0f0f0f0fu, sums[0]);
      sums[1] = dot_pair<1>(high.y, words[i] & 0xf0f0f0f0u, sums[1]);
    } else {
      const uint2 of = pairs(i / 2);
      sums[0] = dot_pair<0>(of.x, words[i], sums[0]);
      sums[1] = dot_pair<1>(of.y, words[i], sums[1]);
    }
  }
  return kUnit<kKind> * sums[0] + sums[1];
}

/// Of four rows, over the four lanes of a step: lane t has that of row t.
__device__ __forceinline__ int sum_of_step(const int (&rows)[kUnitRows], int lane) {
  const bool upper = (lane & 2) != 0;
  const bool odd = (lane & 1) != 0;
  const int first = (upper ? rows[2] : rows[0]) + __shfl_xor_sync(kAllLanes, upper ? rows[0] : rows[2], 2);
  const int second = (upper ? rows[3] : rows[1]) + __shfl_xor_sync(kAllLanes, upper ? rows[1] : rows[3], 2);
  return (odd ? second : first) + __shfl_xor_sync(kAllLanes, odd ? first : second, 1);
}

/// Where x goes.
struct BroughtRow {
  StepFactor* factors;
  float* totals;
  unsigned char* planes;
};

/// The row of x as whole numbers, zeros beyond its last column, normalised where there is a norm. gains: the thread's first ones.
template <Kind kKind>
__device__ __forceinline__ void bring_row(const OneRowView& v, const BroughtRow& to, float* squares,
                                          const float4 (&gains)[kXAhead]) {
  const ProductView& p = v.rows.product;
  const WeightView& w = p.weight;
  const float* row = p.x.row(0);
  const int thread = static_cast<int>(threadIdx.x);
  const int padded = w.stride;
  const int plane_bytes = v.units * kUnitBytes;
  const bool has_norm = p.norm.weight != nullptr;
  const auto load = [&](const float* from, int k) {
    return load_four(from, k < padded ? k : 0, w.cols, v.rows.is_whole);
  };
  float4 next[kXAhead];
#pragma unroll
  for (int i = 0; i < kXAhead; ++i) next[i] = load(row, 4 * thread + i * kXTurn);
  const float inverse = has_norm ? block_inverse_rms(next, row, w.cols, p.norm.eps, squares) : 1.0f;
#pragma unroll 1
  for (int first = 0; first < padded; first += kXAhead * kXTurn) {
    float4 fours[kXAhead];
#pragma unroll
    for (int i = 0; i < kXAhead; ++i) {
      const int k = first + 4 * thread + i * kXTurn;
      fours[i] = next[i];
      next[i] = load(row, k + kXAhead * kXTurn);
      if (!has_norm) continue;
      const float4 gain = first == 0 ? gains[i] : load(p.norm.weight, k);
      fours[i] = normalized(fours[i], inverse, gain);
    }
#pragma unroll
    for (int i = 0; i < kXAhead; ++i) {
      if (first + i * kXTurn >= padded) break;  // for all threads
      const int k = first + 4 * thread + i * kXTurn;
      const StepNumbers step = whole_numbers<kKind>(fours[i]);
      if (k >= padded) continue;
      const int of_chunk = k % kChunkElements<kKind>;
      *reinterpret_cast<uint2*>(to.planes + of_chunk / 8 * plane_bytes + k / kChunkElements<kKind> * 16 +
                                of_chunk % 8 * 2) = {lower_halves(step.numbers[0], step.numbers[1]),
                                                     lower_halves(step.numbers[2], step.numbers[3])};
      if (k % kStep<kKind> != 0) continue;
      to.factors[k / kStep<kKind>] = step.factor(kUnit<kKind>, w.zero);
      if (w.has_min) to.totals[k / kStep<kKind>] = step.total();
    }
  }
  __syncthreads();
}

/// Units of a warp on their way: one of the block's rows from `begin` on, and then each kOneRowWarps further on.
template <bool kHasMin>
class ComingUnits {
 public:
  /// count: of the warp.
  __device__ __forceinline__ ComingUnits(const OneRowView& v, int begin, int warp, int lane, int count)
      : v_(v), lane_(lane), left_(count), of_row_(warp % v.units) {
    const int64_t row = begin + kUnitRows * (warp / v.units);
    codes_ = v.rows.product.weight.data + row * v.row_bytes + of_row_ * kUnitBytes + lane * 16;
    pair_ = static_cast<int>(row + lane % 4) * (v.rows.groups / 2);
  }
  __device__ __forceinline__ bool is_empty() const { return left_ == 0; }

  /// The next one, if there is one, begins to come to a place.
  __device__ __forceinline__ void bring(unsigned char* place) {
    if (left_ > 0) {
      const WeightView& w = v_.rows.product.weight;
      const int step = of_row_ * kUnitSteps + lane_ / 4;
#pragma unroll
      for (int r = 0; r < kUnitRows; ++r) {
        copy_async(place + r * kUnitBytes + lane_ * 16, codes_ + r * v_.row_bytes, step < v_.steps);
      }
      // Factors of two groups, as fewer bytes are not copied.
      const int at = pair_ + (min(step, v_.steps - 1) >> (v_.rows.group_shift + 1));
      auto* words = reinterpret_cast<float*>(place + kUnitRows * kUnitBytes) + lane_;
      copy_async(words, reinterpret_cast<const float*>(w.data + w.scales_at) + at);
      if constexpr (kHasMin) copy_async(words + kWarp, reinterpret_cast<const float*>(w.data + w.mins_at) + at);
      --left_;
      advance();
    }
    commit_copies();
  }

 private:
  __device__ __forceinline__ void advance() {
    const int pairs = kUnitRows * (v_.rows.groups / 2);
    of_row_ += v_.next_units;
    codes_ += v_.next_batches * kUnitRows * v_.row_bytes + v_.next_units * kUnitBytes;
    pair_ += v_.next_batches * pairs;
    if (of_row_ < v_.units) return;
    of_row_ -= v_.units;
    codes_ += kUnitRows * v_.row_bytes - v_.units * kUnitBytes;
    pair_ += pairs;
  }

  const OneRowView& v_;
  int lane_;
  int left_;
  int of_row_;
  const unsigned char* codes_;  // the lane's, of the batch's first row
  int pair_;                    // of scales: the lane's row's first
};

/// Of x, what a lane meets in a unit.
template <Kind kKind, bool kHasMin>
struct MetX {
  uint4 numbers[kPlanesOfX<kKind>];
  StepFactor factor{};
  float total = 0.0f;
  int step = 0;
  int of_row = -1;  // the unit

  /// Where warps are a multiple of a row's units, all of a warp's units meet the same.
  __device__ __forceinline__ void load(const OneRowView& v, const unsigned char* memory, int unit, int lane) {
    if (unit == of_row) return;
    of_row = unit;
    step = unit * kUnitSteps + lane / 4;
    factor = reinterpret_cast<const StepFactor*>(memory)[step];
    if constexpr (kHasMin) total = reinterpret_cast<const float*>(memory + v.totals_at)[step];
#pragma unroll
    for (int plane = 0; plane < kPlanesOfX<kKind>; ++plane) {
      numbers[plane] =
          *reinterpret_cast<const uint4*>(memory + v.x_at + (plane * v.units + unit) * kUnitBytes + lane * 16);
    }
  }
};

/// The sum of a share: lane t of its last step has that of row t of the unit at `place`.
template <Kind kKind, bool kHasMin>
__device__ __forceinline__ float sum_of_share(const OneRowView& v, const MetX<kKind, kHasMin>& x,
                                              const unsigned char* place, int lane) {
  int dots[kUnitRows];
#pragma unroll
  for (int r = 0; r < kUnitRows; ++r) {
    dots[r] = multiply_pairs<kKind>(*reinterpret_cast<const uint4*>(place + r * kUnitBytes + lane * 16), x.numbers);
  }
  const auto* words = reinterpret_cast<const uint32_t*>(place + kUnitRows * kUnitBytes) + lane;
  const auto factor_of = [&](uint32_t word) {
    return from_f16(static_cast<uint16_t>((x.step >> v.rows.group_shift & 1) != 0 ? word >> 16 : word));
  };
  const float scale = factor_of(words[0]) * x.factor.scale;
  float minimum = 0.0f;
  if constexpr (kHasMin) minimum = factor_of(words[kWarp]);
  const auto dot =
      static_cast<float>(static_cast<int>(static_cast<uint32_t>(sum_of_step(dots, lane)) + x.factor.excess));
  // One step after the other, as one warp does in matmul_rows_mma.cu.
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kTogether; ++i) {
    float mine = fmaf(scale, dot, sum);
    if constexpr (kHasMin) mine = fmaf(minimum, x.total, mine);
    if (x.step >= v.steps) mine = sum;
    sum = i + 1 < kTogether ? __shfl_sync(kAllLanes, mine, (lane & 19) + 4 * i) : mine;
  }
  return sum;
}

/// Of a row of W, in the order of matmul_rows_mma.cu: a warp's shares there, then warps. Four at a time, as each sum would wait for its load.
__device__ __forceinline__ float sum_of_row(const OneRowView& v, const float* sums) {
  float all = 0.0f;
#pragma unroll 1
  for (int first = 0; first < v.rows.along_k; first += kLeastAlongK) {
    float of_warps[kLeastAlongK] = {};
    for (int share = first; share < v.shares; share += v.rows.along_k) {
#pragma unroll
      for (int i = 0; i < kLeastAlongK; ++i) {
        if (share + i < v.shares) of_warps[i] += sums[share + i];
      }
    }
#pragma unroll
    for (int i = 0; i < kLeastAlongK; ++i) all += of_warps[i];
  }
  return all;
}

/// Number i of y of a pass that begins with row `begin` of W. before: what it is added to.
__device__ __forceinline__ float y_of_pass(const OneRowView& v, const float* partial, int begin, int i, float before) {
  const ProductView& p = v.rows.product;
  const int row = p.is_gate_up ? i / kGateGroup * (2 * kGateGroup) + i % kGateGroup : i;
  float sum = sum_of_row(v, partial + row * v.pitch);
  if (p.bias != nullptr) sum += p.bias[begin + row];
  if (!p.is_gate_up) return p.accumulate ? sum + before : sum;
  float up = sum_of_row(v, partial + (row + kGateGroup) * v.pitch);
  if (p.bias != nullptr) up += p.bias[begin + row + kGateGroup];
  return silu(sum) * up;
}

template <Kind kKind, bool kHasMin>
__global__ void __launch_bounds__(kOneRowThreads, 2) matmul_one_row_kernel(const __grid_constant__ OneRowView v) {
  const ProductView& p = v.rows.product;
  const WeightView& w = p.weight;
  unsigned char* memory = shared_memory();
  auto* partial = reinterpret_cast<float*>(memory + v.partial_at);
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % static_cast<int>(kWarp);
  const int warp = thread / static_cast<int>(kWarp);
  const auto row_of = [&](unsigned block) {
    return static_cast<int>(int64_t{v.parts} * block / gridDim.x) * v.part_rows;
  };
  const int begin = row_of(blockIdx.x);
  const int end = row_of(blockIdx.x + 1);
  const auto units_of = [&](int rows) { return (rows / kUnitRows * v.units - warp + kOneRowWarps - 1) / kOneRowWarps; };

  ComingUnits<kHasMin> coming(v, begin, warp, lane, units_of(end - begin));
  unsigned char* places = memory + v.places_at + warp * kPlaces * kPlaceBytes<kHasMin>;
#pragma unroll 1
  for (int i = 0; i < kPlaces; ++i) coming.bring(places + i * kPlaceBytes<kHasMin>);
  float4 gains[kXAhead] = {};
  if (p.norm.weight != nullptr) {
#pragma unroll
    for (int i = 0; i < kXAhead; ++i) {
      const int k = 4 * thread + i * kXTurn;
      gains[i] = load_four(p.norm.weight, k < w.stride ? k : 0, w.cols, v.rows.is_whole);
    }
  }
  wait_for_predecessors<NextStart::kLater>();
  // With sums in memory that is not in use yet.
  bring_row<kKind>(
      v, {reinterpret_cast<StepFactor*>(memory), reinterpret_cast<float*>(memory + v.totals_at), memory + v.x_at},
      partial, gains);

  MetX<kKind, kHasMin> x;
  int place = 0;
  bool has_let_start = false;
#pragma unroll 1
  for (int pass = begin; pass < end; pass += v.pass_rows) {
    const int pass_rows = min(v.pass_rows, end - pass);
    // The numbers of y that are the pass's. Surplus gates are not written.
    const int first = p.is_gate_up ? pass / 2 : pass;
    const int count = p.is_gate_up ? min(pass_rows / 2, p.width - first) : pass_rows;
    float before = 0.0f;
    if (p.accumulate && thread < count) before = p.y.row(0)[first + thread];
    int unit = warp % v.units;
    float* to = partial + (kUnitRows * (warp / v.units) + lane % 4) * v.pitch + lane / 4 / kTogether;
#pragma unroll 1
    for (int i = units_of(pass_rows); i > 0; --i) {
      x.load(v, memory, unit, lane);
      wait_for_copies<kPlaces - 1>();
      unsigned char* from = places + place * kPlaceBytes<kHasMin>;
      const float sum = sum_of_share(v, x, from, lane);
      if (lane / 4 % kTogether == kTogether - 1) to[unit * kSharesOfUnit] = sum;
      coming.bring(from);
      if (coming.is_empty() && !has_let_start) {
        let_next_start();
        has_let_start = true;
      }
      place = place + 1 < kPlaces ? place + 1 : 0;
      unit += v.next_units;
      to += v.next_batches * kUnitRows * v.pitch;
      if (unit >= v.units) {
        unit -= v.units;
        to += kUnitRows * v.pitch;
      }
    }
    __syncthreads();
    for (int i = thread; i < count; i += kOneRowThreads) {
      float* y = p.y.row(0) + first + i;
      *y = y_of_pass(v, partial, pass, i, i == thread || !p.accumulate ? before : *y);
    }
    __syncthreads();  // the next pass has the same memory
  }
  if (!has_let_start) let_next_start();
  wait_for_copies<0>();  // of which the last groups have none
}

template <Kind kKind, bool kHasMin>
void start(const Gpu& gpu, const OneRowView& v, size_t shared_bytes) {
  divide_alike(gpu, matmul_one_row_kernel<kKind, kHasMin>, true);
  launch<Start::kEarly>(gpu, matmul_one_row_kernel<kKind, kHasMin>,
                        dim3(static_cast<unsigned>(std::min(v.parts, gpu.multiprocessors()))), kOneRowThreads,
                        shared_bytes, v);
}

template <Kind kKind>
OneRowView view_of_row(const Gpu& gpu, const ProductView& p) {
  const WeightView& w = p.weight;
  OneRowView v;
  v.rows = view_of(p);
  v.part_rows = p.is_gate_up ? 2 * kGateGroup : kUnitRows;
  v.parts = w.rows / v.part_rows;
  v.row_bytes = static_cast<int>(w.row_bytes());
  v.steps = w.stride / kStep<kKind>;
  v.shares = static_cast<int>(blocks_for(v.steps, kTogether));
  v.units = static_cast<int>(blocks_for(v.row_bytes, kUnitBytes));
  v.next_batches = kOneRowWarps / v.units;
  v.next_units = kOneRowWarps % v.units;
  v.pitch = v.units * kSharesOfUnit + 1;
  // All rows of a block in one pass, if they fit.
  const int rows = static_cast<int>(blocks_for(v.parts, std::min(v.parts, gpu.multiprocessors()))) * v.part_rows;
  const int fitting = kMostPartialBytes / (v.pitch * static_cast<int>(sizeof(float)));
  v.pass_rows = rows <= fitting ? rows : std::max(fitting / kLeastPass, 1) * kLeastPass;
  const int steps = v.units * kUnitSteps;
  v.totals_at = steps * static_cast<int>(sizeof(StepFactor));
  v.x_at = v.totals_at + (w.has_min ? steps * static_cast<int>(sizeof(float)) : 0);
  v.places_at = v.x_at + kPlanesOfX<kKind> * v.units * kUnitBytes;
  v.partial_at = v.places_at + kOneRowWarps * kPlaces * (w.has_min ? kPlaceBytes<true> : kPlaceBytes<false>);
  return v;
}

OneRowView view_of_row(const Gpu& gpu, const ProductView& p) {
  return p.weight.kind == Kind::kQ4 ? view_of_row<Kind::kQ4>(gpu, p) : view_of_row<Kind::kQ8>(gpu, p);
}

/// bring_row() has its squares where the sums come later.
size_t shared_bytes(const OneRowView& v) {
  const int numbers = std::max(v.pass_rows * v.pitch, squares_of(v.rows.product.weight.cols));
  return static_cast<size_t>(v.partial_at) + static_cast<size_t>(numbers) * sizeof(float);
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

bool takes_one_row(const Gpu& gpu, const ProductView& p) {
  const WeightView& w = p.weight;
  if (p.rows != 1 || !is_quantized(w.kind) || rows_of_mma(gpu, w) == 0) return false;
  if (gpu.streams_one_row() == StreamsOneRow::kNone) return false;
  if (gpu.streams_one_row() == StreamsOneRow::kLong && !is_long(p)) return false;
  // Whole batches, and scales by twos.
  if (w.rows % kUnitRows != 0 || w.groups() % 2 != 0) return false;
  return shared_bytes(view_of_row(gpu, p)) <= gpu.shared_bytes_per_block();
}

void matmul_one_row(const Gpu& gpu, const ProductView& p) {
  const OneRowView v = view_of_row(gpu, p);
  const size_t bytes = shared_bytes(v);
  if (p.weight.kind == Kind::kQ4) {
    p.weight.has_min ? start<Kind::kQ4, true>(gpu, v, bytes) : start<Kind::kQ4, false>(gpu, v, bytes);
  } else {
    p.weight.has_min ? start<Kind::kQ8, true>(gpu, v, bytes) : start<Kind::kQ8, false>(gpu, v, bytes);
  }
}

}  // namespace llama_ext::cuda
