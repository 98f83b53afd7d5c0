// Operations of training.
#include <cmath>
#include <vector>

#include "cuda/cuda_backend_internal.h"
#include "cuda/device_views.h"
#include "cuda/rounded_products.h"

namespace llama_ext::cuda {
namespace {

std::vector<TokenRange> ranges_of(const std::vector<RowRange>& sequences) {
  std::vector<TokenRange> ranges;
  for (const RowRange& each : sequences) {
    if (each.tokens > 0) ranges.push_back({each.row, each.tokens});
  }
  return ranges;
}

/// What both directions share.
template <typename Args>
CausalView view_of(const Args& args) {
  CausalView view;
  view.q = rows_of(args.q);
  view.k = rows_of(args.k);
  view.v = rows_of(args.v);
  view.y = rows_of(args.y);
  view.log_sums = optional_data(args.log_sums);
  view.heads = static_cast<int>(args.q.dim(1));
  view.kv_heads = static_cast<int>(args.k.dim(1));
  view.head_dim = static_cast<int>(args.q.dim(2));
  view.scale = static_cast<float>(args.scale);
  view.threshold = args.dropout == 0.0 ? 0u : dropout_threshold(args.dropout);
  view.kept_scale = static_cast<float>(1.0 / (1.0 - args.dropout));
  view.seed = args.seed;
  return view;
}

}  // namespace

void CudaBackend::cross_entropy_backward(const CrossEntropyBackwardArgs& args) {
  const OpRange range("cross_entropy_backward");
  check(args);
  cuda::cross_entropy(*gpu_, rows_of(args.logits), args.logits.rows(), args.logits.dim(1),
                      static_cast<const int32_t*>(args.labels.data()), optional_data(args.losses), nullptr,
                      &args.scale);
}

void CudaBackend::causal_attention(const CausalAttentionArgs& args) {
  const OpRange range("causal_attention");
  check(args);
  const std::vector<TokenRange> ranges = ranges_of(args.sequences);
  const CausalView view = view_of(args);
  const auto count = static_cast<int64_t>(ranges.size());
  if (args.compute != Compute::kExact && has_causal_attention_mma(view.heads, view.head_dim)) {
    return causal_attention_mma(*gpu_, view, ranges.data(), count, args.q.rows());
  }
  cuda::causal_attention(*gpu_, view, ranges.data(), count);
}

void CudaBackend::causal_attention_backward(const CausalAttentionBackwardArgs& args) {
  const OpRange range("causal_attention_backward");
  check(args);
  const std::vector<TokenRange> ranges = ranges_of(args.sequences);
  CausalView view = view_of(args);
  view.d_y = rows_of(args.d_y);
  view.d_q = rows_of(args.d_q);
  view.d_k = rows_of(args.d_k);
  view.d_v = rows_of(args.d_v);
  const bool rounds = args.compute != Compute::kExact && has_causal_attention_mma(view.heads, view.head_dim);
  const auto run = rounds ? &cuda::causal_attention_backward_mma : &cuda::causal_attention_backward;
  run(*gpu_, view, ranges.data(), static_cast<int64_t>(ranges.size()), args.q.rows());
}

void CudaBackend::embedding_backward(const EmbeddingBackwardArgs& args) {
  const OpRange range("embedding_backward");
  check(args);
  cuda::embedding_backward(*gpu_, own(*args.d_table, "embedding_backward").view(),
                           static_cast<const int32_t*>(args.ids.data()), args.ids.rows(), rows_of(args.d_y));
}

void CudaBackend::matmul_backward(const MatmulBackwardArgs& args) {
  const OpRange range("matmul_backward");
  check(args);
  const Rows d_y = rows_of(args.d_y);
  const int64_t rows = args.d_y.rows();
  const int64_t outputs = args.d_y.dim(1);
  // Products that round what they multiply; those with float16 weights are float32, as on the CPU.
  ProductGradients rounded;
  rounded.d_y = d_y;
  rounded.rows = rows;
  rounded.width = outputs;
  const bool has_numbers = rows > 0 && outputs > 0;
  if (args.d_x) {
    const WeightView& weight = own(*args.weight, "matmul_backward").view();
    const bool is_bf16_or_codes = weight.kind == Kind::kBF16 || is_quantized(weight.kind);
    if (has_numbers && weight.cols > 0 &&
        (rounds_weights(weight, args.compute) || (is_bf16_or_codes && args.compute != Compute::kExact))) {
      rounded.weight = &weight;
      rounded.d_x = rows_of(args.d_x);
      rounded.accumulate = args.accumulate;
    } else {
      matmul_backward_x(*gpu_, d_y, rows, weight, rows_of(args.d_x), args.accumulate);
    }
  }
  if (args.d_weight != nullptr && has_numbers) {
    const WeightView& d_weight = own(*args.d_weight, "matmul_backward").view();
    if (rounds_weights(d_weight, args.compute)) {
      rounded.d_weight = &d_weight;
      rounded.x = rows_of(args.x);
    } else {
      matmul_backward_weight(*gpu_, d_y, rows, rows_of(args.x), d_weight);
    }
  }
  if (rounded.weight != nullptr || rounded.d_weight != nullptr) rounded_gradients(*gpu_, rounded);
  if (args.d_bias && rows > 0) add_column_sums(*gpu_, d_y, rows, outputs, device_data(args.d_bias));
}

void CudaBackend::rms_norm_backward(const RmsNormBackwardArgs& args) {
  const OpRange range("rms_norm_backward");
  check(args);
  NormGradients gradients;
  gradients.x = rows_of(args.x);
  gradients.norm = {optional_data(args.weight), static_cast<float>(args.eps)};
  gradients.d_y = rows_of(args.d_y);
  gradients.d_x = rows_of(args.d_x);
  gradients.accumulate = args.accumulate;
  gradients.d_weight = optional_data(args.d_weight);
  cuda::rms_norm_backward(*gpu_, gradients, args.x.rows(), static_cast<int>(args.x.dim(1)));
}

void CudaBackend::swiglu_backward(const SwigluBackwardArgs& args) {
  const OpRange range("swiglu_backward");
  check(args);
  cuda::swiglu_backward(*gpu_,
                        {rows_of(args.gate), rows_of(args.up), rows_of(args.d_y), rows_of(args.d_gate),
                         rows_of(args.d_up), rows_of(args.y)},
                        args.gate.rows(), args.gate.dim(1));
}

void CudaBackend::adam(const AdamArgs& args) {
  const OpRange range("adam");
  check(args);
  const auto rounded = [](double value) { return static_cast<float>(value); };
  const double steps = static_cast<double>(args.step);
  const AdamView step{rounded(args.gradient_scale),
                      args.decoupled ? 0.0f : rounded(args.decay),
                      args.decoupled ? rounded(args.lr * args.decay) : 0.0f,
                      rounded(args.beta1),
                      rounded(1.0 - args.beta1),
                      rounded(args.beta2),
                      rounded(1.0 - args.beta2),
                      rounded(args.lr / (1.0 - std::pow(args.beta1, steps))),
                      rounded(1.0 / (1.0 - std::pow(args.beta2, steps))),
                      rounded(args.eps)};
  cuda::adam(*gpu_, step, args.parameter.size(), optional_data(args.parameter), optional_data(args.gradient),
             optional_data(args.first), optional_data(args.second));
}

void CudaBackend::sgd(const SgdArgs& args) {
  const OpRange range("sgd");
  check(args);
  const SgdView step{static_cast<float>(args.gradient_scale), static_cast<float>(args.lr),
                     static_cast<float>(args.momentum), static_cast<float>(args.decay), args.nesterov};
  cuda::sgd(*gpu_, step, args.parameter.size(), optional_data(args.parameter), optional_data(args.gradient),
            optional_data(args.velocity));
}

double CudaBackend::sum_of_all_squares(std::span<const TensorView> tensors) {
  const OpRange range("sum_of_all_squares");
  const Scratch memory(*gpu_, tensors.size() * sizeof(double));
  auto* totals = memory.as<double>();
  for (size_t i = 0; i < tensors.size(); ++i) {
    cuda::sum_of_squares(*gpu_, optional_data(tensors[i]), tensors[i].size(), totals + i);
  }
  std::vector<double> found(tensors.size());
  gpu_->copy_to_host(found.data(), totals, found.size() * sizeof(double));
  gpu_->synchronize();
  double sum = 0.0;
  for (const double each : found) sum += each;
  return sum;
}

}  // namespace llama_ext::cuda
