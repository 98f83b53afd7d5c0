// The part of a tier's table that only training uses: layouts of products' operands, gradients of rows, steps of optimisers.
#pragma once

#include <cstdint>

namespace llama_ext {

/// Which elements of a row dropout keeps (ops/dropout.h): element j has index `index + j`, of which only the low half may wrap.
struct DropoutRow {
  uint64_t seed = 0;
  uint64_t index = 0;
  uint32_t threshold = 0;  // 0: all are kept
  float factor = 1.0f;     // of what is kept
};

/// Constants of a step (ops/optimizer.h), rounded once from float64.
struct AdamStep {
  float gradient_scale;
  float beta1;
  float beta1_rest;  // 1 - beta1
  float beta2;
  float beta2_rest;
  float step_size;     // lr / (1 - beta1^step)
  float second_scale;  // 1 / (1 - beta2^step)
  float eps;
  float parameter_decay;  // lr decay, decoupled
  float gradient_decay;   // decay, not decoupled
};

struct SgdStep {
  float gradient_scale;
  float lr;
  float momentum;
  float decay;
  bool nesterov;
};

/// One row of attention's softmax: scores of the keys it sees become exp(scale s - max), dropped ones and those up to `depth`
/// zero. Gives log(sum(exp(scale s))) and returns what the weighted sum of values is to be multiplied by.
struct SoftmaxRow {
  float* s;
  int64_t seen;
  int64_t depth;
  float scale;
  DropoutRow dropout;
  float* log_sum;
};

/// Its gradient: s becomes ds = scale p (drop(dp) - delta), dp becomes drop(p), both zero from `seen` up to `depth`.
struct SoftmaxGradientRow {
  float* s;
  float* dp;
  int64_t seen;
  int64_t depth;
  float scale;
  float log_sum;
  float delta;
  DropoutRow dropout;
};

struct RmsNormGradientRow {
  const float* x;
  const float* weight;
  const float* d_y;
  int64_t size;
  float eps;
  float* d_x;
  bool accumulate;
  float* d_weight;  // a sum to add to, or nullptr
};

struct TrainingKernels {
  /// to[c][r] = from[r][c]; rows of both are as far apart as the strides say.
  void (*transpose)(const float* from, int64_t from_stride, int64_t rows, int64_t columns, float* to,
                    int64_t to_stride);
  /// The transpose of x (rows, columns), packed as GemmKernel::pack packs activations for the float32 product: tiles of up to
  /// tile_rows columns, each [rows][columns of the tile].
  void (*pack_columns)(const float* x, int64_t stride, int64_t rows, int64_t columns, float* tiles);
  /// x (rows, columns), columns <= 32, as a panel [rows][32] with zeros.
  void (*pack_panel)(const float* x, int64_t stride, int64_t rows, int64_t columns, float* panel);
  /// A panel [rows][32] rounded to pairs of bf16, [depth / 2][32][2], with zeros up to `depth`, which is even.
  void (*round_panel)(const float* panel, int64_t rows, int64_t depth, uint16_t* pairs);
  /// Panels as float32, [depth][32]. Pairs: depth is even.
  void (*widen_f16)(const uint16_t* panel, int64_t depth, float* out);
  void (*widen_bf16)(const uint16_t* panel, int64_t depth, float* out);
  /// k in [first, first + depth) of a quantised panel, in the order of kCodeFormats; both multiples of 32.
  void (*widen_codes[9])(const uint8_t* panel, int64_t first, int64_t depth, int64_t group, float* out);

  void (*rope_inverse)(float* x, int64_t half, const float* cos, const float* sin);
  void (*swiglu)(const float* gate, const float* up, int64_t size, float* y);
  /// y may be nullptr.
  void (*swiglu_backward)(const float* gate, const float* up, const float* d_y, int64_t size, float* d_gate,
                          float* d_up, float* y);
  void (*rms_norm_backward)(const RmsNormGradientRow& row);
  /// logits <- scale softmax(logits); returns log(sum(exp(logits))), the same bits as KernelTable::log_sum_exp.
  double (*softmax_gradient)(float* logits, int64_t size, double scale);
  /// y (+)= what dropout leaves of x.
  void (*dropout)(const float* x, int64_t size, const DropoutRow& dropout, bool accumulate, float* y);
  float (*attention_softmax)(const SoftmaxRow& row);
  void (*attention_gradient)(const SoftmaxGradientRow& row);
  float (*dot)(const float* a, const float* b, int64_t size);
  /// y = factor x
  void (*scale)(const float* x, int64_t size, float factor, float* y);
  /// y += x
  void (*add)(const float* x, int64_t size, float* y);
  /// sums[c] += the sum of x[r][c], in the order of rows.
  void (*add_rows)(const float* x, int64_t stride, int64_t rows, int64_t columns, float* sums);

  void (*adam)(const AdamStep& step, int64_t size, float* parameter, const float* gradient, float* first,
               float* second);
  /// velocity may be nullptr.
  void (*sgd)(const SgdStep& step, int64_t size, float* parameter, const float* gradient, float* velocity);
  double (*sum_of_squares)(const float* x, int64_t size);
};

}  // namespace llama_ext
