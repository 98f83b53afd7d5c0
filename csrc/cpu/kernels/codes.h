// Quantised weights and activations as kernels meet them: codes out of their strips, scales, widening, rounding activations.
#pragma once

#include "cpu/kernel_table.h"
#include "cpu/kernels/gemm.h"

namespace llama_ext::LLAMA_EXT_ISA_NAMESPACE {

/// A kernel of each format, in the order of kCodeFormats, and how they multiply, for info().
struct CodeKernels {
  GemmKernel kernels[kCodeFormatCount];
  const char* note;
};

#define LLAMA_EXT_OF_EACH_FORMAT(kernel)                                      \
  {kernel<kCodeFormats[0]>, kernel<kCodeFormats[1]>, kernel<kCodeFormats[2]>, \
   kernel<kCodeFormats[3]>, kernel<kCodeFormats[4]>, kernel<kCodeFormats[5]>, \
   kernel<kCodeFormats[6]>, kernel<kCodeFormats[7]>, kernel<kCodeFormats[8]>}

/// The codes of four consecutive k (`quad`, 0 to 7, of a strip) for kWidth columns: a byte each, a column's four in one lane.
template <CodeFormat F>
static inline vi codes_of(const uint8_t* strip, int quad, int64_t column) {
  if constexpr (F.bits == 8) {
    return iload(strip + quad * 4 * kPanel + 4 * column);
  } else {
    const vi pair = iload(strip + quad / 2 * 4 * kPanel + 4 * column);
    const vi low = iand(quad % 2 == 0 ? pair : ishift_right(pair, 4), iset1(0x0f0f0f0f));
    const uint8_t* high = strip + 16 * kPanel + 4 * column;
    if constexpr (F.bits == 5) {
      const vi bits = iload(high);
      return ior(low, iand(quad <= 4 ? ishift_left(bits, 4 - quad) : ishift_right(bits, quad - 4), iset1(0x10101010)));
    } else if constexpr (F.bits == 6) {
      const vi bits = iload(high + quad / 4 * 4 * kPanel);
      const int shift = 2 * (quad % 4);
      return ior(low,
                 iand(shift <= 4 ? ishift_left(bits, 4 - shift) : ishift_right(bits, shift - 4), iset1(0x30303030)));
    } else {
      return low;
    }
  }
}

/// With few rows, which wait for memory: asks for the strip that lies well ahead, and a line more, as headers lie between.
template <CodeFormat F, int R>
static inline void prefetch_strip(const uint8_t* strip) {
  if constexpr (R <= kPrefetchRows) {
    for (int i = 0; i <= F.strip_bytes() / 64; ++i) __builtin_prefetch(strip + kPrefetchBytes + 64 * i);
  }
}

/// The scale of a unit's group, for kWidth columns. Exact: at most 11 + 7 bits.
template <CodeFormat F>
static inline vf group_scale(const uint8_t* unit, int64_t group, int64_t column) {
  const vf scale = vload_f16(reinterpret_cast<const uint16_t*>(unit) + column);
  if constexpr (!F.has_superblocks) return scale;
  const uint8_t* sub = unit + F.halves_bytes() + group * kPanel + column;
  return vmul(scale, vfloat(F.has_min ? iload_u8(sub) : iload_i8(sub)));
}

/// What is added to scale x code, likewise.
template <CodeFormat F>
static inline vf group_min(const uint8_t* unit, int64_t group, int64_t column) {
  const vf min = vload_f16(reinterpret_cast<const uint16_t*>(unit) + kPanel + column);
  if constexpr (!F.has_superblocks) return min;
  const uint8_t* sub = unit + F.halves_bytes() + F.sub_bytes() + group * kPanel + column;
  return vmul(vsub(vzero(), min), vfloat(iload_u8(sub)));
}

/// Widens `depth` k of a panel to float32, [depth][32]. depth: a multiple of 32, and of the group.
template <CodeFormat F>
static void widen_codes(const uint8_t* block, int64_t first, int64_t depth, int64_t matrix_group, float* out) {
  const int64_t unit = F.unit(matrix_group);
  const int64_t group = F.has_superblocks ? F.group : matrix_group;
  for (int64_t k0 = first; k0 < first + depth; k0 += kStrip, out += kStrip * kPanel) {
    const uint8_t* header = block + k0 / unit * F.unit_bytes(matrix_group);
    const uint8_t* strip = header + F.header_bytes() + k0 % unit / kStrip * F.strip_bytes();
    for (int64_t column = 0; column < kPanel; column += kWidth) {
#pragma GCC unroll 8
      for (int quad = 0; quad < 8; ++quad) {
        const int64_t index = (k0 % unit + 4 * quad) / group;
        const vf scale = group_scale<F>(header, index, column);
        const vi codes = codes_of<F>(strip, quad, column);
        for (int byte = 0; byte < 4; ++byte) {
          const vf code = vfloat(iand(ishift_right(codes, 8 * byte), iset1(255)));
          vf weight = vmul(vsub(code, vset1(static_cast<float>(F.zero))), scale);
          if constexpr (F.has_min) weight = vfma(code, scale, group_min<F>(header, index, column));
          vstore(out + (4 * quad + byte) * kPanel + column, weight);
        }
      }
    }
  }
}

/// The float32 product of widened weights: a panel is widened piece by piece for all its rows.
template <CodeFormat F>
static void panel_codes_exact(const PanelProduct& p) {
  constexpr int64_t kPiece = 128;
  alignas(64) float widened[kPiece * kPanel];
  const float* tiles = static_cast<const float*>(p.a);
  for (int64_t k0 = 0; k0 == 0 || k0 < p.depth; k0 += kPiece) {
    const int64_t depth = p.depth - k0 < kPiece ? p.depth - k0 : kPiece;
    widen_codes<F>(static_cast<const uint8_t*>(p.b), k0, depth, p.group, widened);
    for (int64_t row = 0; row < p.rows; row += kTileRows) {
      const int64_t height = p.rows - row < kTileRows ? p.rows - row : kTileRows;
      tile_any<PanelF32, PackedRows>(height, depth, tiles + row * p.depth + k0 * height, 0, widened, p.c + row * p.ldc,
                                     p.ldc, p.accumulate || k0 > 0);
    }
  }
}

/// Rounds `count` <= 128 activations to int8, zeros after them, and returns their scale: |x|max / 127, or a NaN when one of
/// them is not finite.
static inline float round_activations(const float* x, int64_t count, int32_t* rounded) {
  alignas(64) float padded[kActivationBlock];
  if (count < kActivationBlock) {
    for (int64_t i = 0; i < kActivationBlock; ++i) padded[i] = i < count ? x[i] : 0.0f;
    x = padded;
  }
  vi largest = iset1(0);
  for (int64_t i = 0; i < kActivationBlock; i += kWidth) {
    largest = imax(largest, iand(ibits(vload(x + i)), iset1(0x7fffffff)));
  }
  int32_t lanes[kWidth];
  istore(lanes, largest);
  int32_t bits = 0;
  for (int i = 0; i < kWidth; ++i) bits = lanes[i] > bits ? lanes[i] : bits;
  float top;
  __builtin_memcpy(&top, &bits, sizeof top);
  // Below this the quotient would overflow, and nothing else would notice such numbers either.
  const bool is_zero = top < 1e-30f;
  const bool is_finite = bits < 0x7f800000;
  const vf inverse = vset1(is_zero || !is_finite ? 0.0f : 127.0f / top);
  for (int64_t i = 0; i < kActivationBlock; i += kWidth) {
    istore(rounded + i, is_finite ? iround(vmul(vload(x + i), inverse)) : iset1(0));
  }
  return !is_finite ? __builtin_nanf("") : is_zero ? 0.0f : top / 127.0f;
}

/// Bytes of 128 activations of a row in a tile: their scale, the sums of their groups, and themselves.
template <typename Activation>
static int64_t packed_bytes_codes(int64_t depth, int64_t group) {
  const int64_t sums = kActivationBlock / group;
  return (depth + kActivationBlock - 1) / kActivationBlock *
         (4 + 4 * sums + kActivationBlock * static_cast<int64_t>(sizeof(Activation)));
}

/// Activations as blocks of 128 k: [rows] scales, [128 / group][rows] sums, [32][rows][4] codes. The sums are what a product
/// with codes starts from: -zero x (sum of activations) as int32, or, with has_min, that sum as float32.
/// Activation: int8_t, or int16_t with the four of a quad in the order 0, 2, 1, 3.
template <CodeFormat F, typename Activation>
static void pack_codes(const PackJob& job) {
  char* tile = static_cast<char*>(job.tile);
  const int64_t sums = kActivationBlock / job.group;
  for (int64_t k0 = 0; k0 < job.depth; k0 += kActivationBlock) {
    char* scales = tile;
    char* starts = scales + 4 * job.rows;
    Activation* codes = reinterpret_cast<Activation*>(starts + 4 * sums * job.rows);
    for (int64_t r = 0; r < job.rows; ++r) {
      alignas(64) int32_t rounded[kActivationBlock];
      const int64_t left = job.k - k0;
      const int64_t count = left < 0 ? 0 : left < kActivationBlock ? left : kActivationBlock;
      const float scale = round_activations(job.x + r * job.stride + k0, count, rounded);
      __builtin_memcpy(scales + 4 * r, &scale, 4);
      for (int64_t g = 0; g < sums; ++g) {
        int32_t sum = 0;
        for (int64_t i = g * job.group; i < (g + 1) * job.group; ++i) sum += rounded[i];
        if constexpr (F.has_min) {
          const float start = static_cast<float>(sum);
          __builtin_memcpy(starts + 4 * (g * job.rows + r), &start, 4);
        } else {
          const int32_t start = -F.zero * sum;
          __builtin_memcpy(starts + 4 * (g * job.rows + r), &start, 4);
        }
      }
      for (int64_t quad = 0; quad < kActivationBlock / 4; ++quad) {
        constexpr bool kPairs = sizeof(Activation) == 2;
        const int32_t* from = rounded + 4 * quad;
        const Activation four[4] = {static_cast<Activation>(from[0]), static_cast<Activation>(from[kPairs ? 2 : 1]),
                                    static_cast<Activation>(from[kPairs ? 1 : 2]), static_cast<Activation>(from[3])};
        __builtin_memcpy(codes + 4 * (quad * job.rows + r), four, sizeof four);
      }
    }
    tile = reinterpret_cast<char*>(codes + kActivationBlock * job.rows);
  }
}

}  // namespace llama_ext::LLAMA_EXT_ISA_NAMESPACE
