// Attention of a block of query rows (tokens x the heads that share one key/value head) against tiles of 128 keys.
//
// Per tile: scores = Q K^T by the float32 product (keys lie in panels of 32 columns), softmax of the tile alone, its weighted
// values = P V by the same product, then a merge into the running (o, m, l). A tile's partial result depends on the row and the
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

/// A row that does not see all keys of the tile gave the others weight 0, but 0 x inf is NaN: what it must not see has poisoned
/// it. Its own keys alone, summed in the same order, give what a finite value would have left in place.
static void redo_poisoned(const AttentionJob& job, int64_t first, int64_t keys, const float* scores, const float* v,
                          float* partial, int64_t padded) {
  for (int64_t r = 0; r < job.rows; ++r) {
    const int64_t seen = keys_seen(job.limits[r], first, keys);
    if (seen == 0 || seen == keys || is_finite(partial + r * padded)) continue;
    panel<PanelF32>({1, seen, 0, scores + r * kKeyTile, v, partial + r * padded, padded, false, nullptr, 0});
  }
}

static inline void widen(const uint16_t* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; i += kPanel) {
    for (int64_t j = 0; j < kPanel; j += kWidth) vstore(to + i + j, vload_bf16(from + i + j));
  }
}

static void attention(const AttentionJob& job) {
  const int64_t padded = (job.head_dim + kPanel - 1) / kPanel * kPanel;
  float* scores = job.scratch;                    // [rows][128]
  float* packed = scores + job.rows * kKeyTile;   // the same, packed for the second product
  float* partial = packed + job.rows * kKeyTile;  // [rows][padded]
  float* tile_m = partial + job.rows * padded;    // [rows]
  float* tile_l = tile_m + job.rows;              // [rows]
  float* widened = tile_l + job.rows;             // a panel of bf16 keys or values as float32
  for (int64_t tile = job.tile_begin; tile < job.tile_end; ++tile) {
    const int64_t first = tile * kKeyTile;
    int64_t keys = 0;  // seen by any row
    for (int64_t r = 0; r < job.rows; ++r) keys = job.limits[r] - first > keys ? job.limits[r] - first : keys;
    keys = keys < kKeyTile ? keys : kKeyTile;
    if (keys <= 0) return;

    for (int64_t key = 0; key < keys; key += kPanel) {
      const int64_t offset = (first + key) * job.head_dim;
      const float* k = static_cast<const float*>(job.k) + offset;
      if (job.is_bf16) {
        widen(static_cast<const uint16_t*>(job.k) + offset, kPanel * job.head_dim, widened);
        k = widened;
      }
      panel<PanelF32>({job.rows, job.head_dim, 0, job.q, k, scores + key, kKeyTile, false, nullptr, 0});
    }

    for (int64_t row = 0; row < job.rows; row += kTileRows) {
      const int64_t height = job.rows - row < kTileRows ? job.rows - row : kTileRows;
      float* to = packed + row * keys;
      for (int64_t r = 0; r < height; ++r) {
        float* s = scores + (row + r) * kKeyTile;
        const int64_t seen = keys_seen(job.limits[row + r], first, keys);
        vf sum = vzero();
        if (seen > 0) {
          const float top = row_max(s, seen);
          const vf shift = vset1(top);
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
          tile_m[row + r] = top;
        } else {
          tile_m[row + r] = -__builtin_inff();
        }
        tile_l[row + r] = reduce_add(sum);
        for (int64_t j = 0; j < seen; ++j) to[j * height + r] = s[j];
        for (int64_t j = seen; j < keys; ++j) to[j * height + r] = 0.0f;
      }
    }

    for (int64_t column = 0; column < padded; column += kPanel) {
      const int64_t offset = column / kPanel * job.v_panel_stride + first * kPanel;
      const float* v = static_cast<const float*>(job.v) + offset;
      if (job.is_bf16) {
        widen(static_cast<const uint16_t*>(job.v) + offset, kPanel * keys, widened);
        v = widened;
      }
      panel<PanelF32>({job.rows, keys, 0, packed, v, partial + column, padded, false, nullptr, 0});
      redo_poisoned(job, first, keys, scores, v, partial + column, padded);
    }
    attention_merge(job.rows, padded, job.o, job.m, job.l, partial, tile_m, tile_l);
  }
}

}  // namespace llama_ext::LLAMA_EXT_ISA_NAMESPACE
