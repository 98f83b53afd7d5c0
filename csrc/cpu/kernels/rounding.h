// The inner loops of rounding weights (quant/rounding.h) in vectors of eight, which are what that text sums in. A group lies in
// the L1 cache; bound: arithmetic, about nine operations a vector and candidate.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "quant/rounding.h"

namespace llama_ext::LLAMA_EXT_ISA_NAMESPACE {

#ifdef __AVX2__

struct Eight {
  __m256 v;
};
static inline Eight eight(float x) { return {_mm256_set1_ps(x)}; }
static inline Eight load_eight(const float* p) { return {_mm256_loadu_ps(p)}; }
static inline void store_eight(float* p, Eight x) { _mm256_storeu_ps(p, x.v); }
static inline Eight operator+(Eight a, Eight b) { return {_mm256_add_ps(a.v, b.v)}; }
static inline Eight operator-(Eight a, Eight b) { return {_mm256_sub_ps(a.v, b.v)}; }
static inline Eight operator*(Eight a, Eight b) { return {_mm256_mul_ps(a.v, b.v)}; }
static inline Eight min_of(Eight a, Eight b) { return {_mm256_min_ps(a.v, b.v)}; }
static inline Eight max_of(Eight a, Eight b) { return {_mm256_max_ps(a.v, b.v)}; }
static inline Eight round_of(Eight a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
/// Whether all lie within (-limit, limit).
static inline bool all_within(Eight a, Eight limit) {
  const __m256 magnitude = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v);
  return _mm256_movemask_ps(_mm256_cmp_ps(magnitude, limit.v, _CMP_LT_OQ)) == 0xff;
}
/// Eight whole numbers in [0, 255].
static inline void store_codes(uint8_t* p, Eight x) {
  const __m256i wide = _mm256_cvtps_epi32(x.v);
  const __m128i pairs = _mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(pairs, pairs));
}

#else

struct Eight {
  __m128 low;
  __m128 high;
};
static inline Eight eight(float x) { return {_mm_set1_ps(x), _mm_set1_ps(x)}; }
static inline Eight load_eight(const float* p) { return {_mm_loadu_ps(p), _mm_loadu_ps(p + 4)}; }
static inline void store_eight(float* p, Eight x) {
  _mm_storeu_ps(p, x.low);
  _mm_storeu_ps(p + 4, x.high);
}
static inline Eight operator+(Eight a, Eight b) { return {_mm_add_ps(a.low, b.low), _mm_add_ps(a.high, b.high)}; }
static inline Eight operator-(Eight a, Eight b) { return {_mm_sub_ps(a.low, b.low), _mm_sub_ps(a.high, b.high)}; }
static inline Eight operator*(Eight a, Eight b) { return {_mm_mul_ps(a.low, b.low), _mm_mul_ps(a.high, b.high)}; }
static inline Eight min_of(Eight a, Eight b) { return {_mm_min_ps(a.low, b.low), _mm_min_ps(a.high, b.high)}; }
static inline Eight max_of(Eight a, Eight b) { return {_mm_max_ps(a.low, b.low), _mm_max_ps(a.high, b.high)}; }
static inline Eight round_of(Eight a) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm_round_ps(a.low, kNearest), _mm_round_ps(a.high, kNearest)};
}
static inline bool all_within(Eight a, Eight limit) {
  const __m128 sign = _mm_set1_ps(-0.0f);
  const __m128 low = _mm_cmplt_ps(_mm_andnot_ps(sign, a.low), limit.low);
  const __m128 high = _mm_cmplt_ps(_mm_andnot_ps(sign, a.high), limit.high);
  return _mm_movemask_ps(_mm_and_ps(low, high)) == 0xf;
}
static inline void store_codes(uint8_t* p, Eight x) {
  const __m128i pairs = _mm_packus_epi32(_mm_cvtps_epi32(x.low), _mm_cvtps_epi32(x.high));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(pairs, pairs));
}

#endif

/// The first n, n < 8; the others are `fill`.
static inline Eight load_some(const float* p, int n, float fill) {
  float lanes[8];
  for (int i = 0; i < 8; ++i) lanes[i] = i < n ? p[i] : fill;
  return load_eight(lanes);
}

static bool rounding_range(const float* w, int size, float limit, float* lowest, float* highest) {
  Eight low = eight(w[0]);
  Eight high = low;
  bool within = true;
  const auto take = [&](Eight x) {
    low = min_of(low, x);
    high = max_of(high, x);
    within &= all_within(x, eight(limit));
  };
  int i = 0;
  for (; i + 8 <= size; i += 8) take(load_eight(w + i));
  if (i < size) take(load_some(w + i, size - i, w[0]));
  float lows[8];
  float highs[8];
  store_eight(lows, low);
  store_eight(highs, high);
  for (i = 1; i < 8; ++i) {
    lows[0] = lows[i] < lows[0] ? lows[i] : lows[0];
    highs[0] = highs[i] > highs[0] ? highs[i] : highs[0];
  }
  *lowest = lows[0];
  *highest = highs[0];
  return within;
}

/// A fit in vectors.
struct FitVectors {
  explicit FitVectors(const RoundingFit& fit)
      : inverse(eight(fit.scale == 0.0f ? 0.0f : 1.0f / fit.scale)),
        scale(eight(fit.scale)),
        min(eight(fit.min)),
        low(eight(fit.low)),
        high(eight(fit.high)) {}
  Eight code_of(Eight w) const { return round_of(min_of(max_of((w - min) * inverse, low), high)); }
  /// What rounding leaves of w.
  Eight rest_of(Eight w) const { return w - (scale * code_of(w) + min); }

  Eight inverse, scale, min, low, high;
};

static float rounding_error(const RoundingGroup& g, const RoundingFit& fit) {
  const FitVectors vectors(fit);
  Eight sum = eight(0.0f);
  // What is missing in the last vector has the importance 0.
  const auto take = [&](Eight w, Eight importance) {
    const Eight difference = vectors.rest_of(w);
    sum = sum + importance * difference * difference;
  };
  const int whole = g.size / 8 * 8;
  if (g.importance != nullptr) {
    for (int i = 0; i < whole; i += 8) take(load_eight(g.w + i), load_eight(g.importance + i));
  } else {
    for (int i = 0; i < whole; i += 8) {
      const Eight difference = vectors.rest_of(load_eight(g.w + i));
      sum = sum + difference * difference;
    }
  }
  if (whole < g.size) {
    const int rest = g.size - whole;
    float ones[8] = {1, 1, 1, 1, 1, 1, 1, 1};
    take(load_some(g.w + whole, rest, 0.0f),
         load_some(g.importance != nullptr ? g.importance + whole : ones, rest, 0.0f));
  }
  float lanes[8];
  store_eight(lanes, sum);
  return ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
}

static void rounding_codes(const RoundingGroup& g, const RoundingFit& fit, uint8_t* codes) {
  const FitVectors vectors(fit);
  int i = 0;
  for (; i + 8 <= g.size; i += 8) store_codes(codes + i, vectors.code_of(load_eight(g.w + i)) - vectors.low);
  if (i == g.size) return;
  uint8_t rest[8];
  store_codes(rest, vectors.code_of(load_some(g.w + i, g.size - i, 0.0f)) - vectors.low);
  for (int lane = 0; lane < 8 && i + lane < g.size; ++lane) codes[i + lane] = rest[lane];
}

static constexpr RoundingLoops kRounding = {rounding_range, rounding_error, rounding_codes};

}  // namespace llama_ext::LLAMA_EXT_ISA_NAMESPACE
