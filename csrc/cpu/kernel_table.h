// What a tier exports: one table of plain functions. Kernels assume checked arguments and never throw or allocate.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/training_kernels.h"
#include "ops/logits_loops.h"
#include "quant/rounding.h"

namespace llama_ext {

/// Columns of a weight panel, the unit all layouts share (panels.h).
inline constexpr int64_t kPanel = 32;

/// Keys of an attention tile; tiles start at absolute multiples.
inline constexpr int64_t kKeyTile = 128;

/// Codes are packed by strips of 32 k; activations are rounded to int8 with one scale for 128 k of a row.
inline constexpr int64_t kStrip = 32;
inline constexpr int64_t kActivationBlock = 128;

/// How a panel of quantised weights lies in memory: units of k, one after another, each
///   one float16 per column: scale (with superblocks: d), then, with has_min, another: min (d_min)
///   with superblocks, for each group one byte per column: s, then, with has_min, m
///   the unit's strips of 32 k: for pairs of four k [4][32 columns][4] nibbles, the first four k in the low ones (8 bits: for
///   four k [8][32][4] bytes); then, with 5 bits, [32][4] bytes whose bit i is the fifth of the i-th four k; with 6 bits,
///   [2][32][4] bytes of such pairs of bits.
struct CodeFormat {
  int bits;
  int zero;
  bool has_min;
  bool has_superblocks;
  int group;  // 0: the matrix says

  constexpr int64_t strip_bytes() const { return 4 * kStrip * bits; }
  constexpr int64_t unit(int64_t matrix_group) const { return has_superblocks ? 256 : matrix_group; }
  constexpr int64_t smallest_group() const { return group > 0 ? group : kStrip; }
  constexpr int64_t groups_of_unit(int64_t matrix_group) const {
    return has_superblocks ? unit(matrix_group) / group : 1;
  }
  constexpr int64_t halves_bytes() const { return 2 * kPanel * (has_min ? 2 : 1); }
  constexpr int64_t sub_bytes() const { return has_superblocks ? kPanel * (256 / group) : 0; }
  constexpr int64_t header_bytes() const { return halves_bytes() + sub_bytes() * (has_min ? 2 : 1); }
  constexpr int64_t unit_bytes(int64_t matrix_group) const {
    return header_bytes() + unit(matrix_group) / kStrip * strip_bytes();
  }
};

/// In the order of Encoding (quant/weight_type.h), from int8 on.
inline constexpr int kCodeFormatCount = 9;
inline constexpr CodeFormat kCodeFormats[kCodeFormatCount] = {
    {8, 128, false, false, 0}, {8, 0, true, false, 0},  {5, 16, false, false, 0},
    {5, 0, true, false, 0},    {4, 8, false, false, 0}, {4, 0, true, false, 0},
    {4, 0, true, true, 32},    {5, 0, true, true, 32},  {6, 32, false, true, 16},
};

/// Some rows of packed activations against a block of one panel:
/// c[r][0..32) (+)= sum over k in [0, depth) of x[r][k] * panel[k][0..32)
struct PanelProduct {
  int64_t rows;
  int64_t depth;  // even for bf16, a multiple of 32 for AMX, of the unit for codes
  int64_t group;  // of quantised weights: k that share a scale
  const void* a;  // the block's tiles, one after another (GemmKernel::pack)
  const void* b;  // the block's first row of the panel
  float* c;
  int64_t ldc;
  bool accumulate;
  const void* next;  // what will be read after this, or nullptr: fetched into a cache meanwhile
  int64_t next_bytes;
  int64_t stride = 0;     // of panel_in_place: a is the first of rows of float32, so many floats apart
  int64_t tile_rows = 0;  // rows of `a`'s tiles; 0: the kernel's
  // Weights come from memory: tiles ask for `next`, or else the only one for the panel itself, while they multiply.
  bool streams = false;
};

/// Rows of activations to pack into one tile.
struct PackJob {
  const float* x;  // each row `stride` floats apart
  int64_t stride;
  int64_t rows;   // of the tile
  int64_t k;      // columns
  int64_t depth;  // with zeros up to here
  int64_t group;  // as in PanelProduct
  void* tile;
};

/// One way to multiply activations by panels of weights. For each block of k, activations are packed by `pack` into tiles that follow each
/// other, so that a pass over the rows is one stream. Tiles have `tile_rows` rows, and the last one fewer; where the kernel can stream, all may
/// have fewer; a tile that is the only one may have up to rows_of_one_tile.
struct GemmKernel {
  int64_t tile_rows;
  // Blocking, for many rows: the activations' block of k (rows x k_block) and the sums of a group of panels share the L2 cache.
  int64_t k_block;
  int64_t group_panels;

