// Operations: arguments are checked, views become pointers into the GPU's memory, and kernels are chosen.
#include <cmath>
#include <vector>

#include "cuda/cuda_backend_internal.h"
#include "cuda/device_views.h"
#include "cuda/logits_avx2.h"
#include "cuda/rounded_products.h"

namespace llama_ext::cuda {
namespace {

std::vector<KvSegmentView> segments_of(const std::vector<KvSegment>& segments, int64_t layer, const char* op) {
  std::vector<KvSegmentView> views;
  views.reserve(segments.size());
  for (const KvSegment& segment : segments) {
    if (segment.tokens == 0) continue;
    views.push_back({own(*segment.cache, op).layer(layer), segment.row, segment.tokens, segment.position,
                     live_data(segment.live_position)});
  }
  return views;
}

ProductView product_of(const MatmulArgs& args) {
  ProductView p;
  p.x = rows_of(args.x);
  p.rows = args.x.rows();
  p.weight = own(*args.weight, "matmul").view();
  p.norm = norm_of(args.norm);
  p.bias = optional_data(args.bias);
  p.y = rows_of(args.y);
  p.accumulate = args.accumulate;
  return p;
}

/// Whether a product of many rows takes x rounded to bfloat16.
bool takes_bf16(const WeightView& weight) {
  return has_mma(weight.kind) && weight.kind != Kind::kF16 && weight.stride > 0;
}

/// Columns [first, first + count) of the hidden numbers; the last ones have all of the zeros.
RoundedRows part_of(const RoundedRows& hidden, int64_t first, int64_t count) {
  const int begin = static_cast<int>(first);
  const bool is_last = first + count >= hidden.width;
  RoundedRows part = hidden;
  part.data += first;
  part.width = is_last ? hidden.width - begin : static_cast<int>(count);
  part.padded = is_last ? hidden.padded - begin : static_cast<int>(count);
  return part;
}

/// hidden = silu(gate) up of a product with gates and ups in turns.
void gate_up_rounded(const Gpu& gpu, const MmaView& product, const RoundedRows& hidden) {
  if (has_wgmma(gpu, product.weight.kind) && hidden.padded <= round_up(hidden.width, kPad)) {
    return gate_up_wgmma(gpu, product, hidden);
  }
  const int64_t pitch = product.weight.rows;
  const Scratch products(gpu, static_cast<size_t>(product.rows * pitch) * sizeof(float));
  MmaView stored = product;
  stored.y = {products.as<float>(), pitch};
  matmul_mma(gpu, stored);
  constexpr int kGates = static_cast<int>(kGateGroup);
  swiglu_rounded(gpu, stored.y, {stored.y.data + kGates, pitch}, {kGates, 2 * kGates}, product.rows, hidden);
}

KvRowsView kv_rows_of(const KvStoreArgs& args) {
  KvRowsView rows;
  rows.k = rows_of(args.k);
  rows.v = rows_of(args.v);
  rows.cosines = optional_data(args.cos);
  rows.sines = optional_data(args.sin);
  // Queries are only rotated here.
  if (args.q && args.cos) {
    rows.q = rows_of(args.q);
    rows.q_heads = static_cast<int>(args.q.dim(1));
  }
  return rows;
}

const LogitsLoops& logits_loops() {
  static const LogitsLoops& loops = __builtin_cpu_supports("avx2") ? avx2_logits_loops() : kPlainLogitsLoops;
  return loops;
}

/// The product, of rows that a kernel of its own has normalised.
template <typename Run>
void normalize_first(const Gpu& gpu, ProductView p, const Run& run) {
  const Scratch normed(gpu, static_cast<size_t>(p.rows * p.weight.cols) * sizeof(float));
  const Rows x{normed.as<float>(), p.weight.cols};
  rms_norm(gpu, p.x, p.rows, p.weight.cols, p.norm, x, nullptr);
  p.x = x;
  p.norm = {};
  run(gpu, p);
}

/// Whether matmul_rows() has far more blocks than a GPU has room for, each of which would normalise x again: a head's product has.
bool has_many_blocks(const ProductView& p) { return int64_t{p.weight.rows} > 3 * int64_t{p.weight.cols}; }

}  // namespace

void CudaBackend::embedding(const EmbeddingArgs& args) {
  const OpRange range("embedding");
  check(args);
  const CudaMatrix& table = own(*args.table, "embedding");
  const auto* ids = static_cast<const int32_t*>(args.ids.data());
  if (args.live_ids) return embedding_of_live(*gpu_, table.view(), ids, args.ids.rows(), rows_of(args.y));
  cuda::embedding(*gpu_, table.view(), ids, args.ids.rows(), rows_of(args.y));
}

void CudaBackend::rms_norm(const RmsNormArgs& args) {
  const OpRange range("rms_norm");
  check(args);
  const NormView norm{device_data(args.weight), static_cast<float>(args.eps)};
  cuda::rms_norm(*gpu_, rows_of(args.x), args.x.rows(), static_cast<int>(args.x.dim(1)), norm, rows_of(args.y),
                 optional_data(args.inv_rms));
}

void CudaBackend::rope(const RopeArgs& args) {
  const OpRange range("rope");
  check(args);
  cuda::rope(*gpu_, rows_of(args.x), args.x.rows(), static_cast<int>(args.x.dim(1)), static_cast<int>(args.x.dim(2)),
             device_data(args.cos), device_data(args.sin), args.inverse);
}

/// Whether a product of so many rows is made without tiles, by kernels that take a norm and gates along.
bool CudaBackend::takes_few_rows(const WeightView& weight, int64_t rows, Compute compute) const {
  if (rounds_weights(weight, compute)) return false;
  if (rows <= kMostVectorRows) return true;
  return compute != Compute::kExact && rows <= kMostMmaRows && rows <= rows_of_mma(*gpu_, weight);
}

/// Products of few rows read the weights past the caches and take the norm along; others are made of tiles, on the tensor cores
/// where x may be rounded, and with many rows quantised weights, too.
void CudaBackend::product(const ProductView& view, Compute compute) const {
  ProductView p = view;
  if (p.rows == 0 || p.weight.rows == 0) return;
  // As on the tensor cores, so that x is rounded alike however many rows there are.
  if (p.weight.kind == Kind::kBF16 && compute != Compute::kExact) p.rounding = Rounding::kBF16;
  if (rounds_weights(p.weight, compute)) return rounded_product(*gpu_, p);
  if (takes_few_rows(p.weight, p.rows, compute)) {
    if (compute != Compute::kExact && rows_of_mma(*gpu_, p.weight) > 0) return matmul_rows_mma(*gpu_, p);
    const bool is_apart = p.norm.weight != nullptr && !p.is_gate_up && has_many_blocks(p);
    return is_apart ? normalize_first(*gpu_, p, matmul_rows) : matmul_rows(*gpu_, p);
  }
  if (compute != Compute::kExact && has_mma(p.weight.kind) && p.weight.stride > 0) {
    const bool is_rounded = p.rounded != nullptr;
    const int stride = operand_stride(p.weight, p.rows);
    const size_t nbytes = is_rounded ? 0 : static_cast<size_t>(p.rows * stride) * sizeof(uint16_t);
    const Scratch rounded(*gpu_, nbytes);
    const Scratch scales(*gpu_, p.weight.kind == Kind::kF16 ? static_cast<size_t>(p.rows) * sizeof(float) : 0);
    if (!is_rounded) {
      prepare_rows(*gpu_, p.x, p.rows, p.weight.cols, stride, p.norm, rounded.as<uint16_t>(), scales.as<float>());
    }
    MmaView tiles;
    tiles.x = is_rounded ? p.rounded : rounded.as<uint16_t>();
    tiles.row_scales = scales.as<float>();
    tiles.rows = p.rows;
    tiles.accumulate = p.accumulate;
    return for_each_strip(*gpu_, p.weight, p.rows, [&](const WeightView& strip, int64_t first) {
      tiles.weight = strip;
      tiles.bias = p.bias == nullptr ? nullptr : p.bias + first;
      tiles.y = {p.y.data + first, p.y.stride};
      matmul_mma(*gpu_, tiles);
    });
  }
  p.norm.weight == nullptr ? matmul_tiles(*gpu_, p) : normalize_first(*gpu_, p, matmul_tiles);
}

void CudaBackend::matmul(const MatmulArgs& args) {
  const OpRange range("matmul");
  check(args);
  product(product_of(args), args.compute);
}

void CudaBackend::feed_forward(const FeedForwardArgs& args) {
  const OpRange range("feed_forward");
  check(args);
  const int64_t rows = args.x.rows();
  const WeightView down = own(*args.down, "feed_forward").view();
  const int width = down.cols;
  if (rows == 0) return;
  const bool is_split = args.gate_up == nullptr;
  const WeightView gate_up = own(is_split ? *args.gate : *args.gate_up, "feed_forward").view();
  const bool is_few = takes_few_rows(gate_up, rows, args.compute);
  if (!is_few && !takes_few_rows(down, rows, args.compute) && args.compute != Compute::kExact && takes_bf16(down)) {
    return feed_forward_on_tensor_cores(args);
  }
  ProductView first;
  first.x = rows_of(args.x);
  first.rows = rows;
  first.norm = norm_of(args.norm);
  first.weight = gate_up;
  const bool is_fused = !is_split && is_few;
  first.bias = optional_data(is_split ? args.gate_bias : args.gate_up_bias);

  const int64_t pitch = is_split ? 2 * int64_t{width} : is_fused ? int64_t{width} : int64_t{first.weight.rows};
  const Scratch products(*gpu_, static_cast<size_t>(rows * pitch) * sizeof(float));
  const Scratch hidden_memory(*gpu_, is_fused ? 0 : static_cast<size_t>(rows * width) * sizeof(float));
  Rows hidden{is_fused ? products.as<float>() : hidden_memory.as<float>(), width};
  first.y = {products.as<float>(), pitch};
  first.is_gate_up = is_fused;
  first.width = width;
  product(first, args.compute);
  if (is_split) {
    ProductView second = first;
    second.weight = own(*args.up, "feed_forward").view();
    second.bias = optional_data(args.up_bias);
    second.y.data += width;
    product(second, args.compute);
    cuda::swiglu(*gpu_, first.y, second.y, {width > 0 ? width : 1, 0}, rows, width, hidden);
  } else if (!is_fused) {
    Rows up = first.y;
    up.data += kGateGroup;
    cuda::swiglu(*gpu_, first.y, up, {static_cast<int>(kGateGroup), static_cast<int>(2 * kGateGroup)}, rows, width,
                 hidden);
  }

  ProductView last;
  last.x = hidden;
  last.rows = rows;
  last.weight = down;
  last.bias = optional_data(args.down_bias);
  last.y = rows_of(args.y);
  last.accumulate = args.accumulate;
  product(last, args.compute);
}

/// Many rows: the hidden numbers are only kept as the second product takes them.
void CudaBackend::feed_forward_on_tensor_cores(const FeedForwardArgs& args) const {
  const int64_t rows = args.x.rows();
  const WeightView down = own(*args.down, "feed_forward").view();
  const int width = down.cols;
  const int hidden_stride = operand_stride(down, rows);
  const Scratch hidden_memory(*gpu_, static_cast<size_t>(rows * hidden_stride) * sizeof(uint16_t));
  const RoundedRows hidden{hidden_memory.as<uint16_t>(), width, hidden_stride, hidden_stride};

  const bool is_split = args.gate_up == nullptr;
  ProductView first;
  first.x = rows_of(args.x);
  first.rows = rows;
  first.norm = norm_of(args.norm);
  first.weight = own(is_split ? *args.gate : *args.gate_up, "feed_forward").view();
  first.bias = optional_data(is_split ? args.gate_bias : args.gate_up_bias);
  if (!is_split && takes_bf16(first.weight)) {
    const int stride = operand_stride(first.weight, rows);
    const Scratch rounded(*gpu_, static_cast<size_t>(rows * stride) * sizeof(uint16_t));
    prepare_rows(*gpu_, first.x, rows, first.weight.cols, stride, first.norm, rounded.as<uint16_t>(), nullptr);
    MmaView gate_up;
    gate_up.x = rounded.as<uint16_t>();
    gate_up.rows = rows;
    for_each_strip(*gpu_, first.weight, rows, [&](const WeightView& strip, int64_t first_row) {
      gate_up.weight = strip;
      gate_up.bias = first.bias == nullptr ? nullptr : first.bias + first_row;
      gate_up_rounded(*gpu_, gate_up, part_of(hidden, first_row / 2, strip.rows / 2));
    });
  } else {
    const int64_t pitch = is_split ? 2 * int64_t{width} : int64_t{first.weight.rows};
    const Scratch products(*gpu_, static_cast<size_t>(rows * pitch) * sizeof(float));
    first.y = {products.as<float>(), pitch};
    product(first, args.compute);
    Rows up = first.y;
    GatePlaces places{static_cast<int>(kGateGroup), static_cast<int>(2 * kGateGroup)};
    if (is_split) {
      ProductView second = first;
      second.weight = own(*args.up, "feed_forward").view();
      second.bias = optional_data(args.up_bias);
      second.y.data += width;
      product(second, args.compute);
      up = second.y;
      places = {width, 0};
    } else {
      up.data += kGateGroup;
    }
    swiglu_rounded(*gpu_, first.y, up, places, rows, hidden);
  }

  ProductView last;
  last.rounded = hidden.data;
  last.rows = rows;
  last.weight = down;
  last.bias = optional_data(args.down_bias);
  last.y = rows_of(args.y);
  last.accumulate = args.accumulate;
  product(last, args.compute);
}

void CudaBackend::kv_store(const KvStoreArgs& args) {
  const OpRange range("kv_store");
  check(args);
  const std::vector<KvSegmentView> segments = segments_of(args.segments, args.layer, "kv_store");
  if (segments.empty()) return;
  cuda::kv_store(*gpu_, segments.data(), static_cast<int64_t>(segments.size()), kv_rows_of(args));
}

void CudaBackend::kv_load(const KvLoadArgs& args) {
  const OpRange range("kv_load");
  check(args);
  if (args.k.size() == 0) return;
  cuda::kv_load(*gpu_, own(*args.cache, "kv_load").layer(args.layer), args.position, args.k.rows(), device_data(args.k),
                device_data(args.v));
}

void CudaBackend::attention(const AttentionArgs& args) {
  const OpRange range("attention");
  check(args);
  const std::vector<KvSegmentView> segments = segments_of(args.segments, args.layer, "attention");
  if (segments.empty() || args.q.size() == 0) return;
  const KvLayerView& layer = segments.front().layer;
  const int heads = static_cast<int>(args.q.dim(1));
  const bool may_round = args.compute != Compute::kExact;
  const auto run = may_round && has_attention_mma(layer.kind, layer.head_dim, heads / layer.kv_heads)
                       ? &cuda::attention_mma
                       : &cuda::attention;
  run(*gpu_, segments.data(), static_cast<int64_t>(segments.size()), rows_of(args.q), heads,
      static_cast<float>(args.scale), rows_of(args.y));
}

void CudaBackend::attend(const KvStoreArgs& store, const AttentionArgs& args) {
  const OpRange range("attend");
  check(store);
  check(args);
  const std::vector<KvSegmentView> segments = segments_of(args.segments, args.layer, "attend");
  const int64_t count = static_cast<int64_t>(segments.size());
  const int heads = static_cast<int>(args.q.dim(1));
  if (count == 0 || !store.cos || args.compute == Compute::kExact ||
      !has_attention_decode(segments.data(), count, heads)) {
    return Backend::attend(store, args);
  }
  attention_decode(*gpu_, segments.data(), count, kv_rows_of(store), rows_of(args.q), heads,
                   static_cast<float>(args.scale), rows_of(args.y), static_cast<int*>(arrived_->data()));
}

void CudaBackend::attend_and_project(const KvStoreArgs& store, const AttentionArgs& args,
                                     const MatmulArgs& projection) {
  const WeightView weight = own(*projection.weight, "attend_and_project").view();
  const int64_t rows = args.q.rows();
  // On the tensor cores a product rounds its rows, which attention can do as it stores them.
  const bool rounds = args.compute != Compute::kExact && projection.compute != Compute::kExact && takes_bf16(weight) &&
                      !rounds_weights(weight, projection.compute) &&
                      !takes_few_rows(weight, rows, projection.compute) && !projection.norm.weight &&
                      operand_stride(weight, rows) == weight.cols;
  if (!rounds) return Backend::attend_and_project(store, args, projection);
  check(args);
  check(projection);
  check_projection(args, projection.x);
  const int heads = static_cast<int>(args.q.dim(1));
  const std::vector<KvSegmentView> segments = segments_of(args.segments, args.layer, "attend_and_project");
  bool is_rounded = args.q.dim(2) % 2 == 0;  // pairs are stored at once
  int64_t tokens = 0;
  for (const KvSegmentView& segment : segments) {
    is_rounded = is_rounded && has_attention_wgmma(*gpu_, segment, heads, static_cast<float>(args.scale));
    tokens += segment.tokens;
  }
  // Rows of no segment are the product's all the same.
  if (!is_rounded || tokens != rows) return Backend::attend_and_project(store, args, projection);

  const OpRange range("attend_and_project");
  kv_store(store);
  const Scratch memory(*gpu_, static_cast<size_t>(rows * weight.cols) * sizeof(uint16_t));
  const RoundedRows attended{memory.as<uint16_t>(), weight.cols, weight.cols, weight.cols};
  for (const KvSegmentView& segment : segments) {
    attention_wgmma_rounded(*gpu_, segment, rows_of(args.q), heads, static_cast<float>(args.scale), attended);
  }
  ProductView p = product_of(projection);
  p.rounded = attended.data;
  product(p, projection.compute);
}

void CudaBackend::softmax(const SoftmaxArgs& args) {
  const OpRange range("softmax");
  check(args);
  if (args.x.size() == 0) return;
  cuda::softmax(*gpu_, rows_of(args.x), args.x.rows(), args.x.dim(1), rows_of(args.y));
}

void CudaBackend::cross_entropy(const CrossEntropyArgs& args) {
  const OpRange range("cross_entropy");
  check(args);
  cuda::cross_entropy(*gpu_, rows_of(args.logits), args.logits.rows(), args.logits.dim(1),
                      static_cast<const int32_t*>(args.labels.data()), optional_data(args.losses),
                      optional_data(args.hits), nullptr);
}

// Logits of these two are in host memory (ops/sample.h, ops/log_sum_exp.h), so the CPU goes through them.

void CudaBackend::log_sum_exp(const LogSumExpArgs& args) {
  const OpRange range("log_sum_exp");
  check(args);
  for (int64_t row = 0; row < args.logits.rows(); ++row) {
    args.out[row] = log_sum_exp_on_host(args.logits.row<float>(row), args.logits.dim(1), "log_sum_exp", logits_loops());
  }
}

void CudaBackend::sample(std::span<const SampleArgs> rows, std::span<SampleResult> results) {
  const OpRange range("sample");
  require(rows.size() == results.size(), ErrorKind::kInternal, "sample: ", rows.size(), " rows, but ", results.size(),
          " results");
  for (size_t row = 0; row < rows.size(); ++row) results[row] = sample_on_host(rows[row], logits_loops());
}

void CudaBackend::swiglu(const SwigluArgs& args) {
  const OpRange range("swiglu");
  check(args);
  const int width = static_cast<int>(args.gate.dim(1));
  cuda::swiglu(*gpu_, rows_of(args.gate), rows_of(args.up), {width > 0 ? width : 1, 0}, args.gate.rows(), width,
               rows_of(args.y));
}

void CudaBackend::dropout(const DropoutArgs& args) {
  const OpRange range("dropout");
  check(args);
  const DropoutView how{args.seed, args.p == 0.0 ? 0u : dropout_threshold(args.p),
                        static_cast<float>(args.scale / (1.0 - args.p)), args.accumulate};
  cuda::dropout(*gpu_, rows_of(args.x), rows_of(args.y), args.x.rows(), args.x.dim(1), how);
}

}  // namespace llama_ext::cuda
