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

/// What a group's sum starts at besides: the bits of 1.5 x 2^23. Sums of up to 128 products are below 2^22 in magnitude, so the
/// bits of such a sum are those of the float32 1.5 x 2^23 + sum. Subtracting the former gives what a conversion gives, and on
/// AMD's processors on pipes that do not multiply.
constexpr int32_t kSumBits = 0x4b400000;
static inline vf sum_value(vi sum) { return vsub(vbits(sum), vset1(12582912.0f)); }

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

/// How far ahead few rows, which wait for memory, ask for what they will read. Measured: int4 gains up to a fifth by 8 KB, int8 nothing.
template <CodeFormat F>
constexpr int64_t kCodesAhead = F.bits == 8 ? 4096 : 8192;

/// With few rows: asks for as many bytes as are read at `at`, a strip or a unit's header.
template <CodeFormat F, int R, int64_t kBytes>
static inline void prefetch_ahead(const uint8_t* at) {
  if constexpr (R <= kPrefetchRows) {
#pragma GCC unroll 20
    for (int64_t i = 0; i < kBytes; i += 64) __builtin_prefetch(at + kCodesAhead<F> + i);
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

/// The scales of a panel's groups as they lie in its units.
template <CodeFormat F>
struct PackedScales {
  const uint8_t* unit;

  PackedScales(const PanelProduct& p, const float*) : unit(static_cast<const uint8_t*>(p.b)) {}
  /// The next unit's, which begins at `header`.
  void advance(const uint8_t* header) { unit = header; }
  vf scale(int64_t group, int64_t column) const { return group_scale<F>(unit, group, column); }
  vf min(int64_t group, int64_t column) const { return group_min<F>(unit, group, column); }
};

/// The same widened to float32, once for all rows: [groups of a unit][32] scales, each followed by [32] minima where there are some.
template <CodeFormat F>
struct WidenedScales {
  static constexpr int64_t kFloats = kPanel * (F.has_min ? 2 : 1);  // of a group
  const float* unit;
  int64_t unit_floats;

  WidenedScales(const PanelProduct& p, const float* widened)
      : unit(widened), unit_floats(F.groups_of_unit(p.group) * kFloats) {}
  void advance(const uint8_t*) { unit += unit_floats; }
  vf scale(int64_t group, int64_t column) const { return vload(unit + group * kFloats + column); }
  vf min(int64_t group, int64_t column) const { return vload(unit + group * kFloats + kPanel + column); }
};

/// All scales of `depth` k of a panel, widened. depth: a multiple of the unit.
template <CodeFormat F>
static void widen_scales(const uint8_t* block, int64_t depth, int64_t matrix_group, float* out) {
  const int64_t groups = F.groups_of_unit(matrix_group);
  for (int64_t k = 0; k < depth; k += F.unit(matrix_group), block += F.unit_bytes(matrix_group)) {
    for (int64_t group = 0; group < groups; ++group, out += WidenedScales<F>::kFloats) {
      for (int64_t column = 0; column < kPanel; column += kWidth) {
        vstore(out + column, group_scale<F>(block, group, column));
        if constexpr (F.has_min) vstore(out + kPanel + column, group_min<F>(block, group, column));
      }
    }
  }
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
                                     p.ldc, p.accumulate || k0 > 0, stream_itself(widened, kPanel * 4));
    }
  }
}

/// Rows of a tile. Six leave registers of AVX-512 for both kinds of sums: 12 of int32, 12 of float32, the rest for codes and masks.
constexpr int kCodeRows = 6;
/// Rows of the largest tile, which some formats have where a product is one tile (kOnlyCodeRows).
constexpr int kMostCodeRows = 9;

/// Rounds `count` <= 128 activations to int8, zeros after them, and returns their scale: |x|max / 127, or a NaN when one of
/// them is not finite. sums: of the codes of each group.
template <typename Activation>
static inline float round_activations(const float* x, int64_t count, int64_t group, Activation* rounded,
                                      int32_t* sums) {
  alignas(64) float padded[kActivationBlock];
  if (count < kActivationBlock) {
    for (int64_t i = 0; i < kActivationBlock; ++i) padded[i] = i < count ? x[i] : 0.0f;
    x = padded;
  }
  vi largest = iset1(0);
  for (int64_t i = 0; i < kActivationBlock; i += kWidth) {
    largest = imax(largest, iand(ibits(vload(x + i)), iset1(0x7fffffff)));
  }
  const int32_t bits = reduce_max(largest);
  float top;
  __builtin_memcpy(&top, &bits, sizeof top);
  // Below this the quotient would overflow, and nothing else would notice such numbers either.
  const bool is_zero = top < 1e-30f;
  const bool is_finite = bits < 0x7f800000;
  const vf inverse = vset1(is_zero || !is_finite ? 0.0f : 127.0f / top);
  for (int64_t i = 0; i < kActivationBlock;) {
    vi sum = iset1(0);
    for (const int64_t end = i + group; i < end; i += kWidth) {
      const vi codes = is_finite ? iround(vmul(vload(x + i), inverse)) : iset1(0);
      sum = iadd(sum, codes);
      store_quads(rounded + i, codes);
    }
    *sums++ = reduce_add(sum);
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
/// with codes starts from: kSumBits - zero x (sum of activations) as int32, or, with has_min, that sum as float32.
/// Activation: int8_t, or int16_t with the four of a quad in the order 0, 2, 1, 3.
template <CodeFormat F, typename Activation>
static void pack_codes(const PackJob& job) {
  char* tile = static_cast<char*>(job.tile);
  const int64_t sums = kActivationBlock / job.group;
  alignas(64) Activation rounded[kMostCodeRows][kActivationBlock];
  for (int64_t k0 = 0; k0 < job.depth; k0 += kActivationBlock) {
    char* scales = tile;
    char* starts = scales + 4 * job.rows;
    Activation* codes = reinterpret_cast<Activation*>(starts + 4 * sums * job.rows);
    for (int64_t r = 0; r < job.rows; ++r) {
      const int64_t left = job.k - k0;
      const int64_t count = left < 0 ? 0 : left < kActivationBlock ? left : kActivationBlock;
      int32_t group_sums[kActivationBlock / F.smallest_group()];
      const float scale = round_activations(job.x + r * job.stride + k0, count, job.group, rounded[r], group_sums);
      __builtin_memcpy(scales + 4 * r, &scale, 4);
      for (int64_t g = 0; g < sums; ++g) {
        char* start = starts + 4 * (g * job.rows + r);
        if constexpr (F.has_min) {
          const float sum = static_cast<float>(group_sums[g]);
          __builtin_memcpy(start, &sum, 4);
        } else {
          const int32_t sum = kSumBits - F.zero * group_sums[g];
          __builtin_memcpy(start, &sum, 4);
        }
      }
    }
    if constexpr (sizeof(Activation) == 1) {
      constexpr int64_t kQuads = kActivationBlock / 4;
      interleave_rows(reinterpret_cast<const float*>(rounded), kQuads, job.rows, kQuads,
                      reinterpret_cast<float*>(codes));
    } else {
      for (int64_t r = 0; r < job.rows; ++r) {
        for (int64_t quad = 0; quad < kActivationBlock / 4; ++quad) {
          __builtin_memcpy(codes + 4 * (quad * job.rows + r), rounded[r] + 4 * quad, 4 * sizeof(Activation));
        }
      }
    }
    tile = reinterpret_cast<char*>(codes + kActivationBlock * job.rows);
  }
}

}  // namespace llama_ext::LLAMA_EXT_ISA_NAMESPACE
