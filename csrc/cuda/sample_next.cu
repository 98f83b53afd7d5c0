// The next token of rows that decode here (ops/sample_next.h). A block takes 1024 logits of a row; the block of a row that comes last
// at the end of a kernel joins what the others have left, in their order. So there is a kernel to find the largest logit (which is
// all of greedy decoding), one to draw, and between them, where top_k or top_p leave something out, one for every 12 bits of a
// logit: they find the last logit that is kept as a radix sort would, from the highest bits on. What a top_k of at most 256 keeps fits
// into one block, which then does the rest by itself.
//
// Logits are processed in float64, as on the host; weights exp((x - largest) / temperature) are summed as whole multiples of 2^-s,
// so that their sums do not depend on any order. Bound by launches.
#include <cstdint>
#include <type_traits>

#include "cuda/kernels.h"
#include "cuda/numeric.h"

namespace llama_ext::cuda {
namespace {

constexpr int kOfThread = 4;  // logits of a thread, next to each other
constexpr int kOfBlock = kThreads * kOfThread;
constexpr int kDigitBits = 12;
constexpr int kBins = 1 << kDigitBits;
constexpr int kFew = kThreads;         // tokens that one block draws from
constexpr int kMostEquals = 4 * kFew;  // of one key, among which it looks for the first

/// ops/logits_loops.h's exp_of, operation by operation: the same bits.
__device__ __forceinline__ double exp_of(double x) {
  constexpr double kRound = 0x1.8p52;
  const auto power_of_two = [](double rounded) {
    return __longlong_as_double((__double_as_longlong(rounded) << 52) + (1023ll << 52));
  };
  const double clamped = x > -1000.0 ? x : -1000.0;
  const double n = (clamped * 0x1.71547652b82fep+0 + kRound) - kRound;
  const double r = (clamped - n * 0x1.62e42feep-1) - n * 0x1.a39ef35793c76p-33;
  const double half = n * 0.5 + kRound;
  const double rest = (n - (half - kRound)) + kRound;
  double series = 1.0 / 6227020800.0;
  series = series * r + 1.0 / 479001600.0;
  series = series * r + 1.0 / 39916800.0;
  series = series * r + 1.0 / 3628800.0;
  series = series * r + 1.0 / 362880.0;
  series = series * r + 1.0 / 40320.0;
  series = series * r + 1.0 / 5040.0;
  series = series * r + 1.0 / 720.0;
  series = series * r + 1.0 / 120.0;
  series = series * r + 1.0 / 24.0;
  series = series * r + 1.0 / 6.0;
  series = series * r + 0.5;
  series = series * r + 1.0;
  series = series * r + 1.0;
  return series * power_of_two(half) * power_of_two(rest);
}

/// ops/sample.h's random_uniform, times 2^53.
__device__ uint64_t random_bits(const RandomKey& key) {
  uint32_t block[4] = {static_cast<uint32_t>(key.counter), static_cast<uint32_t>(key.counter >> 32),
                       static_cast<uint32_t>(key.stream), static_cast<uint32_t>(key.stream >> 32)};
  uint32_t key0 = static_cast<uint32_t>(key.seed);
  uint32_t key1 = static_cast<uint32_t>(key.seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xd2511f53u} * block[0];
    const uint64_t product1 = uint64_t{0xcd9e8d57u} * block[2];
    const uint32_t second = block[1];
    const uint32_t fourth = block[3];
    block[0] = static_cast<uint32_t>(product1 >> 32) ^ second ^ key0;
    block[1] = static_cast<uint32_t>(product1);
    block[2] = static_cast<uint32_t>(product0 >> 32) ^ fourth ^ key1;
    block[3] = static_cast<uint32_t>(product0);
    key0 += 0x9e3779b9u;
    key1 += 0xbb67ae85u;
  }
  return (static_cast<uint64_t>(block[1]) << 32 | block[0]) >> 11;
}

/// Larger numbers have larger keys; -0 and 0 have one. Logits as they came are float32 numbers, whose keys have 32 bits: fewer to look
/// at, and better spread. kOfNothing is -inf's.
template <bool kNarrow>
struct Keys;
template <>
struct Keys<true> {
  static constexpr int kBits = 32;
  static constexpr uint64_t kOfNothing = 0x007fffffu;
  __device__ __forceinline__ static uint64_t of(double x) {
    const uint32_t bits = __float_as_uint(static_cast<float>(x) + 0.0f);
    return bits >> 31 != 0 ? ~bits : bits | 0x80000000u;
  }
  __device__ __forceinline__ static double number(uint64_t key) {
    const auto bits = static_cast<uint32_t>(key);
    return static_cast<double>(__uint_as_float(bits >> 31 != 0 ? bits & 0x7fffffffu : ~bits));
  }
};
template <>
struct Keys<false> {
  static constexpr int kBits = 64;
  static constexpr uint64_t kOfNothing = 0x000fffffffffffffull;
  __device__ __forceinline__ static uint64_t of(double x) {
    const auto bits = static_cast<uint64_t>(__double_as_longlong(x + 0.0));
    return bits >> 63 != 0 ? ~bits : bits | uint64_t{1} << 63;
  }
  __device__ __forceinline__ static double number(uint64_t key) {
    return __longlong_as_double(static_cast<long long>(key >> 63 != 0 ? key & ~(uint64_t{1} << 63) : ~key));
  }
};

/// What one block found in its logits.
struct Found {
  double largest;  // of the processed logits, and the first token that has it
  double exp_sum;  // of exp(logit - raw_largest)
  float raw_largest;
  int32_t token;
  int32_t is_bad;
};

/// What is kept: keys above `key`, and the first `equals` tokens of that key.
struct Cut {
  uint64_t key;
  uint64_t equals;
};

/// What the kernels of a row hand on.
struct Choice {
  double largest;
  double log_sum;
  int32_t is_valid;
  // The search for a cut.
  Cut top_k;
  Cut top_p;
  uint64_t prefix;  // the digits found so far
  uint64_t wanted;  // of tokens, or of weight, still to be found below what is above `prefix`
  // Of few tokens: how many have been found, those of the cut's key by themselves.
  uint32_t few_above;
  uint32_t few_equals;
};

/// Kept tokens of a block.
struct Drawn {
  uint64_t above;   // weight of those above the cut
  uint64_t equals;  // tokens at the cut
};

struct Sampling {
  SampleNextView v;
  Found* found;        // (rows, blocks)
  Choice* choices;     // (rows)
  Drawn* drawn;        // (rows, blocks)
  uint32_t* counts;    // (rows, kBins), zero between kernels
  uint64_t* weights;   // (rows, kBins), likewise
  int32_t* few;        // (rows, kFew + kMostEquals): tokens above the cut, and at it, in any order
  int scale_exponent;  // weights are multiples of 2^-scale_exponent
};

__host__ __device__ bool is_narrow(const SampleNextView& v) { return v.bias == nullptr && v.occurrences == nullptr; }

__device__ double processed(const SampleNextView& v, int row, int token) {
  double x = static_cast<double>(v.logits[int64_t{row} * v.vocabulary + token]);
  if (v.bias != nullptr) x += static_cast<double>(v.bias[token]);
  if (v.occurrences != nullptr) {
    const int32_t occurrences = v.occurrences[int64_t{row} * v.vocabulary + token];
    if (occurrences != 0) {
      if (v.repetition_penalty != 1.0) x = x > 0.0 ? x / v.repetition_penalty : x * v.repetition_penalty;
      const int32_t count = occurrences & (kInPrompt - 1);
      if (count > 0 && (v.presence_penalty != 0.0 || v.frequency_penalty != 0.0)) {
        x -= v.presence_penalty + v.frequency_penalty * count;
      }
    }
  }
  return x;
}

__device__ __forceinline__ double weight_of(const Sampling& s, const Choice& choice, double x) {
  return exp_of((x - choice.largest) / s.v.temperature);
}
__device__ __forceinline__ uint64_t in_multiples(const Sampling& s, double weight) {
  const double scale = __longlong_as_double(static_cast<long long>(1023 + s.scale_exponent) << 52);
  return static_cast<uint64_t>(weight * scale + 0.5);
}

/// Whether this block is the last of its row to come here; what the others wrote before can be read then. `place`: shared.
__device__ bool is_last_block(DecodeRow& row, uint32_t* place) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) *place = atomicInc(&row.arrivals, gridDim.x - 1) == gridDim.x - 1 ? 1u : 0u;
  __syncthreads();
  const bool is_last = *place != 0;
  if (is_last) __threadfence();
  return is_last;
}

