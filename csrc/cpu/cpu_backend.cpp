// Memory and the operations that work row by row.
#include "cpu/cpu_backend.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "cpu/cpu_backend_internal.h"
#include "cpu/isa.h"
#include "cpu/row_tasks.h"

namespace llama_ext {
namespace {

// What one thread gets through in a microsecond, roughly, in exponentials of float64.
constexpr double kExponentialsPerMicrosecond = 500.0;
// Elements set to zero.
constexpr double kZeroedPerMicrosecond = 4000.0;
constexpr int64_t kZeroedByTask = 65536;

}  // namespace

std::unique_ptr<Backend> make_cpu_backend(int threads, const std::string& isa) {
  require(threads >= 0 && threads <= kMaxThreads, ErrorKind::kOption, "threads must be in [1, ", kMaxThreads,
          "], or 0 for the machine's default, got ", threads);
  const KernelTable& kernels = kernel_table(isa);
  return std::make_unique<CpuBackend>(kernels, threads == 0 ? default_threads().threads : threads);
}

const PanelMatrix& panel_matrix(const Matrix& matrix) {
  const auto* panels = dynamic_cast<const PanelMatrix*>(&matrix);
  require(panels != nullptr, ErrorKind::kDevice, "this matrix belongs to another device than the CPU");
  return *panels;
}

PanelMatrix& panel_matrix(Matrix& matrix) { return const_cast<PanelMatrix&>(panel_matrix(std::as_const(matrix))); }

const PanelKvCache& panel_cache(const KvCache& cache) {
  const auto* panels = dynamic_cast<const PanelKvCache*>(&cache);
  require(panels != nullptr, ErrorKind::kDevice, "this KV cache belongs to another device than the CPU");
  return *panels;
}

PanelKvCache& panel_cache(KvCache& cache) { return const_cast<PanelKvCache&>(panel_cache(std::as_const(cache))); }

std::unique_ptr<Buffer> CpuBackend::allocate(size_t nbytes) { return std::make_unique<HostBuffer>(nbytes, "a buffer"); }

void CpuBackend::require_memory(int64_t nbytes, const std::string& what) {
  require_available_memory(static_cast<size_t>(nbytes), what.c_str());
}

void CpuBackend::copy_to_device(void* device, const void* host, size_t nbytes) {
  if (nbytes > 0) std::memcpy(device, host, nbytes);
}

void CpuBackend::copy_to_host(void* host, const void* device, size_t nbytes) {
  if (nbytes > 0 && host != device) std::memcpy(host, device, nbytes);
}

void CpuBackend::embedding(const EmbeddingArgs& args) {
  check(args);
  const PanelMatrix& table = panel_matrix(*args.table);
  const auto* ids = static_cast<const int32_t*>(args.ids.data());
  // Each element lies in a cache line of its own: slower than its size says.
  for_each_row(args.ids.rows(), threads_for(8.0 * row_microseconds(args.y)),
               [&](int64_t t) { load_row(table, ids[t], args.y.row<float>(t)); });
}

void CpuBackend::rms_norm(const RmsNormArgs& args) {
  check(args);
  const auto* weight = args.weight.f32();
  float* inv_rms = args.inv_rms ? args.inv_rms.f32() : nullptr;
  for_each_row(args.x.rows(), threads_for(row_microseconds(args.x)), [&](int64_t row) {
    kernels_.rms_norm(args.x.row<float>(row), weight, args.x.dim(1), static_cast<float>(args.eps),
                      args.y.row<float>(row), inv_rms == nullptr ? nullptr : inv_rms + row);
  });
}

void CpuBackend::zero(const TensorView& x) {
  if (x.size() == 0) return;
  const int threads = threads_for(static_cast<double>(x.size()) / kZeroedPerMicrosecond);
  if (x.is_contiguous()) {
    parallel_for(threads, ceil_div(x.size(), kZeroedByTask), [&](int64_t task, int) {
      const int64_t begin = task * kZeroedByTask;
      std::fill_n(x.f32() + begin, std::min(kZeroedByTask, x.size() - begin), 0.0f);
    });
    return;
  }
  for_each_row(x.rows(), threads, [&](int64_t row) { std::fill_n(x.row<float>(row), x.inner_size(), 0.0f); });
}

void CpuBackend::for_each_part(int64_t parts, const std::function<void(int64_t, int)>& function) {
  parallel_for(threads_, parts, function);
}

void CpuBackend::rope(const RopeArgs& args) {
  check(args);
  const int64_t dim = args.x.dim(2);
  const auto rotate = args.inverse ? kernels_.training.rope_inverse : kernels_.rope;
  for_each_row(args.x.rows(), threads_for(row_microseconds(args.x)), [&](int64_t t) {
    for (int64_t head = 0; head < args.x.dim(1); ++head) {
      rotate(args.x.row<float>(t) + head * dim, dim / 2, args.cos.row<float>(t), args.sin.row<float>(t));
    }
  });
}

void CpuBackend::softmax(const SoftmaxArgs& args) {
  check(args);
  for_each_row(args.x.rows(), threads_for(2.0 * row_microseconds(args.x)),
               [&](int64_t row) { kernels_.softmax(args.x.row<float>(row), args.x.dim(1), args.y.row<float>(row)); });
}

void CpuBackend::cross_entropy(const CrossEntropyArgs& args) {
  check(args);
  const auto* labels = static_cast<const int32_t*>(args.labels.data());
  float* losses = args.losses.f32();
  float* hits = args.hits ? args.hits.f32() : nullptr;
  for_each_row(args.logits.rows(), threads_for(row_microseconds(args.logits)), [&](int64_t t) {
    if (hits != nullptr) hits[t] = 0.0f;
    if (labels[t] == kIgnoreLabel) {
      losses[t] = 0.0f;
      return;
    }
    const float* logits = args.logits.row<float>(t);
    if (hits != nullptr && kernels_.logits.argmax(logits, args.logits.dim(1)) == labels[t]) hits[t] = 1.0f;
    const double total = kernels_.log_sum_exp(logits, args.logits.dim(1));
    losses[t] = static_cast<float>(total - static_cast<double>(logits[labels[t]]));
  });
}

// A row has a whole vocabulary: enough for a task.
void CpuBackend::log_sum_exp(const LogSumExpArgs& args) {
  check(args);
  const double microseconds = static_cast<double>(args.logits.size()) / kExponentialsPerMicrosecond;
  parallel_for(threads_for(microseconds), args.logits.rows(), [&](int64_t row, int) {
    args.out[row] =
        log_sum_exp_on_host(args.logits.row<float>(row), args.logits.dim(1), "log_sum_exp", kernels_.logits);
  });
}

void CpuBackend::sample(std::span<const SampleArgs> rows, std::span<SampleResult> results) {
  require(rows.size() == results.size(), ErrorKind::kInternal, "sample: ", rows.size(), " rows, but ", results.size(),
          " results");
  double microseconds = 0;
  for (const SampleArgs& args : rows)
    microseconds += static_cast<double>(args.logits.size()) / kExponentialsPerMicrosecond;
  parallel_for(threads_for(microseconds), static_cast<int64_t>(rows.size()), [&](int64_t row, int) {
    results[static_cast<size_t>(row)] = sample_on_host(rows[static_cast<size_t>(row)], kernels_.logits);
  });
}

}  // namespace llama_ext
