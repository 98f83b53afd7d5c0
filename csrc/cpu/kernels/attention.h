// Attention of a block of query rows (tokens x the heads that share one key/value head) against tiles of 128 keys.
//
// Per tile: scores = Q K^T (keys lie in panels of 32 columns), softmax of the tile alone, its weighted values = P V by the same
// kind of product, then a merge into the running (o, m, l). A tile's partial result depends on the row and the
// tile only, and merges run in the order of tiles, so prefill, chunks, decode and a split key axis give the same bits.
// Bound: arithmetic in prefill, reading keys and values in decode (each is read once for all rows of the group).
#pragma once

#include "cpu/kernel_table.h"
#include "cpu/kernels/gemm.h"
#include "cpu/kernels/math.h"

namespace llama_ext::LLAMA_EXT_ISA_NAMESPACE {

static void attention_merge_row(int64_t size, float* o, float* m, float* l, const float* o2, float m2, float l2) {
  if (l2 == 0.0f) return;  // a tile this row does not see
  const float top = m2 > *m ? m2 : *m;
  float factors[kWidth];
  // Through the vector exponential, so that every row meets the same arithmetic.
  vstore(factors, vexp(vsub(vset1(*m), vset1(top))));
  const vf old_factor = vset1(factors[0]);
  vstore(factors, vexp(vsub(vset1(m2), vset1(top))));
  const vf new_factor = vset1(factors[0]);
  for (int64_t i = 0; i < size; i += kWidth) {
    vstore(o + i, vfma(vload(o2 + i), new_factor, vmul(vload(o + i), old_factor)));
  }
  float sums[kWidth];
  vstore(sums, vfma(vset1(l2), new_factor, vmul(vset1(*l), old_factor)));
  *l = sums[0];
  *m = top;
}

static void attention_merge(int64_t rows, int64_t padded_dim, float* o, float* m, float* l, const float* o2,
                            const float* m2, const float* l2) {
  for (int64_t r = 0; r < rows; ++r) {
    attention_merge_row(padded_dim, o + r * padded_dim, m + r, l + r, o2 + r * padded_dim, m2[r], l2[r]);
  }
}

/// How many of `keys` keys from `first` on a row sees.
static inline int64_t keys_seen(int64_t limit, int64_t first, int64_t keys) {
  const int64_t seen = limit - first;
  return seen < 0 ? 0 : seen < keys ? seen : keys;
}

static inline bool is_finite(const float* x) {
  vf sum = vzero();
  for (int64_t i = 0; i < kPanel; i += kWidth) sum = vadd(sum, vmul(vload(x + i), vzero()));
  return reduce_add(sum) == 0.0f;
}

/// float32 keys and values.
struct ProductsF32 {
  using Element = float;
  static constexpr int64_t kStep = 1;  // k that lie together in a panel

  static void multiply(const PanelProduct& p) { panel<PanelF32>(p); }
  /// Rows of weights, 128 apart, as a tile.
  static void pack_rows(const float* rows, int64_t depth, int64_t height, void* tile) {
    interleave_rows(rows, kKeyTile, height, depth, static_cast<float*>(tile));
  }
};

/// Pairs of bf16, widened.
struct ProductsBf16Exact : ProductsF32 {
  using Element = uint16_t;
  static constexpr int64_t kStep = 2;