/// The sum of what threads before this one have; `all` becomes that of all. `places`: kThreads numbers of shared memory.
__device__ uint64_t sum_before(uint64_t value, uint64_t* places, uint64_t& all) {
  const int thread = static_cast<int>(threadIdx.x);
  places[thread] = value;
  __syncthreads();
  for (int step = 1; step < static_cast<int>(kThreads); step *= 2) {
    const uint64_t other = thread >= step ? places[thread - step] : 0;
    __syncthreads();
    places[thread] += other;
    __syncthreads();
  }
  all = places[kThreads - 1];
  const uint64_t before = places[thread] - value;
  __syncthreads();
  return before;
}

/// By one thread.
__device__ void finish(const Sampling& s, int row, int32_t token, bool is_valid) {
  const SampleNextView& v = s.v;
  DecodeRow& state = v.state[row];
  const float logit = v.logits[int64_t{row} * v.vocabulary + token];
  DecodeResult result;
  result.token = token;
  result.logprob = static_cast<float>(static_cast<double>(logit) - s.choices[row].log_sum);
  result.is_valid = is_valid ? 1 : 0;
  v.results[int64_t{state.slot} * v.rows + row] = result;
  v.tokens[row] = token;
  v.positions[row] += 1;
  state.key.counter += 1;
  state.slot = state.slot + 1 == v.slots ? 0 : state.slot + 1;
  if (v.occurrences != nullptr) v.occurrences[int64_t{row} * v.vocabulary + token] += 1;
}

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

