// bf16 x bf16 products with VDPBF16PS: 14 x 32 sums, pairs of k at a time, activations rounded to bf16 when they are packed.
// Bound: arithmetic; twice the float32 rate on Zen 4.
#pragma once

#include "cpu/kernel_table.h"
#include "cpu/kernels/gemm.h"

namespace llama_ext::LLAMA_EXT_ISA_NAMESPACE {

template <int R, bool kStreams>
static void tile_bf16_dot(int64_t k, const uint32_t* a, const uint16_t* b, float* c, int64_t ldc, bool accumulate,
                          [[maybe_unused]] Stream stream) {
  __m512 sum[R][2];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    sum[r][0] = accumulate ? _mm512_loadu_ps(c + r * ldc) : _mm512_setzero_ps();
    sum[r][1] = accumulate ? _mm512_loadu_ps(c + r * ldc + 16) : _mm512_setzero_ps();
  }
  for (int64_t i = 0; i < k; i += 2) {
    if constexpr (kStreams) {
      __builtin_prefetch(stream.line);
      __builtin_prefetch(stream.line + stream.second);
      stream.line += stream.step;
    }
    const __m512bh w0 = reinterpret_cast<__m512bh>(_mm512_loadu_si512(b));
    const __m512bh w1 = reinterpret_cast<__m512bh>(_mm512_loadu_si512(b + 32));
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const __m512bh x = reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(a[r])));
      sum[r][0] = _mm512_dpbf16_ps(sum[r][0], x, w0);
      sum[r][1] = _mm512_dpbf16_ps(sum[r][1], x, w1);
    }
    a += R;
    b += 2 * kPanel;
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    _mm512_storeu_ps(c + r * ldc, sum[r][0]);
    _mm512_storeu_ps(c + r * ldc + 16, sum[r][1]);
  }
}

using TileBf16Dot = void (*)(int64_t, const uint32_t*, const uint16_t*, float*, int64_t, bool, Stream);
template <bool kStreams>
static constexpr TileBf16Dot kTilesBf16Dot[kTileRows] = {
    tile_bf16_dot<1, true>,      tile_bf16_dot<2, true>,      tile_bf16_dot<3, true>,      tile_bf16_dot<4, true>,
    tile_bf16_dot<5, kStreams>,  tile_bf16_dot<6, kStreams>,  tile_bf16_dot<7, kStreams>,  tile_bf16_dot<8, kStreams>,
    tile_bf16_dot<9, kStreams>,  tile_bf16_dot<10, kStreams>, tile_bf16_dot<11, kStreams>, tile_bf16_dot<12, kStreams>,
    tile_bf16_dot<13, kStreams>, tile_bf16_dot<14, kStreams>};
static_assert(kPrefetchRows == 4);

static void panel_bf16_dot(const PanelProduct& p) {
  constexpr int64_t kStepBytes = 2 * kPanel * static_cast<int64_t>(sizeof(uint16_t));
  const auto* tiles = static_cast<const uint32_t*>(p.a);  // one pair of k each
  const int64_t tile_rows = p.tile_rows > 0 ? p.tile_rows : kTileRows;
  const int64_t parts = (p.rows + tile_rows - 1) / tile_rows;
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t row = part * tile_rows;
    const int64_t height = p.rows - row < tile_rows ? p.rows - row : tile_rows;
    Stream stream;
    const auto& multiply =
        begin_stream(p, part, parts, kStepBytes, &stream) ? kTilesBf16Dot<true> : kTilesBf16Dot<false>;
    multiply[height - 1](p.depth, tiles + row * p.depth / 2, static_cast<const uint16_t*>(p.b), p.c + row * p.ldc,
                         p.ldc, p.accumulate, stream);
  }
}

static int64_t packed_bytes_bf16(int64_t depth, int64_t) { return depth * static_cast<int64_t>(sizeof(uint16_t)); }

/// `rows` of k numbers, `stride` apart, as [depth / 2][rows][2], zeros after k.
static inline void pack_pairs(const float* x, int64_t stride, int64_t rows, int64_t k, int64_t depth, uint32_t* tile) {
  alignas(64) uint32_t pairs[kTileRows][16];
  for (int64_t k0 = 0; k0 < depth; k0 += 32, tile += 16 * rows) {
    const int64_t left = k - k0;
    for (int64_t r = 0; r < rows; ++r) {
      const float* block = x + r * stride + k0;
      alignas(64) float padded[32];
      if (left < 32) {
        for (int64_t i = 0; i < 32; ++i) padded[i] = i < left ? block[i] : 0.0f;
        block = padded;
      }
      const __m512bh rounded = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(block + 16), _mm512_loadu_ps(block));
      _mm512_store_si512(pairs[r], reinterpret_cast<__m512i>(rounded));
    }
    interleave_rows(reinterpret_cast<const float*>(pairs), 16, rows, depth - k0 < 32 ? (depth - k0) / 2 : 16,
                    reinterpret_cast<float*>(tile));
  }
}

static void pack_bf16_pairs(const PackJob& job) {
  pack_pairs(job.x, job.stride, job.rows, job.k, job.depth, static_cast<uint32_t*>(job.tile));
}

}  // namespace llama_ext::LLAMA_EXT_ISA_NAMESPACE
