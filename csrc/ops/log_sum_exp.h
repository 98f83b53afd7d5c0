// Sums of exponentials over a vocabulary, in float64: float32 would lose digits. On the host, for the choice of tokens and
// their scores; what a backend computes of whole tensors is softmax and cross_entropy.
#pragma once

#include <bit>
#include <cstdint>
#include <numbers>

namespace llama_ext {

/// e^x for x <= 0 to about 2 ulp, underflowing to 0, without a call and with one comparison, so that a loop over it is
/// vectorised. Cody & Waite: x = n ln 2 + r with |r| <= ln(2) / 2, the Taylor series of degree 13 for e^r, and 2^n by
/// its bits, in two factors as n may leave the range of normal numbers.
inline double exp_nonpositive(double x) {
  constexpr double kSmallest = -1000.0;  // e^-745.2 is 0 already
  constexpr double kLn2High = 0x1.62e42feep-1;
  constexpr double kLn2Low = 0x1.a39ef35793c76p-33;
  // Adding this rounds to an integer and leaves that integer in the lowest bits.
  constexpr double kRound = 0x1.8p52;
  const auto power_of_two = [](double rounded) {
    return std::bit_cast<double>((std::bit_cast<uint64_t>(rounded) << 52) + (uint64_t{1023} << 52));
  };
  const double clamped = x > kSmallest ? x : kSmallest;
  const double n = (clamped * std::numbers::log2e + kRound) - kRound;
  const double r = (clamped - n * kLn2High) - n * kLn2Low;
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

/// log(sum(exp(values))), given their largest, which is finite; other values may be -inf. size >= 1.
/// Sampling, scoring and beam search all divide by this one sum, so that the log probability of a token is the same bits.
double log_sum_exp(const float* values, int64_t size, float largest);

}  // namespace llama_ext
