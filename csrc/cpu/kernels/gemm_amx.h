// bf16 x bf16 products with AMX: 32 rows x 32 columns of sums in four tile registers, 32 k at a time.
//
// A panel of bf16 weights, [k / 2][32][2], is a pair of AMX operands as it lies: 16 rows of 64 bytes, 128 bytes apart. Up to four
// rows are bound by memory and run on vectors, which keep more of it in flight than tile loads do, in exactly the steps that Intel
// documents for TDPBF16PS: so decode and prefill give the same bits.
// Bound: arithmetic, 1,024 multiply-adds a cycle; the L2 cache comes close to it, as sums are stored every 256 k.
#pragma once

#include "cpu/kernel_table.h"
#include "cpu/kernels/bf16.h"
#include "cpu/kernels/gemm.h"

namespace llama_ext::LLAMA_EXT_ISA_NAMESPACE {

constexpr int64_t kAmxRows = 32;
constexpr int64_t kAmxHalf = 16;
constexpr int64_t kAmxK = 32;
// Four steps of k: a step is 2 KB and takes as long to arrive as several to compute.
constexpr int64_t kAmxPrefetchBytes = 8192;
constexpr int64_t kAmxVectorPrefetchBytes = 4096;

struct alignas(64) AmxConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t column_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Registers: 0..3 sums (upper left, upper right, lower left, lower right), 4 and 5 activations, 6 and 7 weights.
static void amx_configure(int64_t upper_rows, int64_t lower_rows) {
  AmxConfig config;
  const int64_t rows[8] = {upper_rows, upper_rows, lower_rows, lower_rows, upper_rows, lower_rows, 16, 16};
  for (int i = 0; i < 8; ++i) {
    config.rows[i] = static_cast<uint8_t>(rows[i]);
    config.column_bytes[i] = rows[i] > 0 ? 64 : 0;
  }
  // Not the intrinsic: that of g++ 12 names 8 of the 64 bytes as its input, and the others may be optimised away.
  __asm__ volatile("ldtilecfg %0" : : "m"(config));
}

/// Up to 32 rows: `lower` says whether there are more than 16.
template <bool kLower>
static void tile_amx(int64_t kc, const uint16_t* upper_a, const uint16_t* lower_a, int64_t upper_step,
                     int64_t lower_step, const uint16_t* b, float* c, int64_t ldc, bool accumulate, bool prefetch) {
  const int64_t c_stride = ldc * static_cast<int64_t>(sizeof(float));
  if (accumulate) {
    _tile_loadd(0, c, c_stride);
    _tile_loadd(1, c + 16, c_stride);
    if constexpr (kLower) {
      _tile_loadd(2, c + kAmxHalf * ldc, c_stride);
      _tile_loadd(3, c + kAmxHalf * ldc + 16, c_stride);
    }
  } else {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (kLower) {
      _tile_zero(2);
      _tile_zero(3);
    }
  }
  for (int64_t k = 0; k < kc; k += kAmxK) {
    if (prefetch) {
      const char* ahead = reinterpret_cast<const char*>(b) + kAmxPrefetchBytes;
#pragma GCC unroll 32
      for (int line = 0; line < 32; ++line) __builtin_prefetch(ahead + 64 * line);
    }
    _tile_loadd(6, b, 128);
    _tile_loadd(7, b + 32, 128);
    _tile_loadd(4, upper_a, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (kLower) {
      _tile_loadd(5, lower_a, 64);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    upper_a += upper_step;
    lower_a += lower_step;
    b += kAmxK * kPanel;
  }
  _tile_stored(0, c, c_stride);
  _tile_stored(1, c + 16, c_stride);
  if constexpr (kLower) {
    _tile_stored(2, c + kAmxHalf * ldc, c_stride);
    _tile_stored(3, c + kAmxHalf * ldc + 16, c_stride);
  }
}

constexpr int64_t kAmxVectorRows = 4;

/// What TDPBF16PS does, on vectors: for each 32 k, even and odd products are summed apart by FMA from zero, added together, and added
/// to the sum; denormals count as zero throughout (panel_amx sets that). Equal to the instruction on 30 million random cases.
/// Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, TDPBF16PS.
template <int R>
static void tile_amx_vectors(int64_t depth, const uint16_t* a, const uint16_t* b, float* c, int64_t ldc,
                             bool accumulate) {
  vf sum[R][2];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    sum[r][0] = accumulate ? vload(c + r * ldc) : vzero();
    sum[r][1] = accumulate ? vload(c + r * ldc + 16) : vzero();
  }
  for (int64_t k = 0; k < depth; k += kAmxK) {
    vf even[R][2];
    vf odd[R][2];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) even[r][0] = even[r][1] = odd[r][0] = odd[r][1] = vzero();
    for (int pair = 0; pair < kAmxK / 2; ++pair) {
      const char* ahead = reinterpret_cast<const char*>(b) + kAmxVectorPrefetchBytes;
      __builtin_prefetch(ahead);
      __builtin_prefetch(ahead + 64);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        int bits;
        __builtin_memcpy(&bits, a + r * kAmxK + 2 * pair, sizeof bits);
        const __m512i both = _mm512_set1_epi32(bits);
        const vf x_even = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
        const vf x_odd = _mm512_castsi512_ps(_mm512_maskz_mov_epi16(0xaaaaaaaau, both));
        even[r][0] = vfma(x_even, vload_pair_low(b), even[r][0]);
        even[r][1] = vfma(x_even, vload_pair_low(b + 32), even[r][1]);
        odd[r][0] = vfma(x_odd, vload_pair_high(b), odd[r][0]);
        odd[r][1] = vfma(x_odd, vload_pair_high(b + 32), odd[r][1]);
      }
      b += 2 * kPanel;
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      sum[r][0] = vadd(sum[r][0], vadd(even[r][0], odd[r][0]));
      sum[r][1] = vadd(sum[r][1], vadd(even[r][1], odd[r][1]));
    }
    a += R * kAmxK;
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    vstore(c + r * ldc, sum[r][0]);
    vstore(c + r * ldc + 16, sum[r][1]);
  }
}

