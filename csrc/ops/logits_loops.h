// The passes over a row of logits. A backend may have vectors for them: whoever runs them, the bits are the same. Also included by
// kernels, so without the standard library, and every function belongs to the file that includes it.
#pragma once

#include <cstdint>

namespace llama_ext {

struct LogitsLoops {
  /// Index of the first of the largest logits; -1 when one is NaN or +inf. size >= 1.
  int64_t (*argmax)(const float* logits, int64_t size);
  /// sum(exp(logits - largest)), given their largest, which is finite; other logits may be -inf.
  double (*exp_sum)(const float* logits, int64_t size, float largest);
  /// x[i] = exp((x[i] - largest) / temperature), in place, given their largest, which is finite; other x may be -inf.
  void (*weights)(double* x, int64_t size, double largest, double temperature);
};

/// For backends without vectors.
extern const LogitsLoops kPlainLogitsLoops;

// Float64 in the vectors of whatever this file is compiled for. Spelled out: compilers do not vectorise the comparison below.
#if defined(__AVX512F__)
constexpr int kDoubles = 8;
#elif defined(__AVX__)
constexpr int kDoubles = 4;
#else
constexpr int kDoubles = 2;
#endif
using Doubles = double __attribute__((vector_size(8 * kDoubles)));
using DoublesBits = uint64_t __attribute__((vector_size(8 * kDoubles)));

/// e^x for x <= 0 to about 2 ulp, underflowing to 0. Number: double or Doubles, Bits: as many of its bits. Cody & Waite:
/// x = n ln 2 + r with |r| <= ln(2) / 2, the Taylor series of degree 13 for e^r, and 2^n by its bits, in two factors as n may
/// leave the range of normal numbers.
template <typename Number, typename Bits>
static inline __attribute__((always_inline)) Number exp_of(Number x) {
  constexpr double kSmallest = -1000.0;  // e^-745.2 is 0 already
  constexpr double kLog2E = 0x1.71547652b82fep+0;
  constexpr double kLn2High = 0x1.62e42feep-1;
  constexpr double kLn2Low = 0x1.a39ef35793c76p-33;
  // Adding this rounds to an integer and leaves that integer in the lowest bits.
  constexpr double kRound = 0x1.8p52;
  const auto power_of_two = [](Number rounded) {
    return __builtin_bit_cast(Number, (__builtin_bit_cast(Bits, rounded) << 52) + (uint64_t{1023} << 52));
  };
  const Number clamped = x > kSmallest ? x : Number{} + kSmallest;
  const Number n = (clamped * kLog2E + kRound) - kRound;
  const Number r = (clamped - n * kLn2High) - n * kLn2Low;
  const Number half = n * 0.5 + kRound;
  const Number rest = (n - (half - kRound)) + kRound;
  Number series = Number{} + 1.0 / 6227020800.0;
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

/// LogitsLoops::exp_sum: in eight lanes, logit i in lane i % 8, which are added from the first to the last.
static inline double exp_sum_in_lanes(const float* logits, int64_t size, float largest) {
  constexpr int kLanes = 8;
  constexpr int kVectors = kLanes / kDoubles;
  const double shift = static_cast<double>(largest);
  Doubles sums[kVectors] = {};
  const auto add = [&](const float* from) {
    for (int v = 0; v < kVectors; ++v) {
      Doubles x;
      for (int i = 0; i < kDoubles; ++i) x[i] = static_cast<double>(from[v * kDoubles + i]);
      sums[v] += exp_of<Doubles, DoublesBits>(x - shift);
    }
  };
  int64_t at = 0;
  for (; at + kLanes <= size; at += kLanes) add(logits + at);
  if (at < size) {
    float rest[kLanes];  // e^-inf is 0
    for (int lane = 0; lane < kLanes; ++lane) rest[lane] = at + lane < size ? logits[at + lane] : -__builtin_inff();
    add(rest);
  }
  double sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) sum += sums[lane / kDoubles][lane % kDoubles];
  return sum;
}

/// LogitsLoops::weights: each by itself, so the bits do not depend on the vectors.
static inline void weights_in_place(double* x, int64_t size, double largest, double temperature) {
  int64_t at = 0;
  for (; at + kDoubles <= size; at += kDoubles) {
    Doubles some;
    __builtin_memcpy(&some, x + at, sizeof some);
    some = exp_of<Doubles, DoublesBits>((some - largest) / temperature);
    __builtin_memcpy(x + at, &some, sizeof some);
  }
  for (; at < size; ++at) x[at] = exp_of<double, uint64_t>((x[at] - largest) / temperature);
}

}  // namespace llama_ext
