// The next token of rows that decode here (ops/sample_next.h). A block takes 1024 logits of a row; the block of a row that comes last
// at the end of a kernel joins what the others have left, in their order. So there is a kernel to find the largest logit (which is
// all of greedy decoding), one to draw, and between them, where top_k or top_p leave something out, one for every 12 bits of a
// logit: they find the last logit that is kept as a radix sort would, from the highest bits on. What a top_k of at most 256 keeps fits
// into one block, which then does the rest by itself.
//
// Logits are processed in float64, as on the host; weights exp((x - largest) / temperature) are summed as whole multiples of 2^-s,
// so that their sums do not depend on any order. Bound by launches.
#include <type_traits>

#include "cuda/sample_parts.h"

namespace llama_ext::cuda {
namespace {

using namespace sampling;

/// The larger, and of equals the first token.
__device__ __forceinline__ void take_larger(double& largest, int32_t& token, double other, int32_t other_token) {
  if (other > largest || (other == largest && other_token < token)) {
    largest = other;
    token = other_token;
  }
}

__global__ void __launch_bounds__(kThreads) find_largest_kernel(const __grid_constant__ Sampling s) {
  wait_for_predecessors();
  auto* doubles = reinterpret_cast<double*>(shared_memory());  // (kWarp) twice
  auto* ints = reinterpret_cast<int32_t*>(doubles + 2 * kWarp);
  const SampleNextView& v = s.v;
  const int row = static_cast<int>(blockIdx.y);
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / static_cast<int>(kWarp);
  constexpr int kWarps = static_cast<int>(kThreads / kWarp);
  const int first = static_cast<int>(blockIdx.x) * kOfBlock + thread * kOfThread;
  constexpr double kNothing = -INFINITY;

  float raw[kOfThread];
  float raw_largest = -INFINITY;
  double largest = kNothing;
  int32_t token = v.vocabulary;
  bool is_bad = false;
#pragma unroll
  for (int i = 0; i < kOfThread; ++i) {
    raw[i] = -INFINITY;
    if (first + i >= v.vocabulary) continue;
    raw[i] = v.logits[int64_t{row} * v.vocabulary + first + i];
    const double x = processed(v, row, first + i);
    is_bad = is_bad || !(fabsf(raw[i]) <= 3.4028235e38f) || !(x <= 1.7976931348623157e308);
    raw_largest = fmaxf(raw_largest, raw[i]);
    take_larger(largest, token, x, first + i);
  }
  // For the kernels that look for a cut.
  const int64_t begin = int64_t{blockIdx.x} * kThreads + thread;
  for (int64_t i = begin; i < kBins; i += int64_t{gridDim.x} * kThreads) {
    if (s.counts != nullptr) s.counts[int64_t{row} * kBins + i] = 0;
    if (s.weights != nullptr) s.weights[int64_t{row} * kBins + i] = 0;
  }
  // Both over the block.
  const auto over_block = [&](double& value, int32_t& index) {
    for (int lanes = 16; lanes > 0; lanes /= 2) {
      const double other = __shfl_xor_sync(kAllLanes, value, lanes);
      take_larger(value, index, other, __shfl_xor_sync(kAllLanes, index, lanes));
    }
    if (thread % static_cast<int>(kWarp) == 0) {
      doubles[warp] = value;
      ints[warp] = index;
    }
    __syncthreads();
    value = doubles[0];
    index = ints[0];
    for (int i = 1; i < kWarps; ++i) take_larger(value, index, doubles[i], ints[i]);
    __syncthreads();
  };
  over_block(largest, token);
  raw_largest = block_max(raw_largest, reinterpret_cast<float*>(doubles));
  double sum = 0.0;
  if (raw_largest > -INFINITY && raw_largest < INFINITY) {
#pragma unroll
    for (int i = 0; i < kOfThread; ++i) sum += exp_of(static_cast<double>(raw[i]) - static_cast<double>(raw_largest));
  }
  sum = block_sum(sum, doubles);
  const float bad = block_max(is_bad ? 1.0f : 0.0f, reinterpret_cast<float*>(doubles));
  if (thread == 0) {
    Found found;
    found.largest = largest;
    found.exp_sum = sum;
    found.raw_largest = raw_largest;
    found.token = token;
    found.is_bad = bad > 0.0f ? 1 : 0;
    s.found[int64_t{row} * gridDim.x + blockIdx.x] = found;
  }
  if (!is_last_block(v.state[row], reinterpret_cast<uint32_t*>(ints))) return;

  const Found* all = s.found + int64_t{row} * gridDim.x;
  largest = kNothing;
  token = v.vocabulary;
  raw_largest = -INFINITY;
  is_bad = false;
  for (int i = thread; i < static_cast<int>(gridDim.x); i += static_cast<int>(kThreads)) {
    take_larger(largest, token, all[i].largest, all[i].token);
    raw_largest = fmaxf(raw_largest, all[i].raw_largest);
    is_bad = is_bad || all[i].is_bad != 0;
  }
  over_block(largest, token);
  raw_largest = block_max(raw_largest, reinterpret_cast<float*>(doubles));
  is_bad = block_max(is_bad ? 1.0f : 0.0f, reinterpret_cast<float*>(doubles)) > 0.0f || !(largest > kNothing);
  sum = 0.0;
  if (!is_bad) {
    for (int i = thread; i < static_cast<int>(gridDim.x); i += static_cast<int>(kThreads)) {
      sum += all[i].exp_sum * exp_of(static_cast<double>(all[i].raw_largest) - static_cast<double>(raw_largest));
    }
  }
  sum = block_sum(sum, doubles);
  if (thread != 0) return;
  Choice& choice = s.choices[row];
  choice.largest = largest;
  choice.log_sum = is_bad ? 0.0 : static_cast<double>(raw_largest) + log(sum);
  choice.is_valid = is_bad ? 0 : 1;
  const uint64_t of_nothing = is_narrow(v) ? Keys<true>::kOfNothing : Keys<false>::kOfNothing;
  choice.top_k = {of_nothing, 0};
  choice.top_p = {of_nothing, 0};
  choice.prefix = 0;
  choice.wanted = 0;
  choice.few_above = 0;
  choice.few_equals = 0;
  if (v.temperature == 0.0) finish(s, row, is_bad ? 0 : token, !is_bad);
}

/// The next digit of the last logit that top_k keeps (kByWeight: that top_p keeps of those), the highest first.
template <bool kByWeight, bool kNarrow>
__global__ void __launch_bounds__(kThreads) find_cut_kernel(const __grid_constant__ Sampling s, int pass) {
  using K = Keys<kNarrow>;
  using Number = typename std::conditional<kByWeight, uint64_t, uint32_t>::type;
  wait_for_predecessors();
  const SampleNextView& v = s.v;
  const int row = static_cast<int>(blockIdx.y);
  const int thread = static_cast<int>(threadIdx.x);
  Choice& choice = s.choices[row];
  auto* bins = reinterpret_cast<Number*>(shared_memory());  // (kBins)
  for (int i = thread; i < kBins; i += static_cast<int>(kThreads)) bins[i] = 0;
  __syncthreads();

  // The last digit has the bits that are left.
  const int shift = max(K::kBits - (pass + 1) * kDigitBits, 0);
  const int upper = K::kBits - pass * kDigitBits;
  const uint64_t mask = (uint64_t{1} << (upper - shift)) - 1;
  const uint64_t prefix = pass == 0 ? 0 : choice.prefix;
  const int first = static_cast<int>(blockIdx.x) * kOfBlock + thread * kOfThread;
  for (int i = 0; i < kOfThread; ++i) {
    if (first + i >= v.vocabulary) break;
    const double x = processed(v, row, first + i);
    const uint64_t key = K::of(x);
    if (key <= K::kOfNothing || (pass > 0 && key >> upper != prefix)) continue;
    if constexpr (kByWeight) {
      // Those at the cut of top_k are added below.
      if (key <= choice.top_k.key) continue;
      atomicAdd(reinterpret_cast<unsigned long long*>(bins + (key >> shift & mask)),
                static_cast<unsigned long long>(in_multiples(s, weight_of(s, choice, x))));
    } else {
      atomicAdd(bins + (key >> shift & mask), 1u);
    }
  }
  __syncthreads();
  Number* all = nullptr;
  if constexpr (kByWeight) {
    all = s.weights + int64_t{row} * kBins;
  } else {
    all = s.counts + int64_t{row} * kBins;
  }
  for (int i = thread; i < kBins; i += static_cast<int>(kThreads)) {
    if (bins[i] == 0) continue;
    if constexpr (kByWeight) {
      atomicAdd(reinterpret_cast<unsigned long long*>(all + i), static_cast<unsigned long long>(bins[i]));
    } else {
      atomicAdd(all + i, bins[i]);
    }
  }
  auto* place = reinterpret_cast<uint32_t*>(bins + kBins);
  if (!is_last_block(v.state[row], place)) return;

  // A thread has some bins next to each other, the highest first.
  constexpr int kMine = kBins / static_cast<int>(kThreads);
  auto* sums = reinterpret_cast<uint64_t*>(shared_memory());  // (kThreads); the bins are done with
  uint64_t mine[kMine];
  uint64_t sum = 0;
  const uint64_t equal_key = choice.top_k.key;
  const bool has_equals = kByWeight && choice.top_k.equals > 0 && (pass == 0 || equal_key >> upper == prefix);
  const uint64_t equal_bin = equal_key >> shift & mask;
  const uint64_t equal_weight = has_equals ? in_multiples(s, weight_of(s, choice, K::number(equal_key))) : 0;
#pragma unroll
  for (int i = 0; i < kMine; ++i) {
    const int bin = kBins - 1 - thread * kMine - i;
    mine[i] = all[bin];
    all[bin] = 0;
    if (has_equals && static_cast<uint64_t>(bin) == equal_bin) mine[i] += choice.top_k.equals * equal_weight;
    sum += mine[i];
  }
  uint64_t wanted = choice.wanted;  // before the barriers: one thread will write it
  uint64_t total = 0;
  uint64_t above = sum_before(sum, sums, total);
  if (pass == 0) {
    wanted = static_cast<uint64_t>(v.top_k);
    if constexpr (kByWeight) {
      // The least multiple that reaches top_p of the total; the likeliest is kept in any case.
      wanted = static_cast<uint64_t>(ceil(v.top_p * static_cast<double>(total)));
      if (wanted < 1) wanted = 1;
      if (wanted > total) wanted = total;
    }
  }
  // Fewer than are wanted: all are kept.
  const bool has_cut = wanted <= total;
  if (!has_cut) {
    if (thread == 0) choice.wanted = ~uint64_t{0};
    return;
  }
#pragma unroll
  for (int i = 0; i < kMine; ++i) {
    if (above < wanted && above + mine[i] >= wanted) {
      const uint64_t bin = static_cast<uint64_t>(kBins - 1 - thread * kMine - i);
      const uint64_t found = pass == 0 ? bin : prefix << (upper - shift) | bin;
      choice.prefix = found;
      choice.wanted = wanted - above;
      if (shift == 0) {
        Cut cut{found, wanted - above};
        if constexpr (kByWeight) {
          // So many tokens of this one weight.
          const uint64_t each = in_multiples(s, weight_of(s, choice, K::number(cut.key)));
          cut.equals = each == 0 ? 1 : (wanted - above + each - 1) / each;
          choice.top_p = cut;
        } else {
          choice.top_k = cut;
        }
      }
    }
    above += mine[i];
  }
}

/// The searches for cuts.
template <bool kNarrow>
void start_cuts(const Gpu& gpu, const Sampling& s, dim3 grid) {
  constexpr int kPasses = (Keys<kNarrow>::kBits + kDigitBits - 1) / kDigitBits;
  for (int pass = 0; s.counts != nullptr && pass < kPasses; ++pass) {
    launch<Start::kEarly>(gpu, find_cut_kernel<false, kNarrow>, grid, kThreads, (kBins + 4) * sizeof(uint32_t), s,
                          pass);
  }
  for (int pass = 0; s.weights != nullptr && pass < kPasses; ++pass) {
    launch<Start::kEarly>(gpu, find_cut_kernel<true, kNarrow>, grid, kThreads, (kBins + 1) * sizeof(uint64_t), s, pass);
  }
}

}  // namespace

void sample_next(const Gpu& gpu, const SampleNextView& v) {
  if (v.rows == 0) return;
  const auto blocks = static_cast<unsigned>(blocks_for(v.vocabulary, kOfBlock));
  const auto rows = static_cast<unsigned>(v.rows);
  const size_t parts = static_cast<size_t>(rows) * blocks;
  const bool is_greedy = v.temperature == 0.0;
  const bool has_top_k = !is_greedy && v.top_k > 0 && v.top_k < v.vocabulary;
  const bool keeps_few = has_top_k && v.top_k <= kFew;
  const bool has_top_p = !is_greedy && v.top_p < 1.0 && !keeps_few;
  const size_t bins = has_top_k || has_top_p ? static_cast<size_t>(rows) * kBins : 0;
  const Scratch found(gpu, parts * sizeof(Found));
  const Scratch choices(gpu, rows * sizeof(Choice));
  const Scratch drawn(gpu, is_greedy ? 0 : parts * sizeof(Drawn));
  const Scratch counts(gpu, has_top_k ? bins * sizeof(uint32_t) : 0);
  const Scratch few(gpu, keeps_few ? static_cast<size_t>(rows) * (kFew + kMostEquals) * sizeof(int32_t) : 0);
  const Scratch weights(gpu, has_top_p ? bins * sizeof(uint64_t) : 0);
  Sampling s;
  s.v = v;
  s.found = found.as<Found>();
  s.choices = choices.as<Choice>();
  s.drawn = drawn.as<Drawn>();
  s.counts = counts.as<uint32_t>();
  s.weights = weights.as<uint64_t>();
  s.few = few.as<int32_t>();
  s.scale_exponent = 62;  // so that the largest sum is below 2^62
  for (int64_t size = 1; size < v.vocabulary; size *= 2) --s.scale_exponent;
  const dim3 grid(blocks, rows);
  launch<Start::kEarly>(gpu, find_largest_kernel, grid, kThreads, 3 * kWarp * sizeof(double), s);
  if (is_greedy) return;
  if (is_narrow(v)) {
    start_cuts<true>(gpu, s, grid);
  } else {
    start_cuts<false>(gpu, s, grid);
  }
  start_draw(gpu, s, grid);
}

}  // namespace llama_ext::cuda
