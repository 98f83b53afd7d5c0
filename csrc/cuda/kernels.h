// What the .cu files offer: one function per kernel family, on plain pointers into the GPU's memory. Arguments have been checked.
#pragma once

#include <cstdint>

#include "cuda/kv_layout.h"
#include "cuda/runtime.h"
#include "cuda/weight_layout.h"
#include "ops/sample_next.h"

namespace llama_ext::cuda {

/// Rows of float32 numbers.
struct Rows {
  float* data = nullptr;
  int64_t stride = 0;

  __host__ __device__ float* row(int64_t index) const { return data + index * stride; }
};

/// What a product applies to its rows first; none: null.
struct NormView {
  const float* weight = nullptr;
  float eps = 0.0f;
};

// rms_norm.cu. inverse_rms: (rows) or null.
void rms_norm(const Gpu& gpu, Rows x, int64_t rows, int width, NormView norm, Rows y, float* inverse_rms);

// rope.cu
void rope(const Gpu& gpu, Rows x, int64_t tokens, int heads, int head_dim, const float* cosines, const float* sines,
          bool inverse);

// prepare_rows.cu: rows as the tensor cores take them, normalised where there is a norm and rounded to bfloat16, or to float16 where there
// are row_scales, which then undo what fits a row into that range. y: at 8 bytes; stride: elements, a multiple of 4, zeros beyond width.
void prepare_rows(const Gpu& gpu, Rows x, int64_t rows, int width, int stride, NormView norm, uint16_t* y,
                  float* row_scales);

// round_operands.cu: operands of the tensor cores' products. x: float32. Numbers beyond an operand's are zeros, up to its stride, a
// multiple of 8.
struct RoundedOperand {
  uint16_t* data = nullptr;  // or null
  int64_t stride = 0;
};
void round_rows(const Gpu& gpu, Rows x, int64_t rows, int64_t width, RoundedOperand y);
/// across: (width, rows), the transposed numbers; along: (rows, width), from the same reading.
void round_transposed(const Gpu& gpu, Rows x, int64_t rows, int64_t width, RoundedOperand across, RoundedOperand along);
/// weight: float32 or bfloat16, whose transposed numbers are (weight.cols, weight.rows).
void round_transposed(const Gpu& gpu, const WeightView& weight, RoundedOperand across);
/// Rows [first, first + count) of codes: (count, weight.cols), each scale (code - zero) + min, rounded to float32 and then to bfloat16.
/// y.stride: weight.stride at most.
void unpack_rows(const Gpu& gpu, const WeightView& weight, int64_t first, int64_t count, RoundedOperand y);
/// Columns [first, first + count) of the same numbers, `first` a multiple of 8: (count, weight.rows).
void unpack_transposed(const Gpu& gpu, const WeightView& weight, int64_t first, int64_t count, RoundedOperand across);

// transpose.cu: y (width, rows) = x (rows, width) transposed.
void transpose(const Gpu& gpu, Rows x, int64_t rows, int64_t width, Rows y);

// softmax.cu
void softmax(const Gpu& gpu, Rows x, int64_t rows, int64_t width, Rows y);

// cross_entropy.cu. labels: host memory. hits: (rows) or null. With `scale` not null the logits become gradients.
void cross_entropy(const Gpu& gpu, Rows logits, int64_t rows, int64_t width, const int32_t* labels, float* losses,
                   float* hits, const double* scale);

// swiglu.cu. gates of a row: at gate + (f / group) * group_stride + f % group, and so for up.
struct GatePlaces {
  int group;
  int group_stride;
};
void swiglu(const Gpu& gpu, Rows gate, Rows up, GatePlaces places, int64_t rows, int width, Rows y);

/// Rows of bfloat16 numbers as the next product on the tensor cores takes them, or some of their columns: `stride` numbers apart, zeros
/// from width to padded.
struct RoundedRows {
  uint16_t* data = nullptr;
  int width = 0;
  int padded = 0;
  int stride = 0;
};
void swiglu_rounded(const Gpu& gpu, Rows gate, Rows up, GatePlaces places, int64_t rows, RoundedRows y);

struct SwigluGradients {
  Rows gate;
  Rows up;
  Rows d_y;
  Rows d_gate;
  Rows d_up;
  Rows y;  // or null
};
void swiglu_backward(const Gpu& gpu, const SwigluGradients& gradients, int64_t rows, int64_t width);

// dropout.cu
struct DropoutView {
  uint64_t seed;
  uint32_t threshold;  // 0 keeps everything
  float scale;         // of what is kept
  bool accumulate;
};
void dropout(const Gpu& gpu, Rows x, Rows y, int64_t rows, int64_t width, DropoutView how);

// embedding.cu. ids: host memory, checked.
void embedding(const Gpu& gpu, const WeightView& table, const int32_t* ids, int64_t count, Rows y);
/// ids: the GPU's memory.
void embedding_of_live(const Gpu& gpu, const WeightView& table, const int32_t* ids, int64_t count, Rows y);
void embedding_backward(const Gpu& gpu, const WeightView& d_table, const int32_t* ids, int64_t count, Rows d_y);

// matmul_rows.cu: a few rows of x.
inline constexpr int64_t kMostVectorRows = 4;
enum class Rounding : uint8_t { kNone, kBF16 };
struct ProductView {
  Rows x;
  int64_t rows = 0;  // M
  WeightView weight;
  NormView norm;
  const float* bias = nullptr;
  Rows y;
  bool accumulate = false;
  Rounding rounding = Rounding::kNone;  // of x, once normalised
  /// Not null: x as prepare_rows gives it for bfloat16, instead of x. For the tensor cores alone.
  const uint16_t* rounded = nullptr;
  /// Rows of the weight are gates and ups in turns of 16 (ops/feed_forward.h): y is silu(gate) up, `width` numbers a row.
  bool is_gate_up = false;
  int width = 0;
};
void matmul_rows(const Gpu& gpu, const ProductView& product);

// matmul_rows_mma.cu: a few rows of x on the tensor cores. x is rounded to bfloat16, or for codes to whole
// numbers of 16 bits.
/// The most rows of x that it takes at a time; 0 where there is none for such weights.
int64_t rows_of_mma(const Gpu& gpu, const WeightView& weight);
inline constexpr int64_t kMostMmaRows = 8;
void matmul_rows_mma(const Gpu& gpu, const ProductView& product);

// matmul_one_row.cu: one row of x and codes that matmul_rows_mma takes, too; the same bits.
/// Whether it takes the product, by the setting (Gpu::streams_one_row) and by the shape.
bool takes_one_row(const Gpu& gpu, const ProductView& product);
void matmul_one_row(const Gpu& gpu, const ProductView& product);

// matmul_tiles.cu: many rows, float32 products. No norm, no rounding, no gates.
void matmul_tiles(const Gpu& gpu, const ProductView& product);

// matmul_mma.cu: many rows, on the tensor cores.
/// The most rows that codes are multiplied with as they are, a tile's; where there are more, their numbers are unpacked first
/// (rounded_products.h). On an H200 64 rows on codes as they are took three times as long as on bfloat16 weights, and unpacking takes half
/// as long as these.
inline constexpr int64_t kMostRowsOfCodes = 32;
struct MmaView {
  const uint16_t* x = nullptr;  // (M, weight.stride), from prepare_rows
  const float* row_scales = nullptr;
  int64_t rows = 0;
  WeightView weight;
  const float* bias = nullptr;
  Rows y;
  bool accumulate = false;
};
/// Whether there is one for such weights; float32 would lose digits.
bool has_mma(Kind kind);
void matmul_mma(const Gpu& gpu, const MmaView& product);

// matmul_wgmma.cu: the same on Hopper's own tensor cores, for which matmul_mma() calls it.
bool has_wgmma(const Gpu& gpu, Kind kind);
void matmul_wgmma(const Gpu& gpu, const MmaView& product);
/// Rows of the weight are gates and ups in turns of 16 (ops/feed_forward.h): hidden = silu(gate) up. y and accumulate are not used.
/// hidden.padded: hidden.width, rounded up to kPad at most.
void gate_up_wgmma(const Gpu& gpu, const MmaView& product, RoundedRows hidden);

// kv_cache.cu
struct KvRowsView {
  Rows k;
  Rows v;
  Rows q;  // or null
  const float* cosines = nullptr;
  const float* sines = nullptr;
  int q_heads = 0;
};
void kv_store(const Gpu& gpu, const KvSegmentView* segments, int64_t count, const KvRowsView& rows);
/// kv_store_rows.cu: the same for many tokens; kv_store() calls it.
void kv_store_rows(const Gpu& gpu, const KvSegmentView* segments, int64_t count, const KvRowsView& rows);
/// Positions [0, length) of a layer of a cache of another capacity.
void kv_copy(const Gpu& gpu, const KvLayerView& to, const KvLayerView& from, int64_t length);
void kv_load(const Gpu& gpu, const KvLayerView& layer, int64_t position, int64_t tokens, float* k, float* v);

// attention.cu
void attention(const Gpu& gpu, const KvSegmentView* segments, int64_t count, Rows q, int heads, float scale, Rows y);

// attention_mma.cu: queries and weights are rounded to bfloat16.
bool has_attention_mma(KvKind kind, int head_dim, int group);
void attention_mma(const Gpu& gpu, const KvSegmentView* segments, int64_t count, Rows q, int heads, float scale,
                   Rows y);

// attention_wgmma.cu: the same bits on Hopper's own tensor cores, for segments of enough tokens; attention_mma() calls it.
bool has_attention_wgmma(const Gpu& gpu, const KvSegmentView& segment, int heads, float scale);
void attention_wgmma(const Gpu& gpu, const KvSegmentView& segment, Rows q, int heads, float scale, Rows y);
/// The same, rounded to bfloat16: what a product of them takes. y: (M, heads D), no padding.
void attention_wgmma_rounded(const Gpu& gpu, const KvSegmentView& segment, Rows q, int heads, float scale,
                             RoundedRows y);

// attention_decode.cu: kv_store and attention of one token a segment, at once. q and k stay as they are, not rotated. Positions and what is
// stored are read early (launch.h): a recording is of one token of different caches, and its last kernel counts positions.
inline constexpr int kMostDecodeHeads = 1024;
bool has_attention_decode(const KvSegmentView* segments, int64_t count, int heads);
/// arrived: kMostSegments kMostDecodeHeads zeros, which are zeros again afterwards.
void attention_decode(const Gpu& gpu, const KvSegmentView* segments, int64_t count, const KvRowsView& rows, Rows q,
                      int heads, float scale, Rows y, int* arrived);

// sample_next.cu: ops/sample_next.h.
struct SampleNextView {
  const float* logits = nullptr;  // (rows, vocabulary)
  int rows = 0;
  int vocabulary = 0;
  int32_t* tokens = nullptr;
  int32_t* positions = nullptr;
  DecodeRow* state = nullptr;
  DecodeResult* results = nullptr;
  int slots = 0;
  const float* bias = nullptr;     // or null
  int32_t* occurrences = nullptr;  // or null
  double temperature = 0.0;
  int64_t top_k = 0;
  double top_p = 1.0;
  double min_p = 0.0;
  double repetition_penalty = 1.0;
  double presence_penalty = 0.0;
  double frequency_penalty = 0.0;
};
void sample_next(const Gpu& gpu, const SampleNextView& view);

// read_probe.cu: bytes a second, from `nbytes` (a multiple of 16) read `rounds` times. Waits for the GPU.
double read_probe(const Gpu& gpu, int64_t nbytes, int rounds);

// Training, in fixed orders of summation.

// rms_norm_backward.cu. d_weight: (width) or null.
struct NormGradients {
  Rows x;
  NormView norm;
  Rows d_y;
  Rows d_x;
  bool accumulate = false;
  float* d_weight = nullptr;
};
void rms_norm_backward(const Gpu& gpu, const NormGradients& gradients, int64_t rows, int width);

// column_sums.cu: sums (width) += the sum of x's rows.
void add_column_sums(const Gpu& gpu, Rows x, int64_t rows, int64_t width, float* sums);

// matmul_backward.cu: d_x = d_y W or d_x += d_y W; d_weight += d_y^T x, with float32 products.
void matmul_backward_x(const Gpu& gpu, Rows d_y, int64_t rows, const WeightView& weight, Rows d_x, bool accumulate);
void matmul_backward_weight(const Gpu& gpu, Rows d_y, int64_t rows, Rows x, const WeightView& d_weight);

// causal_attention.cu. Heads of a token lie one after the other in a row.
struct TokenRange {
  int64_t row;
  int64_t tokens;
};
struct CausalView {
  Rows q;
  Rows k;
  Rows v;
  Rows y;
  float* log_sums = nullptr;  // (M, H)
  Rows d_y;
  Rows d_q;
  Rows d_k;
  Rows d_v;
  int heads = 0;
  int kv_heads = 0;
  int head_dim = 0;
  float scale = 1.0f;
  uint32_t threshold = 0;  // of dropout; 0 keeps everything
  float kept_scale = 1.0f;
  uint64_t seed = 0;
};
void causal_attention(const Gpu& gpu, const CausalView& view, const TokenRange* ranges, int64_t count);
void causal_attention_backward(const Gpu& gpu, const CausalView& view, const TokenRange* ranges, int64_t count,
                               int64_t rows);

// causal_attention_mma.cu, causal_attention_backward_mma.cu: operands are rounded to bfloat16.
bool has_causal_attention_mma(int heads, int head_dim);
void causal_attention_mma(const Gpu& gpu, const CausalView& view, const TokenRange* ranges, int64_t count,
                          int64_t rows);
void causal_attention_backward_mma(const Gpu& gpu, const CausalView& view, const TokenRange* ranges, int64_t count,
                                   int64_t rows);

// optimizer.cu
struct AdamView {
  float gradient_scale;
  float added_decay;      // of Adam
  float parameter_decay;  // lr decay of AdamW
  float beta1;
  float one_less_beta1;
  float beta2;
  float one_less_beta2;
  float step_size;
  float second_scale;
  float eps;
};
void adam(const Gpu& gpu, const AdamView& step, int64_t size, float* parameter, const float* gradient, float* first,
          float* second);
struct SgdView {
  float gradient_scale;
  float lr;
  float momentum;
  float decay;
  bool nesterov;
};
void sgd(const Gpu& gpu, const SgdView& step, int64_t size, float* parameter, const float* gradient, float* velocity);
/// *total, on the GPU: the sum of x^2 in float64.
void sum_of_squares(const Gpu& gpu, const float* x, int64_t size, double* total);

}  // namespace llama_ext::cuda