  static void multiply(const PanelProduct& p) { panel<PanelBf16>(p); }
};

/// int8 codes in pairs as pairs of bf16, exactly.
static inline void widen_pairs(const int8_t* from, int64_t count, uint16_t* to) {
  for (int64_t i = 0; i < count; i += 2 * kWidth) {
    const vi pairs = iload_u16(from + i);
    const vi even = ibits(vfloat(ishift_right_signed(ishift_left(pairs, 24), 24)));
    const vi odd = ibits(vfloat(ishift_right_signed(ishift_left(pairs, 16), 24)));
    istore(to + i, ior(ishift_right(even, 16), iand(odd, iset1(static_cast<int>(0xffff0000u)))));
  }
}

/// A row that does not see all keys of the tile gave the others weight 0, but 0 x inf is NaN: what it must not see has poisoned
/// it. Its own keys alone, summed in the same order, give what a finite value would have left in place. s: [rows][128].
template <typename Products>
static void redo_poisoned(const AttentionJob& job, int64_t first, int64_t depth, const float* s,
                          const typename Products::Element* v, float* partial, int64_t padded, float* scratch) {
  using Element = typename Products::Element;
  for (int64_t r = 0; r < job.rows; ++r) {
    const int64_t seen = keys_seen(job.limits[r], first, depth);
    if (seen == 0 || seen == depth || is_finite(partial + r * padded)) continue;
    Element* clean = reinterpret_cast<Element*>(scratch);
    float* packed = scratch + kKeyTile * kPanel;
    const int64_t rest = seen % Products::kStep;  // of a pair whose other half it must not see
    const int64_t whole = (seen - rest) * kPanel;
    for (int64_t i = 0; i < whole; ++i) clean[i] = v[i];
    for (int64_t i = whole; rest > 0 && i < whole + 2 * kPanel; ++i) clean[i] = i % 2 == 0 ? v[i] : Element{0};
    const int64_t own = seen - rest + (rest > 0 ? Products::kStep : 0);
    Products::pack_rows(s + r * kKeyTile, own, 1, packed);
    Products::multiply({1, own, 0, packed, clean, partial + r * padded, padded, false, nullptr, 0});
  }
}

/// exp(s - max) of the keys a row sees, zeros up to `depth`; their maximum and sum.
static inline void softmax_tile(float* s, int64_t seen, int64_t depth, float* m, float* l) {
  vf sum = vzero();
  *m = -__builtin_inff();
  if (seen > 0) {
    *m = row_max(s, seen);
    const vf shift = vset1(*m);
    int64_t j = 0;
    for (; j + kWidth <= seen; j += kWidth) {
      const vf p = vexp(vsub(vload(s + j), shift));
      sum = vadd(sum, p);
      vstore(s + j, p);
    }
    if (j < seen) {
      const vf p = vexp(vsub(vload_n(s + j, seen - j, -__builtin_inff()), shift));
      sum = vadd(sum, p);
      vstore_n(s + j, p, seen - j);
    }
  }
  for (int64_t j = seen; j < depth; ++j) s[j] = 0.0f;
  *l = reduce_add(sum);
}

template <typename Products>
static void attention(const AttentionJob& job) {
  using Element = typename Products::Element;
  constexpr int64_t kStep = Products::kStep;
  const int64_t padded = (job.head_dim + kPanel - 1) / kPanel * kPanel;
  const int64_t dim = (job.head_dim + kStep - 1) / kStep * kStep;
  float* scores = job.scratch;                            // [rows][128]
  float* packed = scores + job.rows * kKeyTile;           // the same, packed for the second product
  float* partial = packed + job.rows * kKeyTile;          // [rows][padded]
  float* tile_m = partial + job.rows * padded;            // [rows]
  float* tile_l = tile_m + job.rows;                      // [rows]
  float* clean = tile_l + job.rows;                       // for redo_poisoned
  float* widened = clean + kKeyTile * kPanel + kKeyTile;  // a panel of int8 keys or values
  const bool is_int8 = job.k_scale != nullptr;
  // Elements [offset, offset + count) of keys or values.
  const auto panel_of = [&](const void* all, int64_t offset, int64_t count) {
    if constexpr (kStep == 2) {
      if (is_int8) {
        uint16_t* to = reinterpret_cast<uint16_t*>(widened);
        widen_pairs(static_cast<const int8_t*>(all) + offset, count, to);
        return static_cast<const Element*>(to);
      }
    }
    return static_cast<const Element*>(all) + offset;
  };
  for (int64_t tile = job.tile_begin; tile < job.tile_end; ++tile) {
    const int64_t first = tile * kKeyTile;
    int64_t keys = 0;  // seen by any row
    for (int64_t r = 0; r < job.rows; ++r) keys = job.limits[r] - first > keys ? job.limits[r] - first : keys;
    keys = keys < kKeyTile ? keys : kKeyTile;
    if (keys <= 0) return;
    const int64_t depth = (keys + kStep - 1) / kStep * kStep;

    for (int64_t key = 0; key < keys; key += kPanel) {
      const Element* k = panel_of(job.k, (first + key) * dim, kPanel * dim);
      Products::multiply({job.rows, dim, 0, job.q, k, scores + key, kKeyTile, false, nullptr, 0});
      if (!is_int8) continue;
      for (int64_t i = 0; i < kPanel; i += kWidth) {
        const vf scale = vload(job.k_scale + first + key + i);
        for (int64_t r = 0; r < job.rows; ++r) {
          float* s = scores + r * kKeyTile + key + i;
          vstore(s, vmul(vload(s), scale));
        }
      }
    }

    for (int64_t row = 0; row < job.rows; row += kTileRows) {
      const int64_t height = job.rows - row < kTileRows ? job.rows - row : kTileRows;
      for (int64_t r = 0; r < height; ++r) {
        float* s = scores + (row + r) * kKeyTile;
        const int64_t seen = keys_seen(job.limits[row + r], first, keys);
        softmax_tile(s, seen, depth, tile_m + row + r, tile_l + row + r);
        for (int64_t j = 0; is_int8 && j < seen; ++j) s[j] *= job.v_scale[first + j];
      }
      Products::pack_rows(scores + row * kKeyTile, depth, height, packed + row * kKeyTile);
    }

    for (int64_t column = 0; column < padded; column += kPanel) {
      const int64_t offset = column / kPanel * job.v_panel_stride + first * kPanel;
      const Element* v = panel_of(job.v, offset, kPanel * depth);
      for (int64_t row = 0; row < job.rows; row += kTileRows) {
        const int64_t height = job.rows - row < kTileRows ? job.rows - row : kTileRows;
        Products::multiply(
            {height, depth, 0, packed + row * kKeyTile, v, partial + row * padded + column, padded, false, nullptr, 0});
      }
      if (!is_int8) redo_poisoned<Products>(job, first, depth, scores, v, partial + column, padded, clean);
    }
    attention_merge(job.rows, padded, job.o, job.m, job.l, partial, tile_m, tile_l);
  }
}

static constexpr AttentionKernel kAttentionF32 = {kTileRows, 1, 4, pack_f32, attention<ProductsF32>};
static constexpr AttentionKernel kAttentionBf16Exact = {kTileRows, 2, 4, pack_f32, attention<ProductsBf16Exact>};

}  // namespace llama_ext::LLAMA_EXT_ISA_NAMESPACE