template <bool kNarrow>
__global__ void __launch_bounds__(kThreads) draw_kernel(const __grid_constant__ Sampling s) {
  using K = Keys<kNarrow>;
  wait_for_predecessors();
  auto* sums = reinterpret_cast<uint64_t*>(shared_memory());  // (kThreads)
  auto* chosen = sums + kThreads;                             // (4)
  const SampleNextView& v = s.v;
  const int row = static_cast<int>(blockIdx.y);
  const int thread = static_cast<int>(threadIdx.x);
  const Choice& choice = s.choices[row];
  const Cut cut = v.top_p < 1.0 ? choice.top_p : choice.top_k;
  const auto weight_at = [&](double x) {
    const double weight = weight_of(s, choice, x);
    return weight >= v.min_p ? in_multiples(s, weight) : 0;
  };

  Drawn mine{0, 0};
  const auto look = [&](int first, uint64_t weights[kOfThread], bool at_cut[kOfThread]) {
#pragma unroll
    for (int i = 0; i < kOfThread; ++i) {
      weights[i] = 0;
      at_cut[i] = false;
      if (first + i >= v.vocabulary) continue;
      const double x = processed(v, row, first + i);
      const uint64_t key = K::of(x);
      if (key < cut.key || key <= K::kOfNothing) continue;
      weights[i] = weight_at(x);
      at_cut[i] = key == cut.key;
      if (at_cut[i]) {
        mine.equals += 1;
      } else {
        mine.above += weights[i];
      }
    }
  };
  uint64_t weights[kOfThread];
  bool at_cut[kOfThread];
  look(static_cast<int>(blockIdx.x) * kOfBlock + thread * kOfThread, weights, at_cut);
  Drawn block{0, 0};
  sum_before(mine.above, sums, block.above);
  sum_before(mine.equals, sums, block.equals);
  if (thread == 0) s.drawn[int64_t{row} * gridDim.x + blockIdx.x] = block;
  if (!is_last_block(v.state[row], reinterpret_cast<uint32_t*>(chosen))) return;

  // The block in which the draw lies. Blocks in their order, so many at a time as there are threads.
  const Drawn* all = s.drawn + int64_t{row} * gridDim.x;
  const int blocks = static_cast<int>(gridDim.x);
  const uint64_t equal_weight = cut.key <= K::kOfNothing ? 0 : weight_at(K::number(cut.key));
  uint64_t total = 0;
  uint64_t target = 0;
  for (int round = 0; round < 2; ++round) {  // for the total first, then for the place
    uint64_t before = 0;
    uint64_t equals_before = 0;
    for (int begin = 0; begin < blocks; begin += static_cast<int>(kThreads)) {
      const int i = begin + thread;
      const Drawn drawn = i < blocks ? all[i] : Drawn{0, 0};
      uint64_t all_equals = 0;
      const uint64_t equals = equals_before + sum_before(drawn.equals, sums, all_equals);
      const uint64_t room = cut.equals > equals ? cut.equals - equals : 0;
      const uint64_t weight = drawn.above + (drawn.equals < room ? drawn.equals : room) * equal_weight;
      uint64_t all_weight = 0;
      const uint64_t reached = before + sum_before(weight, sums, all_weight);
      if (round == 1 && reached <= target && reached + weight > target) {
        chosen[0] = static_cast<uint64_t>(i);
        chosen[1] = reached;
        chosen[2] = equals;
      }
      before += all_weight;
      equals_before += all_equals;
    }
    if (round == 0) {
      total = before;
      // floor(u total), of u in multiples of 2^-53
      const uint64_t u = random_bits(v.state[row].key);
      target = __umul64hi(u, total) << 11 | u * total >> 53;
    }
  }
  __syncthreads();
  const bool is_valid = choice.is_valid != 0 && total > 0;
  if (!is_valid) {
    if (thread == 0) finish(s, row, 0, false);
    return;
  }

  // The token.
  const int first = static_cast<int>(chosen[0]) * kOfBlock + thread * kOfThread;
  uint64_t reached = chosen[1];
  uint64_t rank = chosen[2];
  mine = {0, 0};
  look(first, weights, at_cut);
  uint64_t ignored = 0;
  rank += sum_before(mine.equals, sums, ignored);
  uint64_t sum = 0;
#pragma unroll
  for (int i = 0; i < kOfThread; ++i) {
    if (at_cut[i] && rank++ >= cut.equals) weights[i] = 0;
    sum += weights[i];
  }
  reached += sum_before(sum, sums, ignored);
#pragma unroll
  for (int i = 0; i < kOfThread; ++i) {
    if (reached <= target && reached + weights[i] > target) finish(s, row, first + i, true);
    reached += weights[i];
  }
}

