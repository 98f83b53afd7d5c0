// What the kernels of sample_next share: processed logits, their keys and weights, and what one kernel leaves for the next.
#pragma once

#include <cstdint>

#include "cuda/kernels.h"
#include "cuda/numeric.h"

namespace llama_ext::cuda::sampling {

inline constexpr int kOfThread = 4;  // logits of a thread, next to each other
inline constexpr int kOfBlock = kThreads * kOfThread;
inline constexpr int kDigitBits = 12;
inline constexpr int kBins = 1 << kDigitBits;
inline constexpr int kFew = kThreads;         // tokens that one block draws from
inline constexpr int kMostEquals = 4 * kFew;  // of one key, among which it looks for the first

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
__device__ inline uint64_t random_bits(const RandomKey& key) {
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

__host__ __device__ inline bool is_narrow(const SampleNextView& v) {
  return v.bias == nullptr && v.occurrences == nullptr;
}

__device__ inline double processed(const SampleNextView& v, int row, int token) {
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

/// Whether this block is the last of its row to come here; what the others wrote before can be read then. `place`: shared, free again.
__device__ inline bool is_last_block(DecodeRow& row, uint32_t* place) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) *place = atomicInc(&row.arrivals, gridDim.x - 1) == gridDim.x - 1 ? 1u : 0u;
  __syncthreads();
  const bool is_last = *place != 0;
  __syncthreads();
  if (is_last) __threadfence();
  return is_last;
}

/// The sum of what threads before this one have; `all` becomes that of all. `places`: kThreads numbers of shared memory.
__device__ inline uint64_t sum_before(uint64_t value, uint64_t* places, uint64_t& all) {
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
__device__ inline void finish(const Sampling& s, int row, int32_t token, bool is_valid) {
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

/// sample_draw.cu: the last kernel of a draw; of few tokens with `few`.
void start_draw(const Gpu& gpu, const Sampling& s, dim3 grid);

}  // namespace llama_ext::cuda::sampling
