// Operations of training that work on rows: activations, norms, losses, dropout, and sums over rows in a fixed order.
#include <algorithm>

#include "cpu/cpu_backend_internal.h"
#include "cpu/row_tasks.h"

namespace llama_ext {
namespace {

// Rows whose gradients of a norm's weight are summed by themselves.
constexpr int64_t kNormRows = 64;
// Columns of a task that sums over rows: whole cache lines.
constexpr int64_t kSumColumns = 32;
// Columns of a task of embedding_backward.
constexpr int64_t kEmbeddingColumns = 128;

}  // namespace

void CpuBackend::swiglu(const SwigluArgs& args) {
  check(args);
  const int64_t size = args.gate.dim(1);
  for_each_row(args.gate.rows(), threads_for(3.0 * row_microseconds(args.gate)), [&](int64_t row) {
    kernels_.training.swiglu(args.gate.row<float>(row), args.up.row<float>(row), size, args.y.row<float>(row));
  });
}

void CpuBackend::swiglu_backward(const SwigluBackwardArgs& args) {
  check(args);
  const int64_t size = args.gate.dim(1);
  for_each_row(args.gate.rows(), threads_for(4.0 * row_microseconds(args.gate)), [&](int64_t row) {
    kernels_.training.swiglu_backward(args.gate.row<float>(row), args.up.row<float>(row), args.d_y.row<float>(row),
                                      size, args.d_gate.row<float>(row), args.d_up.row<float>(row),
                                      args.y ? args.y.row<float>(row) : nullptr);
  });
}

void CpuBackend::dropout(const DropoutArgs& args) {
  check(args);
  const int64_t size = args.x.dim(1);
  DropoutRow of_all{.seed = args.seed,
                    .threshold = dropout_threshold(args.p),
                    .factor = static_cast<float>(args.scale / (1.0 - args.p))};
  for_each_row(args.x.rows(), threads_for(2.0 * row_microseconds(args.x)), [&](int64_t row) {
    if (of_all.threshold == 0 && !args.accumulate) {
      kernels_.training.scale(args.x.row<float>(row), size, of_all.factor, args.y.row<float>(row));
      return;
    }
    DropoutRow of_row = of_all;
    of_row.index = static_cast<uint64_t>(row * size);
    kernels_.training.dropout(args.x.row<float>(row), size, of_row, args.accumulate, args.y.row<float>(row));
  });
}

void CpuBackend::rms_norm_backward(const RmsNormBackwardArgs& args) {
  check(args);
  const int64_t rows = args.x.rows();
  const int64_t size = args.x.dim(1);
  const int64_t blocks = ceil_div(rows, kNormRows);
  const bool wants_weight = static_cast<bool>(args.d_weight);
  const int64_t stride = round_up(size, 16);
  float* sums = nullptr;
  if (wants_weight) {
    sums = static_cast<float*>(thread_scratch(Scratch::kSums, static_cast<size_t>(blocks * stride) * sizeof(float)));
  }
  const int threads = threads_for(3.0 * row_microseconds(args.x));
  parallel_for(threads, blocks, [&](int64_t block, int) {
    float* sum = wants_weight ? sums + block * stride : nullptr;
    if (wants_weight) std::fill(sum, sum + size, 0.0f);
    for (int64_t row = block * kNormRows; row < std::min(rows, (block + 1) * kNormRows); ++row) {
      kernels_.training.rms_norm_backward({args.x.row<float>(row), args.weight.f32(), args.d_y.row<float>(row), size,
                                           static_cast<float>(args.eps), args.d_x.row<float>(row), args.accumulate,
                                           sum});
    }
  });
  if (!wants_weight) return;
  float* d_weight = args.d_weight.f32();
  parallel_for(threads_for(static_cast<double>(blocks * size) / kElementsPerMicrosecond), ceil_div(size, kSumColumns),
               [&](int64_t task, int) {
                 const int64_t column = task * kSumColumns;
                 kernels_.training.add_rows(sums + column, stride, blocks, std::min(kSumColumns, size - column),
                                            d_weight + column);
               });
}

void CpuBackend::cross_entropy_backward(const CrossEntropyBackwardArgs& args) {
  check(args);
  const auto* labels = static_cast<const int32_t*>(args.labels.data());
  float* losses = args.losses.f32();
  const int64_t size = args.logits.dim(1);
  // Rows may have a whole vocabulary.
  const int64_t rows_per_task = std::clamp<int64_t>(8192 / std::max<int64_t>(size, 1), 1, 64);
  const int64_t rows = args.logits.rows();
  parallel_for(threads_for(3.0 * row_microseconds(args.logits)), ceil_div(rows, rows_per_task), [&](int64_t task, int) {
    for (int64_t t = task * rows_per_task; t < std::min(rows, (task + 1) * rows_per_task); ++t) {
      float* logits = args.logits.row<float>(t);
      if (labels[t] == kIgnoreLabel) {
        losses[t] = 0.0f;
        std::fill(logits, logits + size, 0.0f);
        continue;
      }
      const double logit = static_cast<double>(logits[labels[t]]);
      const double total = kernels_.training.softmax_gradient(logits, size, args.scale);
      losses[t] = static_cast<float>(total - logit);
      logits[labels[t]] -= static_cast<float>(args.scale);
    }
  });
}

void CpuBackend::embedding_backward(const EmbeddingBackwardArgs& args) {
  check(args);
  PanelMatrix& table = panel_matrix(*args.d_table);
  const auto* ids = static_cast<const int32_t*>(args.ids.data());
  const int64_t tokens = args.ids.rows();
  const int64_t size = table.cols();
  // A row of the table has an element in each cache line of its panel: it is gathered once, not for each token. So tokens are
  // sorted by their ids, those of an id in their own order.
  auto* ends = static_cast<int64_t*>(
      thread_scratch(Scratch::kSums, static_cast<size_t>(table.rows() + 1 + tokens) * sizeof(int64_t)));
  int64_t* sorted = ends + table.rows() + 1;
  std::fill(ends, ends + table.rows() + 1, int64_t{0});
  for (int64_t t = 0; t < tokens; ++t) ++ends[ids[t] + 1];
  for (int64_t id = 0; id < table.rows(); ++id) ends[id + 1] += ends[id];
  for (int64_t t = 0; t < tokens; ++t) sorted[ends[ids[t]]++] = t;  // now ends[id] is where those of id end

  const int64_t blocks = ceil_div(size, kEmbeddingColumns);
  const double microseconds = 3.0 * row_microseconds(args.d_y) + static_cast<double>(table.panels()) / 10.0;
  parallel_for(threads_for(microseconds), table.panels() * blocks, [&](int64_t task, int) {
    const int64_t panel = task / blocks;
    const int64_t begin = task % blocks * kEmbeddingColumns;
    const int64_t columns = std::min(kEmbeddingColumns, size - begin);
    float sums[kEmbeddingColumns];
    for (int64_t id = panel * kPanel; id < std::min(table.rows(), (panel + 1) * kPanel); ++id) {
      const int64_t first = id == 0 ? 0 : ends[id - 1];
      if (first == ends[id]) continue;
      float* row = table.panel<float>(panel) + begin * kPanel + id % kPanel;
      for (int64_t k = 0; k < columns; ++k) sums[k] = row[k * kPanel];
      for (int64_t i = first; i < ends[id]; ++i) {
        kernels_.training.add(args.d_y.row<float>(sorted[i]) + begin, columns, sums);
      }
      for (int64_t k = 0; k < columns; ++k) row[k * kPanel] = sums[k];
    }
  });
}

}  // namespace llama_ext