/// The draw where top_k keeps few.
template <bool kNarrow>
__global__ void __launch_bounds__(kThreads) draw_few_kernel(const __grid_constant__ Sampling s) {
  using K = Keys<kNarrow>;
  wait_for_predecessors();
  auto* sums = reinterpret_cast<uint64_t*>(shared_memory());  // (kThreads)
  auto* keys = sums + kThreads;                               // (kFew)
  auto* weights = keys + kFew;                                // (kFew)
  auto* tokens = reinterpret_cast<int32_t*>(weights + kFew);  // (kFew)
  auto* place = reinterpret_cast<uint32_t*>(tokens + kFew);
  const SampleNextView& v = s.v;
  const int row = static_cast<int>(blockIdx.y);
  const int thread = static_cast<int>(threadIdx.x);
  Choice& choice = s.choices[row];
  const Cut cut = choice.top_k;
  int32_t* above = s.few + int64_t{row} * (kFew + kMostEquals);
  int32_t* equals = above + kFew;
  const int first = static_cast<int>(blockIdx.x) * kOfBlock + thread * kOfThread;
  for (int i = 0; i < kOfThread; ++i) {
    if (first + i >= v.vocabulary) break;
    const uint64_t key = K::of(processed(v, row, first + i));
    if (key <= K::kOfNothing || key < cut.key) continue;
    const bool is_above = key > cut.key;
    const uint32_t at = atomicAdd(is_above ? &choice.few_above : &choice.few_equals, 1u);
    if (is_above && at < kFew) above[at] = first + i;
    if (!is_above && at < kMostEquals) equals[at] = first + i;
  }
  if (!is_last_block(v.state[row], place)) return;

  // In any order: what follows does not depend on it.
  const int count_above = static_cast<int>(choice.few_above < kFew ? choice.few_above : kFew);
  const int found_equals = static_cast<int>(choice.few_equals < 0x7fffffffu ? choice.few_equals : 0x7fffffffu);
  const int room = kFew - count_above;
  const int count_equals = static_cast<int>(cut.equals < static_cast<uint64_t>(room) ? cut.equals : room);
  const int count = count_above + min(count_equals, found_equals);
  if (thread < count_above) tokens[thread] = above[thread];
  if (found_equals <= kMostEquals) {
    for (int i = thread; i < found_equals; i += static_cast<int>(kThreads)) {
      int rank = 0;
      for (int j = 0; j < found_equals; ++j) rank += equals[j] < equals[i] ? 1 : 0;
      if (rank < count_equals) tokens[count_above + rank] = equals[i];
    }
  } else {
    // So many that the first ones are looked for where they are.
    uint64_t before = 0;
    for (int begin = 0; begin < v.vocabulary && before < static_cast<uint64_t>(count_equals);
         begin += static_cast<int>(kThreads)) {
      const int token = begin + thread;
      const bool is_equal = token < v.vocabulary && K::of(processed(v, row, token)) == cut.key;
      uint64_t found = 0;
      const uint64_t rank = before + sum_before(is_equal ? 1 : 0, sums, found);
      if (is_equal && rank < static_cast<uint64_t>(count_equals)) tokens[count_above + static_cast<int>(rank)] = token;
      before += found;
    }
  }
  __syncthreads();

  const bool is_mine = thread < count;
  const int32_t token = is_mine ? tokens[thread] : 0;
  const double x = is_mine ? processed(v, row, token) : 0.0;
  const uint64_t key = K::of(x);
  const double likelihood = is_mine ? weight_of(s, choice, x) : 0.0;
  uint64_t weight = is_mine ? in_multiples(s, likelihood) : 0;
  keys[thread] = key;
  weights[thread] = weight;
  uint64_t total = 0;
  sum_before(weight, sums, total);
  if (v.top_p < 1.0) {
    // As in find_cut_kernel.
    uint64_t wanted = static_cast<uint64_t>(ceil(v.top_p * static_cast<double>(total)));
    if (wanted < 1) wanted = 1;
    if (wanted > total) wanted = total;
    uint64_t likelier = 0;
    for (int j = 0; j < count; ++j) {
      if (keys[j] > key || (keys[j] == key && tokens[j] < token)) likelier += weights[j];
    }
    if (likelier >= wanted) weight = 0;
  }
  if (!(likelihood >= v.min_p)) weight = 0;
  __syncthreads();
  weights[thread] = weight;
  sum_before(weight, sums, total);  // its barriers make the weights visible, too
  if (choice.is_valid == 0 || total == 0) {
    if (thread == 0) finish(s, row, 0, false);
    return;
  }
  const uint64_t u = random_bits(v.state[row].key);
  const uint64_t target = __umul64hi(u, total) << 11 | u * total >> 53;
  uint64_t reached = 0;
  for (int j = 0; j < count; ++j) {
    if (tokens[j] < token) reached += weights[j];
  }
  const bool is_chosen = is_mine && reached <= target && reached + weight > target;
  __syncthreads();  // the key is another one once a thread has finished
  if (is_chosen) finish(s, row, token, true);
}