static void panel_amx_vectors(const PanelProduct& p) {
  constexpr unsigned kDenormalsAreZero = 0x9fc0;  // flush results, too; round to nearest
  const unsigned saved = _mm_getcsr();
  _mm_setcsr(kDenormalsAreZero);
  const auto* a = static_cast<const uint16_t*>(p.a);
  const auto* b = static_cast<const uint16_t*>(p.b);
  switch (p.rows) {
    case 1:
      tile_amx_vectors<1>(p.depth, a, b, p.c, p.ldc, p.accumulate);
      break;
    case 2:
      tile_amx_vectors<2>(p.depth, a, b, p.c, p.ldc, p.accumulate);
      break;
    case 3:
      tile_amx_vectors<3>(p.depth, a, b, p.c, p.ldc, p.accumulate);
      break;
    default:
      tile_amx_vectors<4>(p.depth, a, b, p.c, p.ldc, p.accumulate);
      break;
  }
  _mm_setcsr(saved);
}

static void panel_amx(const PanelProduct& p) {
  if (p.rows <= kAmxVectorRows) {
    panel_amx_vectors(p);
    return;
  }
  const auto* tiles = static_cast<const uint16_t*>(p.a);
  const auto* weights = static_cast<const uint16_t*>(p.b);
  const int64_t parts = (p.rows + kAmxRows - 1) / kAmxRows;
  int64_t configured = -1;
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t row = part * kAmxRows;
    const int64_t height = p.rows - row < kAmxRows ? p.rows - row : kAmxRows;
    const int64_t upper = height < kAmxHalf ? height : kAmxHalf;
    const int64_t lower = height - upper;
    if (height != configured) {
      amx_configure(upper, lower);
      configured = height;
    }
    prefetch_next(p, part, parts);
    const uint16_t* upper_a = tiles + row * p.depth;
    const uint16_t* lower_a = upper_a + upper * p.depth;
    float* c = p.c + row * p.ldc;
    if (lower > 0) {
      tile_amx<true>(p.depth, upper_a, lower_a, upper * kAmxK, lower * kAmxK, weights, c, p.ldc, p.accumulate, false);
    } else {
      tile_amx<false>(p.depth, upper_a, upper_a, upper * kAmxK, 0, weights, c, p.ldc, p.accumulate, parts == 1);
    }
  }
  _tile_release();
}

static int64_t packed_bytes_bf16(int64_t depth, int64_t) { return depth * static_cast<int64_t>(sizeof(uint16_t)); }

/// Activations as two halves of up to 16 rows, each [k / 32][rows][32]. depth is a multiple of 32.
static void pack_amx(const PackJob& job) {
  uint16_t* to = static_cast<uint16_t*>(job.tile);
  for (int64_t half = 0; half < job.rows; half += kAmxHalf) {
    const int64_t height = job.rows - half < kAmxHalf ? job.rows - half : kAmxHalf;
    for (int64_t r = 0; r < height; ++r) {
      const float* from = job.x + (half + r) * job.stride;
      uint16_t* row = to + half * job.depth + r * kAmxK;
      for (int64_t k0 = 0; k0 < job.depth; k0 += kAmxK, row += height * kAmxK) {
        if (job.k - k0 >= kAmxK) {
          const __m512i high = _mm512_loadu_si512(from + k0 + 16);
          const __m512i low = _mm512_loadu_si512(from + k0);
          _mm512_storeu_si512(
              row, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(_mm512_castsi512_ps(high), _mm512_castsi512_ps(low))));
          continue;
        }
        for (int64_t i = 0; i < kAmxK; ++i) row[i] = k0 + i < job.k ? round_to_bf16(from[k0 + i]) : uint16_t{0};
      }
    }
  }
}

}  // namespace llama_ext::LLAMA_EXT_ISA_NAMESPACE
