// Reading weights in kernels: chunks of a row in registers, and what their codes stand for.
#pragma once

#include "cuda/numeric.h"
#include "cuda/weight_layout.h"

namespace llama_ext::cuda {

/// What the codes of group `group` of a row are multiplied by and what is added: exact in float32 (quant/weight_type.h).
struct GroupFactors {
  float scale;
  float min;
};
/// index: of the group in the whole matrix. unit: of what shares a float16 scale, likewise.
__device__ __forceinline__ GroupFactors group_factors_at(const WeightView& w, int64_t index, int64_t unit) {
  GroupFactors factors{from_f16(reinterpret_cast<const uint16_t*>(w.data + w.scales_at)[unit]), 0.0f};
  if (w.has_min) factors.min = from_f16(reinterpret_cast<const uint16_t*>(w.data + w.mins_at)[unit]);
  if (w.has_superblocks) {
    const unsigned char sub = w.data[w.sub_scales_at + index];
    factors.scale *= w.signed_sub_scales ? static_cast<float>(static_cast<signed char>(sub)) : static_cast<float>(sub);
    if (w.has_min) factors.min *= -static_cast<float>(w.data[w.sub_mins_at + index]);
  }
  return factors;
}
__device__ __forceinline__ GroupFactors group_factors(const WeightView& w, int64_t row, int group) {
  const int64_t index = row * w.groups() + group;
  return group_factors_at(w, index, w.has_superblocks ? row * w.units() + group / (w.unit / w.group) : index);
}

/// Elements of one row that a lane loads at once, 16 bytes of them and their high bits.
template <Kind kKind>
inline constexpr int kChunkElements = kKind == Kind::kF32                           ? 4
                                      : kKind == Kind::kF16 || kKind == Kind::kBF16 ? 8
                                      : kKind == Kind::kQ8                          ? 16
                                                                                    : 32;
/// Vectors of 4 activations that meet them.
template <Kind kKind>
inline constexpr int kChunkParts = kChunkElements<kKind> / 4;

template <Kind kKind>
struct Chunk {
  uint4 words;
  uint32_t high[2];  // planes of fifth and sixth bits

  /// Chunk `index` of a row, which is read once: past the caches.
  __device__ __forceinline__ void load(const WeightView& w, int64_t row, int index) {
    words = __ldcs(reinterpret_cast<const uint4*>(w.data + w.row_at(row)) + index);
    if constexpr (high_bits(kKind) > 0) {
      const auto* planes = reinterpret_cast<const uint32_t*>(w.data + w.high_words_at(row, index));
      high[0] = planes[0];
      if constexpr (high_bits(kKind) > 1) high[1] = planes[1];
    }
  }

  __device__ __forceinline__ uint32_t word(int i) const {
    return i == 0 ? words.x : i == 1 ? words.y : i == 2 ? words.z : words.w;
  }

  /// Elements 4 part ... 4 part + 3, in order: numbers, or codes less the zero that `magic` contains. `part` is known when this is compiled.
  __device__ __forceinline__ void values(int part, float magic, float out[4]) const {
    if constexpr (kKind == Kind::kF32) {
#pragma unroll
      for (int i = 0; i < 4; ++i) out[i] = __uint_as_float(word(i));
    } else if constexpr (kKind == Kind::kBF16) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        out[2 * i] = __uint_as_float(word(2 * part + i) << 16);
        out[2 * i + 1] = __uint_as_float(word(2 * part + i) & 0xffff0000u);
      }
    } else if constexpr (kKind == Kind::kF16) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        out[2 * i] = from_f16(static_cast<uint16_t>(word(2 * part + i)));
        out[2 * i + 1] = from_f16(static_cast<uint16_t>(word(2 * part + i) >> 16));
      }
    } else if constexpr (kKind == Kind::kQ8) {
#pragma unroll
      for (int i = 0; i < 4; ++i) out[i] = code_to_float((word(part) >> (8 * i)) & 255u, magic);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) out[i] = code_to_float(code(part, i), magic);
    }
  }

  /// Code 4 part + i of nibbles and planes.
  __device__ __forceinline__ uint32_t code(int part, int i) const {
    const int number = 4 * part + i;
    uint32_t bits = (word(nibble_byte(number) / 4) >> (8 * (nibble_byte(number) % 4) + nibble_shift(number))) & 15u;
    if constexpr (high_bits(kKind) > 0) bits |= (high[0] >> number & 1u) << 4;
    if constexpr (high_bits(kKind) > 1) bits |= (high[1] >> number & 1u) << 5;
    return bits;
  }
};

