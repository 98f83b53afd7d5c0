// Products of packed activations with weight panels of 32 columns.
//
// A tile holds rows x columns of sums in registers and walks k once: two loads of weights and one broadcast per row for each k.
// SIMD lanes run over output columns, so an output is one chain of additions over ascending k, whatever rows surround it.
// Bound: arithmetic from about ten rows on, reading the weights below. Every loop over registers is unrolled by pragma, as
// g++ 12 otherwise keeps the sums on the stack (40% of peak).
#pragma once

#include <immintrin.h>

#include "cpu/kernel_table.h"

namespace llama_ext::LLAMA_EXT_ISA_NAMESPACE {

// Tile heights that fill the registers: 14 x 2 + 2 of 32 with AVX-512, 6 x 2 + 2 + 1 of 16 below.
constexpr int kTileRows = kWidth == 16 ? 14 : 6;
// Few rows are bound by memory: ask for the panel well ahead.
constexpr int kPrefetchRows = 4;
constexpr int64_t kPrefetchBytes = kWidth == 16 ? 8192 : 4096;

struct PanelF32 {
  using Element = float;
  static constexpr int kStep = 1;  // k per iteration
};

struct PanelF16 {
  using Element = uint16_t;
  static constexpr int kStep = 1;
};

/// Pairs of k next to each other: [k / 2][32][2].
struct PanelBf16 {
  using Element = uint16_t;
  static constexpr int kStep = 2;
};

static inline vf load_weights(const float* p) { return vload(p); }
static inline vf load_weights(const uint16_t* p) { return vload_f16(p); }

/// The activations of a tile of R rows, packed: [k][R].
template <int R>
struct PackedRows {
  static constexpr bool kMayStream = true;
  const float* a;

  PackedRows(const float* x, int64_t) : a(x) {}
  float get(int64_t row) const { return a[row]; }
  /// `next` k on.
  float get(int64_t row, int64_t next) const { return a[next * R + row]; }
  void advance(int64_t count) { a += count * R; }
};

/// Where they are: rows `stride` apart. One register points to three of them.
template <int R>
struct RowsInPlace {
  static constexpr bool kMayStream = false;
  static constexpr int kGroups = (R + 2) / 3;
  const float* a[kGroups];
  int64_t stride;

  RowsInPlace(const float* x, int64_t row_stride) : stride(row_stride) {
#pragma GCC unroll 8
    for (int g = 0; g < kGroups; ++g) a[g] = x + 3 * g * stride;
  }
  float get(int64_t row) const { return a[row / 3][row % 3 * stride]; }
  float get(int64_t row, int64_t next) const { return a[row / 3][row % 3 * stride + next]; }
  void advance(int64_t count) {
#pragma GCC unroll 8
    for (int g = 0; g < kGroups; ++g) a[g] += count;
  }
};

/// What a tile asks for while it multiplies: with each step of k a line, and the one `second` bytes on.
struct Stream {
  const char* line;
  int64_t second;
  int64_t step;
};

/// A panel of `step` bytes a step of k: itself, well ahead.
static inline Stream stream_itself(const void* panel, int64_t step) {
  return {static_cast<const char*>(panel) + kPrefetchBytes, 64, step};
}

template <typename Panel, int R, int NV, bool kStreams, template <int> typename Activations>
static inline void tile(int64_t k, Activations<R> x, const typename Panel::Element* b, float* c, int64_t ldc,
                        bool accumulate, [[maybe_unused]] Stream stream) {
  vf sum[R][NV];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) sum[r][v] = accumulate ? vload(c + r * ldc + v * kWidth) : vzero();
  }
  for (int64_t i = 0; i < k; i += Panel::kStep) {
    if constexpr (kStreams) {
      __builtin_prefetch(stream.line);
      __builtin_prefetch(stream.line + stream.second);
      stream.line += stream.step;
    }
    if constexpr (Panel::kStep == 1) {
      vf w[NV];
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) w[v] = load_weights(b + v * kWidth);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const vf a = vset1(x.get(r));
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) sum[r][v] = vfma(a, w[v], sum[r][v]);
      }
    } else {
      vf w[NV];
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) w[v] = vload_pair_low(b + 2 * v * kWidth);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const vf a = vset1(x.get(r));
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) sum[r][v] = vfma(a, w[v], sum[r][v]);
      }
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) w[v] = vload_pair_high(b + 2 * v * kWidth);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const vf a = vset1(x.get(r, 1));
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) sum[r][v] = vfma(a, w[v], sum[r][v]);
      }
    }
    x.advance(Panel::kStep);
    b += kPanel * Panel::kStep;
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) vstore(c + r * ldc + v * kWidth, sum[r][v]);
  }
}