/// What follows once the largest logits are known.
template <bool kNarrow>
void start_draw(const Gpu& gpu, const Sampling& s, dim3 grid) {
  constexpr int kPasses = (Keys<kNarrow>::kBits + kDigitBits - 1) / kDigitBits;
  for (int pass = 0; s.counts != nullptr && pass < kPasses; ++pass) {
    launch<Start::kEarly>(gpu, find_cut_kernel<false, kNarrow>, grid, kThreads, (kBins + 4) * sizeof(uint32_t), s,
                          pass);
  }
  if (s.few != nullptr) {
    const size_t shared = (kThreads + 2 * kFew) * sizeof(uint64_t) + (kFew + 1) * sizeof(int32_t);
    launch<Start::kEarly>(gpu, draw_few_kernel<kNarrow>, grid, kThreads, shared, s);
    return;
  }
  for (int pass = 0; s.weights != nullptr && pass < kPasses; ++pass) {
    launch<Start::kEarly>(gpu, find_cut_kernel<true, kNarrow>, grid, kThreads, (kBins + 1) * sizeof(uint64_t), s, pass);
  }
  launch<Start::kEarly>(gpu, draw_kernel<kNarrow>, grid, kThreads, (kThreads + 4) * sizeof(uint64_t), s);
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
  if (is_narrow(v)) return start_draw<true>(gpu, s, grid);
  start_draw<false>(gpu, s, grid);
}

}  // namespace llama_ext::cuda