/// The magic of code_to_float for codes of this matrix.
__device__ __forceinline__ float code_magic(const WeightView& w) { return kCodeMagic + static_cast<float>(w.zero); }

/// Eight codes of a row from k on, a multiple of 8: what becomes 16 bytes of numbers of 16 bits. They have one scale.
template <Kind kKind>
struct EightCodes {
  static_assert(is_quantized(kKind));
  uint2 words;
  uint32_t high[2];  // planes of fifth and sixth bits, 8 of each

  __device__ __forceinline__ void load(const WeightView& w, int64_t row, int k) {
    if constexpr (kKind == Kind::kQ8) {
      words = __ldcs(reinterpret_cast<const uint2*>(w.data + row * w.stride + k));
    } else {
      const int number = k % kChunk;
      const int64_t chunk = row * (w.stride / kChunk) + k / kChunk;
      words = __ldcs(reinterpret_cast<const uint2*>(w.data + chunk * 16 + nibble_byte(number)));
      words.x = words.x >> nibble_shift(number) & 0x0f0f0f0fu;
      words.y = words.y >> nibble_shift(number) & 0x0f0f0f0fu;
#pragma unroll
      for (int plane = 0; plane < high_bits(kKind); ++plane) {
        const auto* planes = reinterpret_cast<const uint32_t*>(w.data + w.high_at);
        high[plane] = planes[chunk * high_bits(kKind) + plane] >> number;
      }
    }
  }

  /// scale (code - zero) + min, rounded once to float32.
  __device__ __forceinline__ void values(float magic, GroupFactors factors, float out[8]) const {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      uint32_t code = (i < 4 ? words.x : words.y) >> (8 * (i % 4)) & 255u;
#pragma unroll
      for (int plane = 0; plane < high_bits(kKind); ++plane) code |= (high[plane] >> i & 1u) << (4 + plane);
      out[i] = fmaf(factors.scale, code_to_float(code, magic), factors.min);
    }
  }
};

/// Element k of a row, rounded once to float32.
__device__ __forceinline__ float weight_element(const WeightView& w, int64_t row, int k) {
  const unsigned char* at = w.data + w.row_at(row);
  switch (w.kind) {
    case Kind::kF32:
      return reinterpret_cast<const float*>(at)[k];
    case Kind::kF16:
      return from_f16(reinterpret_cast<const uint16_t*>(at)[k]);
    case Kind::kBF16:
      return from_bf16(reinterpret_cast<const uint16_t*>(at)[k]);
    default:
      break;
  }
  uint32_t code;
  if (w.kind == Kind::kQ8) {
    code = at[k];
  } else {
    const int number = k % kChunk;
    code = (at[k / kChunk * 16 + nibble_byte(number)] >> nibble_shift(number)) & 15u;
    const auto* planes = reinterpret_cast<const uint32_t*>(w.data + w.high_words_at(row, k / kChunk));
    for (int plane = 0; plane < w.planes(); ++plane) code |= (planes[plane] >> number & 1u) << (4 + plane);
  }
  const GroupFactors factors = group_factors(w, row, k / w.group);
  return fmaf(factors.scale, static_cast<float>(static_cast<int>(code) - w.zero), factors.min);
}

}  // namespace llama_ext::cuda
