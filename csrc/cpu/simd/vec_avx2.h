// 256-bit vectors of 8 floats, with FMA.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "cpu/simd/vec_128.h"

namespace llama_ext::LLAMA_EXT_ISA_NAMESPACE {

using vf = __m256;
constexpr int kWidth = 8;

static inline vf vzero() { return _mm256_setzero_ps(); }
static inline vf vset1(float x) { return _mm256_set1_ps(x); }
static inline vf vload(const float* p) { return _mm256_loadu_ps(p); }
static inline void vstore(float* p, vf x) { _mm256_storeu_ps(p, x); }
static inline __m256i mask_n(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
/// The first n lanes, 0 < n < kWidth; the others are `fill`.
static inline vf vload_n(const float* p, int64_t n, float fill) {
  const __m256i mask = mask_n(n);
  return _mm256_blendv_ps(_mm256_set1_ps(fill), _mm256_maskload_ps(p, mask), _mm256_castsi256_ps(mask));
}
static inline void vstore_n(float* p, vf x, int64_t n) { _mm256_maskstore_ps(p, mask_n(n), x); }

static inline vf vadd(vf a, vf b) { return _mm256_add_ps(a, b); }
static inline vf vsub(vf a, vf b) { return _mm256_sub_ps(a, b); }
static inline vf vmul(vf a, vf b) { return _mm256_mul_ps(a, b); }
static inline vf vdiv(vf a, vf b) { return _mm256_div_ps(a, b); }
/// a * b + c
static inline vf vfma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
/// The second operand when either is NaN, as on every x86.
static inline vf vmax(vf a, vf b) { return _mm256_max_ps(a, b); }
static inline vf vmin(vf a, vf b) { return _mm256_min_ps(a, b); }
static inline vf vround(vf x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
/// 2^n for a whole n in [-126, 127]; inf for 128.
static inline vf vpow2(vf n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
/// Lanes where x < bound become 0.
static inline vf vzero_below(vf x, vf bound, vf value) {
  return _mm256_andnot_ps(_mm256_cmp_ps(x, bound, _CMP_LT_OQ), value);
}

// Eight pairs of bf16 as 32-bit lanes: the low element is the even k, the high one the odd k.
static inline vf vload_pair_low(const uint16_t* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), 16));
}
/// Two shifts: a mask would take a register that a tile of 6 x 2 sums has not (g++ 12 keeps four of them on the stack: 26% slower).
static inline vf vload_pair_high(const uint16_t* p) {
  const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_srli_epi32(pairs, 16), 16));
}
static inline vf vload_bf16(const uint16_t* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

/// Eight float16 numbers, finite.
static inline vf vload_f16(const uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

// Eight 32-bit integers.
using vi = __m256i;
static inline vi iload(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
static inline void istore(void* p, vi x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x); }
static inline vi iset1(int x) { return _mm256_set1_epi32(x); }
static inline vi iand(vi a, vi b) { return _mm256_and_si256(a, b); }
static inline vi ior(vi a, vi b) { return _mm256_or_si256(a, b); }
// In the compiler's own notation, so that a count it knows becomes an immediate.
static inline vi ishift_right(vi x, int n) { return reinterpret_cast<vi>(reinterpret_cast<__v8su>(x) >> n); }
static inline vi ishift_left(vi x, int n) { return reinterpret_cast<vi>(reinterpret_cast<__v8su>(x) << n); }
static inline vi ishift_right_signed(vi x, int n) { return reinterpret_cast<vi>(reinterpret_cast<__v8si>(x) >> n); }
/// As many pairs of bytes, each in a lane.
static inline vi iload_u16(const void* p) {
  return _mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p)));
}
static inline vi imax(vi a, vi b) { return _mm256_max_epi32(a, b); }
static inline vi ibits(vf x) { return _mm256_castps_si256(x); }
static inline vf vbits(vi x) { return _mm256_castsi256_ps(x); }
/// To nearest, ties to even.
static inline vi iround(vf x) { return _mm256_cvtps_epi32(x); }
static inline vf vfloat(vi x) { return _mm256_cvtepi32_ps(x); }
/// Eight bytes, widened.
static inline vi iload_u8(const uint8_t* p) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
static inline vi iload_i8(const uint8_t* p) {
  return _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
static inline vf vsqrt(vf x) { return _mm256_sqrt_ps(x); }
static inline vi iadd(vi a, vi b) { return _mm256_add_epi32(a, b); }
static inline vi ixor(vi a, vi b) { return _mm256_xor_si256(a, b); }
static inline vi imul(vi a, vi b) { return _mm256_mullo_epi32(a, b); }
/// 0, 1, 2, ...
static inline vi ilanes() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
/// Lanes where bits < threshold, unsigned, become 0.
static inline vf vkeep(vi bits, vi threshold, vf value) {
  return _mm256_and_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_max_epu32(bits, threshold), bits)), value);
}

static inline float reduce_add(vf x) {
  return reduce_add(_mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1)));
}
static inline float reduce_max(vf x) {
  return reduce_max(_mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1)));
}
static inline int32_t reduce_add(vi x) {
  return reduce_add(_mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1)));
}
static inline int32_t reduce_max(vi x) {
  return reduce_max(_mm_max_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1)));
}
/// Two quads of whole numbers in [-127, 127]; those of 16 bits in the order 0, 2, 1, 3.
static inline void store_quads(int16_t* to, vi x) {
  const __m128i narrow = _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), pair_quads(narrow));
}
static inline void store_quads(int8_t* to, vi x) {
  const __m128i narrow = _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packs_epi16(narrow, narrow));
}

}  // namespace llama_ext::LLAMA_EXT_ISA_NAMESPACE
