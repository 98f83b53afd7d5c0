// 128-bit vectors of 4 floats: x86-64-v2, the floor of the package. No FMA: a product is rounded before it is added.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "cpu/simd/vec_128.h"

namespace llama_ext::LLAMA_EXT_ISA_NAMESPACE {

using vf = __m128;
constexpr int kWidth = 4;

static inline vf vzero() { return _mm_setzero_ps(); }
static inline vf vset1(float x) { return _mm_set1_ps(x); }
static inline vf vload(const float* p) { return _mm_loadu_ps(p); }
static inline void vstore(float* p, vf x) { _mm_storeu_ps(p, x); }
/// The first n lanes, 0 < n < kWidth; the others are `fill`.
static inline vf vload_n(const float* p, int64_t n, float fill) {
  float lanes[4] = {fill, fill, fill, fill};
  for (int64_t i = 0; i < n; ++i) lanes[i] = p[i];
  return _mm_loadu_ps(lanes);
}
static inline void vstore_n(float* p, vf x, int64_t n) {
  float lanes[4];
  _mm_storeu_ps(lanes, x);
  for (int64_t i = 0; i < n; ++i) p[i] = lanes[i];
}

static inline vf vadd(vf a, vf b) { return _mm_add_ps(a, b); }
static inline vf vsub(vf a, vf b) { return _mm_sub_ps(a, b); }
static inline vf vmul(vf a, vf b) { return _mm_mul_ps(a, b); }
static inline vf vdiv(vf a, vf b) { return _mm_div_ps(a, b); }
/// a * b + c, rounded twice
static inline vf vfma(vf a, vf b, vf c) { return _mm_add_ps(_mm_mul_ps(a, b), c); }
/// The second operand when either is NaN, as on every x86.
static inline vf vmax(vf a, vf b) { return _mm_max_ps(a, b); }
static inline vf vmin(vf a, vf b) { return _mm_min_ps(a, b); }
static inline vf vround(vf x) { return _mm_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
/// 2^n for a whole n in [-126, 127]; inf for 128.
static inline vf vpow2(vf n) {
  return _mm_castsi128_ps(_mm_slli_epi32(_mm_add_epi32(_mm_cvtps_epi32(n), _mm_set1_epi32(127)), 23));
}
/// Lanes where x < bound become 0.
static inline vf vzero_below(vf x, vf bound, vf value) { return _mm_andnot_ps(_mm_cmplt_ps(x, bound), value); }

// Four pairs of bf16 as 32-bit lanes: the low element is the even k, the high one the odd k.
static inline vf vload_pair_low(const uint16_t* p) {
  return _mm_castsi128_ps(_mm_slli_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), 16));
}
static inline vf vload_pair_high(const uint16_t* p) {
  return _mm_castsi128_ps(_mm_and_si128(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)),
                                        _mm_set1_epi32(static_cast<int>(0xffff0000u))));
}
static inline vf vload_bf16(const uint16_t* p) {
  const __m128i bits = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(bits), 16));
}

/// Four float16 numbers, finite: their exponent and mantissa are those of a float32 that is 2^112 times smaller.
static inline vf vload_f16(const uint16_t* p) {
  const __m128i bits = _mm_cvtepu16_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  const __m128i sign = _mm_slli_epi32(_mm_and_si128(bits, _mm_set1_epi32(0x8000)), 16);
  const __m128i magnitude = _mm_slli_epi32(_mm_and_si128(bits, _mm_set1_epi32(0x7fff)), 13);
  const vf value = _mm_mul_ps(_mm_castsi128_ps(magnitude), _mm_set1_ps(0x1p112f));
  return _mm_or_ps(value, _mm_castsi128_ps(sign));
}

// Four 32-bit integers.
using vi = __m128i;
static inline vi iload(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
static inline void istore(void* p, vi x) { _mm_storeu_si128(static_cast<__m128i*>(p), x); }
static inline vi iset1(int x) { return _mm_set1_epi32(x); }
static inline vi iand(vi a, vi b) { return _mm_and_si128(a, b); }
static inline vi ior(vi a, vi b) { return _mm_or_si128(a, b); }
// In the compiler's own notation, so that a count it knows becomes an immediate.
static inline vi ishift_right(vi x, int n) { return reinterpret_cast<vi>(reinterpret_cast<__v4su>(x) >> n); }
static inline vi ishift_left(vi x, int n) { return reinterpret_cast<vi>(reinterpret_cast<__v4su>(x) << n); }
static inline vi ishift_right_signed(vi x, int n) { return reinterpret_cast<vi>(reinterpret_cast<__v4si>(x) >> n); }
/// As many pairs of bytes, each in a lane.
static inline vi iload_u16(const void* p) {
  return _mm_cvtepu16_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(p)));
}
static inline vi imax(vi a, vi b) { return _mm_max_epi32(a, b); }
static inline vi ibits(vf x) { return _mm_castps_si128(x); }
static inline vf vbits(vi x) { return _mm_castsi128_ps(x); }
/// To nearest, ties to even.
static inline vi iround(vf x) { return _mm_cvtps_epi32(x); }
static inline vf vfloat(vi x) { return _mm_cvtepi32_ps(x); }
/// Four bytes, widened.
static inline vi iload_u8(const uint8_t* p) {
  int bytes;
  __builtin_memcpy(&bytes, p, sizeof bytes);
  return _mm_cvtepu8_epi32(_mm_cvtsi32_si128(bytes));
}
static inline vi iload_i8(const uint8_t* p) {
  int bytes;
  __builtin_memcpy(&bytes, p, sizeof bytes);
  return _mm_cvtepi8_epi32(_mm_cvtsi32_si128(bytes));
}
static inline vf vsqrt(vf x) { return _mm_sqrt_ps(x); }
static inline vi iadd(vi a, vi b) { return _mm_add_epi32(a, b); }
static inline vi ixor(vi a, vi b) { return _mm_xor_si128(a, b); }
static inline vi imul(vi a, vi b) { return _mm_mullo_epi32(a, b); }
/// 0, 1, 2, ...
static inline vi ilanes() { return _mm_setr_epi32(0, 1, 2, 3); }
/// Lanes where bits < threshold, unsigned, become 0.
static inline vf vkeep(vi bits, vi threshold, vf value) {
  return _mm_and_ps(_mm_castsi128_ps(_mm_cmpeq_epi32(_mm_max_epu32(bits, threshold), bits)), value);
}

/// A quad of whole numbers in [-127, 127]; of 16 bits in the order 0, 2, 1, 3.
static inline void store_quads(int16_t* to, vi x) {
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), pair_quads(_mm_packs_epi32(x, x)));
}
static inline void store_quads(int8_t* to, vi x) {
  const __m128i narrow = _mm_packs_epi32(x, x);
  const int quad = _mm_cvtsi128_si32(_mm_packs_epi16(narrow, narrow));
  __builtin_memcpy(to, &quad, sizeof quad);
}

}  // namespace llama_ext::LLAMA_EXT_ISA_NAMESPACE
