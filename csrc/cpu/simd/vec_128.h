// What is left of a wider vector when it is folded to 128 bits: reductions, and whole numbers made narrow.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace llama_ext::LLAMA_EXT_ISA_NAMESPACE {

// Sums fold a vector's upper half onto its lower one, so their order is fixed.
static inline float reduce_add(__m128 x) {
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
/// A NaN may go unnoticed.
static inline float reduce_max(__m128 x) {
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}
static inline int32_t reduce_add(__m128i x) {
  x = _mm_add_epi32(x, _mm_shuffle_epi32(x, _MM_SHUFFLE(1, 0, 3, 2)));
  return _mm_cvtsi128_si32(_mm_add_epi32(x, _mm_shuffle_epi32(x, _MM_SHUFFLE(2, 3, 0, 1))));
}
static inline int32_t reduce_max(__m128i x) {
  x = _mm_max_epi32(x, _mm_shuffle_epi32(x, _MM_SHUFFLE(1, 0, 3, 2)));
  return _mm_cvtsi128_si32(_mm_max_epi32(x, _mm_shuffle_epi32(x, _MM_SHUFFLE(2, 3, 0, 1))));
}

/// Of 16-bit numbers in quads, the middle two exchanged: 0, 2, 1, 3.
static inline __m128i pair_quads(__m128i x) {
  return _mm_shufflehi_epi16(_mm_shufflelo_epi16(x, _MM_SHUFFLE(3, 1, 2, 0)), _MM_SHUFFLE(3, 1, 2, 0));
}

}  // namespace llama_ext::LLAMA_EXT_ISA_NAMESPACE