/// R rows x 32 columns, in as few passes over the columns as the registers allow.
template <typename Panel, int R, bool kStreams, template <int> typename Activations>
static void tile_columns(int64_t k, Activations<R> x, const typename Panel::Element* b, float* c, int64_t ldc,
                         bool accumulate, const Stream& stream) {
  constexpr int kVectors = static_cast<int>(kPanel) / kWidth;
  constexpr int NV = kVectors * R <= 8 ? kVectors : 2;
  tile<Panel, R, NV, kStreams, Activations>(k, x, b, c, ldc, accumulate, stream);
  for (int v = NV; v < kVectors; v += NV) {
    tile<Panel, R, NV, false, Activations>(k, x, b + v * kWidth * Panel::kStep, c + v * kWidth, ldc, accumulate,
                                           stream);
  }
}

template <typename Panel, template <int> typename Activations, bool kStreams = false>
static void tile_any(int64_t rows, int64_t k, const float* a, int64_t stride, const typename Panel::Element* b,
                     float* c, int64_t ldc, bool accumulate, const Stream& stream) {
#define LLAMA_EXT_TILE(R)                                                                                          \
  case R:                                                                                                          \
    if constexpr (R <= kTileRows) {                                                                                \
      tile_columns<Panel, R, kStreams || R <= kPrefetchRows, Activations>(k, Activations<R>(a, stride), b, c, ldc, \
                                                                          accumulate, stream);                     \
    }                                                                                                              \
    break;
  switch (rows) {
    LLAMA_EXT_TILE(1)
    LLAMA_EXT_TILE(2)
    LLAMA_EXT_TILE(3)
    LLAMA_EXT_TILE(4)
    LLAMA_EXT_TILE(5)
    LLAMA_EXT_TILE(6)
    LLAMA_EXT_TILE(7)
    LLAMA_EXT_TILE(8)
    LLAMA_EXT_TILE(9)
    LLAMA_EXT_TILE(10)
    LLAMA_EXT_TILE(11)
    LLAMA_EXT_TILE(12)
    LLAMA_EXT_TILE(13)
    LLAMA_EXT_TILE(14)
    default:
      break;
  }
#undef LLAMA_EXT_TILE
}

/// Asks for part `index` of `parts` of what comes next.
static inline void prefetch_next(const PanelProduct& p, int64_t index, int64_t parts) {
  if (p.next == nullptr) return;
  const int64_t lines = p.next_bytes / 64;
  // One division of 32 bits: a tile of short k takes a few hundred cycles.
  const int64_t share = static_cast<uint32_t>(lines + parts - 1) / static_cast<uint32_t>(parts);
  const int64_t end = (index + 1) * share < lines ? (index + 1) * share : lines;
  const char* next = static_cast<const char*>(p.next);
  for (int64_t line = index * share; line < end; ++line) __builtin_prefetch(next + 64 * line, 0, 2);
}

/// What tile `part` of `parts` of a product asks for, of a panel of `step` bytes a step of k. Returns whether it does so while it
/// multiplies, as its first two tiles do where the product streams: the only one for the panel itself, or for what comes next, of
/// several each for half of that (asking for each line twice). All at once, as without streaming, holds up the loads behind it, and leaves
/// memory with nothing to do during the products: 5 to 42 rows took 1.3 to 1.9 times as long.
static inline bool begin_stream(const PanelProduct& p, int64_t part, int64_t parts, int64_t step, Stream* stream) {
  *stream = stream_itself(p.b, step);
  if (!p.streams) {
    prefetch_next(p, part, parts);
    return false;
  }
  if (p.next == nullptr) return parts == 1;
  const char* next = static_cast<const char*>(p.next);
  *stream = parts == 1 ? Stream{next, 64, step} : Stream{next + p.next_bytes / 2 * part, 0, step / 2};
  return part < 2;
}

