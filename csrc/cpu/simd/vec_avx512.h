// 512-bit vectors of 16 floats. Also used, unchanged, by the tiers above plain AVX-512.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "cpu/simd/vec_128.h"

namespace llama_ext::LLAMA_EXT_ISA_NAMESPACE {

using vf = __m512;
constexpr int kWidth = 16;

static inline vf vzero() { return _mm512_setzero_ps(); }
static inline vf vset1(float x) { return _mm512_set1_ps(x); }
static inline vf vload(const float* p) { return _mm512_loadu_ps(p); }
static inline void vstore(float* p, vf x) { _mm512_storeu_ps(p, x); }
static inline __mmask16 mask_n(int64_t n) { return static_cast<__mmask16>((1u << n) - 1u); }
/// The first n lanes, 0 < n < kWidth; the others are `fill`.
static inline vf vload_n(const float* p, int64_t n, float fill) {
  return _mm512_mask_loadu_ps(_mm512_set1_ps(fill), mask_n(n), p);
}
static inline void vstore_n(float* p, vf x, int64_t n) { _mm512_mask_storeu_ps(p, mask_n(n), x); }

static inline vf vadd(vf a, vf b) { return _mm512_add_ps(a, b); }
static inline vf vsub(vf a, vf b) { return _mm512_sub_ps(a, b); }
static inline vf vmul(vf a, vf b) { return _mm512_mul_ps(a, b); }
static inline vf vdiv(vf a, vf b) { return _mm512_div_ps(a, b); }
/// a * b + c
static inline vf vfma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
/// The second operand when either is NaN, as on every x86.
static inline vf vmax(vf a, vf b) { return _mm512_max_ps(a, b); }
static inline vf vmin(vf a, vf b) { return _mm512_min_ps(a, b); }
static inline vf vround(vf x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
/// 2^n for a whole n in [-126, 127]; inf for 128.
static inline vf vpow2(vf n) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23));
}
/// Lanes where x < bound become 0.
static inline vf vzero_below(vf x, vf bound, vf value) {
  return _mm512_mask_mov_ps(value, _mm512_cmp_ps_mask(x, bound, _CMP_LT_OQ), _mm512_setzero_ps());
}

// Sixteen pairs of bf16 as 32-bit lanes: the low element is the even k, the high one the odd k.
static inline vf vload_pair_low(const uint16_t* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(p), 16));
}
static inline vf vload_pair_high(const uint16_t* p) {
  // A masked load, not an AND: a constant in a register would push a sum out of the widest tile.
  return _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(0xaaaaaaaau, p));
}
static inline vf vload_bf16(const uint16_t* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

/// Sixteen float16 numbers, finite.
static inline vf vload_f16(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

// Sixteen 32-bit integers.
using vi = __m512i;
static inline vi iload(const void* p) { return _mm512_loadu_si512(p); }
static inline void istore(void* p, vi x) { _mm512_storeu_si512(p, x); }
static inline vi iset1(int x) { return _mm512_set1_epi32(x); }
static inline vi iand(vi a, vi b) { return _mm512_and_si512(a, b); }
static inline vi ior(vi a, vi b) { return _mm512_or_si512(a, b); }
// In the compiler's own notation, so that a count it knows becomes an immediate.
static inline vi ishift_right(vi x, int n) { return reinterpret_cast<vi>(reinterpret_cast<__v16su>(x) >> n); }
static inline vi ishift_left(vi x, int n) { return reinterpret_cast<vi>(reinterpret_cast<__v16su>(x) << n); }
static inline vi ishift_right_signed(vi x, int n) { return reinterpret_cast<vi>(reinterpret_cast<__v16si>(x) >> n); }
/// As many pairs of bytes, each in a lane.
static inline vi iload_u16(const void* p) {
  return _mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
}
static inline vi imax(vi a, vi b) { return _mm512_max_epi32(a, b); }
static inline vi ibits(vf x) { return _mm512_castps_si512(x); }
static inline vf vbits(vi x) { return _mm512_castsi512_ps(x); }
/// To nearest, ties to even.
static inline vi iround(vf x) { return _mm512_cvtps_epi32(x); }
static inline vf vfloat(vi x) { return _mm512_cvtepi32_ps(x); }
/// Sixteen bytes, widened.
static inline vi iload_u8(const uint8_t* p) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
static inline vi iload_i8(const uint8_t* p) {
  return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
static inline vf vsqrt(vf x) { return _mm512_sqrt_ps(x); }
static inline vi iadd(vi a, vi b) { return _mm512_add_epi32(a, b); }
static inline vi ixor(vi a, vi b) { return _mm512_xor_si512(a, b); }
static inline vi imul(vi a, vi b) { return _mm512_mullo_epi32(a, b); }
/// 0, 1, 2, ...
static inline vi ilanes() { return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }
/// Lanes where bits < threshold, unsigned, become 0.
static inline vf vkeep(vi bits, vi threshold, vf value) {
  return _mm512_maskz_mov_ps(_mm512_cmpge_epu32_mask(bits, threshold), value);
}

static inline float reduce_add(vf x) {
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
  return reduce_add(_mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}
static inline float reduce_max(vf x) {
  const __m256 half = _mm256_max_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
  return reduce_max(_mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}
static inline int32_t reduce_add(vi x) { return _mm512_reduce_add_epi32(x); }
static inline int32_t reduce_max(vi x) { return _mm512_reduce_max_epi32(x); }
/// Four quads of whole numbers in [-127, 127].
static inline void store_quads(int8_t* to, vi x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(x));
}

}  // namespace llama_ext::LLAMA_EXT_ISA_NAMESPACE