  /// Bytes that `depth` columns of one row take in a tile.
  int64_t (*packed_bytes)(int64_t depth, int64_t group);
  void (*pack)(const PackJob& job);
  void (*panel)(const PanelProduct& product);
  int64_t rows_of_one_tile = 0;   // if more than tile_rows
  int64_t rows_without_next = 4;  // so few ask for their own panel, and need not be told what is next
  bool can_stream = false;        // knows PanelProduct::streams, and tiles of any height
  void (*panel_in_place)(const PanelProduct& product) = nullptr;  // with activations that are not packed, if it can
};

enum class EpilogueKind : uint8_t { kStore, kAdd, kSiluGate, kSwiGlu };

/// What becomes of a finished block of 32 columns: y = c + bias, y += c + bias, y = silu(y) * (c + bias), or
/// y = silu(c[0..16) + b) * (c[16..32) + b).
struct Epilogue {
  EpilogueKind kind;
  const float* bias;  // of this panel, or nullptr
  float* y;           // first row, first column of this panel's output
  int64_t ldy;
  int64_t columns;  // columns of y this panel owns: <= 32, or <= 16 for kSwiGlu
};

/// Rows of queries of one key/value head against a range of key tiles. Element: float, or pairs of bf16 or int8, which lie as
/// PanelKvCache says (panels.h).
struct AttentionJob {
  const void* k;           // this head's keys: [tile of 32][D][32]
  const void* v;           // this head's values: [panel of 32 of D][capacity][32]
  int64_t v_panel_stride;  // elements
  const float* k_scale;    // int8: per position; else nullptr
  const float* v_scale;
  int64_t head_dim;
  int64_t rows;
  const void* q;          // scaled, and packed as AttentionKernel says
  const int64_t* limits;  // per row: how many keys it sees
  int64_t tile_begin;     // in units of kKeyTile
  int64_t tile_end;
  float* o;        // [rows][round_up(D, 32)]: the running weighted sum of values
  float* m;        // [rows]: the running maximum
  float* l;        // [rows]: the running sum of exponentials
  float* scratch;  // attention_scratch(rows, D) floats
};

/// Floats of scratch an AttentionJob needs.
constexpr int64_t attention_scratch(int64_t rows, int64_t head_dim) {
  const int64_t padded = (head_dim + kPanel - 1) / kPanel * kPanel;
  const int64_t widened = kPanel * (head_dim >= kKeyTile ? head_dim + 1 : kKeyTile);
  return rows * (2 * kKeyTile + padded + 2) + widened + kKeyTile * kPanel + kKeyTile;
}

/// One arithmetic of attention.
struct AttentionKernel {
  int64_t tile_rows;
  int64_t depth_multiple;            // q is packed with a depth that is a multiple of it
  int64_t q_bytes;                   // of an element of it
  void (*pack)(const PackJob& job);  // of q
  void (*run)(const AttentionJob& job);
};

struct KernelTable {
  const char* name;
  GemmKernel f32;
  GemmKernel bf16_exact;                     // bf16 weights widened, f32 products
  GemmKernel bf16;                           // the fastest for bf16 weights: may round activations to bf16
  GemmKernel f16;                            // f16 weights widened, f32 products
  GemmKernel codes[kCodeFormatCount];        // the fastest for quantised weights: may round activations to int8
  GemmKernel codes_exact[kCodeFormatCount];  // quantised weights widened, f32 products
  const char* bf16_note;                     // how `bf16` multiplies, for info()
  const char* codes_note;                    // how `codes` multiply

  void (*epilogue)(const Epilogue& epilogue, int64_t rows, const float* c, int64_t ldc);
  AttentionKernel attention_f32;
  AttentionKernel attention_bf16_exact;  // keys and values bf16 or int8, float32 products
  AttentionKernel attention_bf16;        // the fastest for those: may round q and the softmax's weights to bf16
  /// Folds a later partial result into (o, m, l): the same arithmetic as between the tiles of one job.
  void (*attention_merge)(int64_t rows, int64_t padded_dim, float* o, float* m, float* l, const float* o2,
                          const float* m2, const float* l2);
  /// y = x * factor
  void (*multiply_row)(const float* x, int64_t size, float factor, float* y);
  /// y = x / divisor
  void (*divide_row)(const float* x, int64_t size, float divisor, float* y);
  void (*rms_norm)(const float* x, const float* weight, int64_t size, float eps, float* y, float* inv_rms);
  void (*rope)(float* x, int64_t half, const float* cos, const float* sin);
  void (*softmax)(const float* x, int64_t size, float* y);
  /// log(sum(exp(x))); NaN when there is one, or +inf.
  double (*log_sum_exp)(const float* x, int64_t size);
  RoundingLoops rounding;
  LogitsLoops logits;
  TrainingKernels training;
};

}  // namespace llama_ext
