// What a tier exports: one table of plain functions. Kernels assume checked arguments and never throw or allocate.
#pragma once

#include <cstddef>
#include <cstdint>

namespace llama_ext {

/// Columns of a weight panel, the unit all layouts share (panels.h).
inline constexpr int64_t kPanel = 32;

/// Keys of an attention tile; tiles start at absolute multiples.
inline constexpr int64_t kKeyTile = 128;

/// Some rows of packed activations against a block of one panel:
/// c[r][0..32) (+)= sum over k in [0, depth) of x[r][k] * panel[k][0..32)
struct PanelProduct {
  int64_t rows;
  int64_t depth;  // even for bf16, a multiple of 32 for AMX
  const void* a;  // the block's tiles, one after another (GemmKernel::pack)
  const void* b;  // the block's first row of the panel
  float* c;
  int64_t ldc;
  bool accumulate;
  const void* next;  // what will be read after this, or nullptr: fetched into the L2 cache meanwhile
  int64_t next_bytes;
};

/// One way to multiply activations by panels of weights. For each block of k, activations are packed by `pack` into tiles of
/// `tile_rows` rows (the last may be smaller) that follow each other, so that a pass over the rows is one stream.
struct GemmKernel {
  int64_t tile_rows;
  int64_t element_size;  // of packed activations, bytes
  // Blocking, for many rows: the activations' block of k (rows x k_block) and the sums of a group of panels share the L2 cache.
  int64_t k_block;
  int64_t group_panels;

  /// rows <= tile_rows rows of x, each `stride` floats apart, k columns, zeros up to `depth`, into one tile.
  void (*pack)(const float* x, int64_t stride, int64_t rows, int64_t k, int64_t depth, void* tile);
  void (*panel)(const PanelProduct& product);
};

enum class EpilogueKind : uint8_t { kStore, kAdd, kSwiGlu };

/// What becomes of a finished block of 32 columns: y = c + bias, y += c + bias, or y = silu(c[0..16) + b) * (c[16..32) + b).
struct Epilogue {
  EpilogueKind kind;
  const float* bias;  // of this panel, or nullptr
  float* y;           // first row, first column of this panel's output
  int64_t ldy;
  int64_t columns;  // columns of y this panel owns: <= 32, or <= 16 for kSwiGlu
};

/// Rows of queries of one key/value head against a range of key tiles.
struct AttentionJob {
  const void* k;           // this head's keys: [tile of 32][D][32]
  const void* v;           // this head's values: [panel of 32 of D][capacity][32]
  int64_t v_panel_stride;  // elements
  bool is_bf16;
  int64_t head_dim;
  int64_t rows;
  const float* q;         // packed by f32.pack, already scaled
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
  return rows * (2 * kKeyTile + padded + 2) + kPanel * (head_dim > kKeyTile ? head_dim : kKeyTile);
}

struct KernelTable {
  const char* name;
  GemmKernel f32;
  GemmKernel bf16_exact;  // bf16 weights widened, f32 products
  GemmKernel bf16;        // the fastest for bf16 weights: may round activations to bf16
  const char* bf16_note;  // how `bf16` multiplies, for info()

  void (*epilogue)(const Epilogue& epilogue, int64_t rows, const float* c, int64_t ldc);
  void (*attention)(const AttentionJob& job);
  /// Folds a later partial result into (o, m, l): the same arithmetic as between the tiles of one job.
  void (*attention_merge)(int64_t rows, int64_t padded_dim, float* o, float* m, float* l, const float* o2,
                          const float* m2, const float* l2);
  void (*rms_norm)(const float* x, const float* weight, int64_t size, float eps, float* y, float* inv_rms);
  void (*rope)(float* x, int64_t half, const float* cos, const float* sin);
  void (*softmax)(const float* x, int64_t size, float* y);
  /// log(sum(exp(x))); NaN when there is one, or +inf.
  double (*log_sum_exp)(const float* x, int64_t size);
};

}  // namespace llama_ext