template <typename Panel, template <int> typename Activations = PackedRows>
static void panel(const PanelProduct& p) {
  const float* x = static_cast<const float*>(p.a);
  const auto* weights = static_cast<const typename Panel::Element*>(p.b);
  constexpr int64_t kStepBytes = Panel::kStep * kPanel * static_cast<int64_t>(sizeof(typename Panel::Element));
  // Packed, tiles follow each other.
  const int64_t row_floats = p.stride == 0 ? p.depth : p.stride;
  const int64_t tile_rows = p.tile_rows > 0 ? p.tile_rows : kTileRows;
  const int64_t parts = (p.rows + tile_rows - 1) / tile_rows;
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t row = part * tile_rows;
    const int64_t height = p.rows - row < tile_rows ? p.rows - row : tile_rows;
    Stream stream;
    const bool streams = begin_stream(p, part, parts, kStepBytes, &stream);
    auto* multiply = tile_any<Panel, Activations>;
    if constexpr (Activations<1>::kMayStream) {
      if (streams) multiply = tile_any<Panel, Activations, true>;
    }
    multiply(height, p.depth, x + row * row_floats, p.stride, weights, p.c + row * p.ldc, p.ldc, p.accumulate, stream);
  }
}

static int64_t packed_bytes_f32(int64_t depth, int64_t) { return depth * static_cast<int64_t>(sizeof(float)); }

/// to[i * rows + r] = x[r][i] of anything that has four bytes, in blocks of 4 x 4 in 128-bit vectors on every ISA.
static inline __attribute__((always_inline)) void interleave_rows(const float* x, int64_t stride, int64_t rows,
                                                                  int64_t k, float* to) {
  int64_t i = 0;
  for (; i + 4 <= k; i += 4) {
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) {
      const float* from = x + r * stride + i;
      __m128 a = _mm_loadu_ps(from);
      __m128 b = _mm_loadu_ps(from + stride);
      __m128 c = _mm_loadu_ps(from + 2 * stride);
      __m128 d = _mm_loadu_ps(from + 3 * stride);
      _MM_TRANSPOSE4_PS(a, b, c, d);
      float* place = to + i * rows + r;
      _mm_storeu_ps(place, a);
      _mm_storeu_ps(place + rows, b);
      _mm_storeu_ps(place + 2 * rows, c);
      _mm_storeu_ps(place + 3 * rows, d);
    }
    for (; r + 2 <= rows; r += 2) {
      const __m128 a = _mm_loadu_ps(x + r * stride + i);
      const __m128 b = _mm_loadu_ps(x + (r + 1) * stride + i);
      const __m128 low = _mm_unpacklo_ps(a, b);
      const __m128 high = _mm_unpackhi_ps(a, b);
      float* place = to + i * rows + r;
      _mm_storel_pi(reinterpret_cast<__m64*>(place), low);
      _mm_storeh_pi(reinterpret_cast<__m64*>(place + rows), low);
      _mm_storel_pi(reinterpret_cast<__m64*>(place + 2 * rows), high);
      _mm_storeh_pi(reinterpret_cast<__m64*>(place + 3 * rows), high);
    }
    for (; r < rows; ++r) {
      for (int64_t j = i; j < i + 4; ++j) __builtin_memcpy(to + j * rows + r, x + r * stride + j, 4);
    }
  }
  for (; i < k; ++i) {
    for (int64_t r = 0; r < rows; ++r) __builtin_memcpy(to + i * rows + r, x + r * stride + i, 4);
  }
}

/// Activations as [k][rows of the tile], so that a tile reads them in one stream.
static void pack_f32(const PackJob& job) {
  float* to = static_cast<float*>(job.tile);
  if (job.rows == kTileRows) {
    interleave_rows(job.x, job.stride, kTileRows, job.k, to);
  } else {
    interleave_rows(job.x, job.stride, job.rows, job.k, to);
  }
  for (int64_t i = job.k * job.rows; i < job.depth * job.rows; ++i) to[i] = 0.0f;
}

}  // namespace llama_ext::LLAMA_EXT_ISA_NAMESPACE
